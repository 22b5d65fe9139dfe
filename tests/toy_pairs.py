"""A toy world to train on: plain squares of a colour, with texts that name it, in real tars."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stages.base import LocalContext
from stages.ids import pair_id, sample_id
from stages.models.config import MedConfig, TextConfig, VisionConfig
from stages.models.text import word_tokenizer

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (230, 20, 20),
    "green": (20, 200, 20),
    "blue": (20, 20, 230),
    "white": (250, 250, 250),
    "black": (5, 5, 5),
    "yellow": (240, 240, 20),
}
SIZE = 16


def png(colour: str, seed: int = 0) -> bytes:
    """A square of a colour with a little noise, so that no two pictures are the same."""
    noise = np.random.default_rng(seed).integers(-5, 6, (SIZE, SIZE, 3))
    pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def sample(name: str, image: bytes, texts: Sequence[str], source: str = "web") -> dict[str, bytes]:
    """A sample as `stages.assemble` writes it, by suffix."""
    key = sample_id(name)
    entries = [
        {"text": text, "source": source, "pair_id": pair_id(key, source, text), "origin": key}
        for text in texts
    ]
    described = json.dumps({"sample_id": key, "texts": entries}).encode()
    return {f"{key}.png": image, f"{key}.json": described}


def write_tar(file: Path, members: Sequence[Mapping[str, bytes]]) -> Path:
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as archive:
        for group in members:
            for name, data in group.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return file


def toy_tar(file: Path, images: int = 24, source: str = "web", words: str = "a {} square") -> Path:
    """``images`` squares of all colours in turn, one text each."""
    names = list(COLOURS)
    samples = []
    for number in range(images):
        colour = names[number % len(names)]
        text = words.format(colour)
        samples.append(sample(f"{file.stem}/{number}", png(colour, number), [text], source))
    return write_tar(file, samples)


def toy_tokenizer(folder: Path) -> Path:
    texts = [f"a picture of a {colour} square on the wall" for colour in COLOURS]
    word_tokenizer(texts, min_count=1).save_pretrained(str(folder))
    return folder


def toy_med(dropout: float = 0.0, **changes: Any) -> MedConfig:
    """A MED that a CPU trains at some hundred steps a second."""
    sizes: dict[str, Any] = {
        "vision": VisionConfig(
            image_size=SIZE, patch_size=8, width=32, layers=1, heads=2, mlp_width=64
        ),
        "text": TextConfig(
            width=32,
            layers=1,
            heads=2,
            mlp_width=64,
            max_positions=40,
            vision_width=32,
            dropout=dropout,
        ),
        "projection_dim": 16,
        "queue_size": 24,
    }
    return MedConfig(**{**sizes, **changes})


class Killed(Exception):
    """Stands for whatever ends a process in the middle of its work."""


class DyingContext(LocalContext):
    """Ends the stage once it has reported ``at`` or more steps."""

    def __init__(self, checkpoints: Path, at: int) -> None:
        super().__init__(checkpoints)
        self.at = at

    def progress(self, message: str, done: int, total: int) -> None:
        if done >= self.at:
            raise Killed
