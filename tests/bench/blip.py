"""What the benchmarks of the models run on: BLIP of random weights, and pictures of random shapes.

`blip_base` is BLIP-base at 384 pixels with BERT's vocabulary size; `tiny` is for smoke tests.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
)

from stages.models.text import with_blip_tokens

_SENTENCE = "a picture of the red blue green round square big small on near"
_WORDS = _SENTENCE.split()


def tokenizer(pieces: int) -> BertTokenizer:
    """WordPiece of ``pieces`` words with BERT's special ids where there is room for them."""
    names = [f"[unused{i}]" for i in range(pieces)]
    first = 100 if pieces > 1000 else 1
    names[0] = "[PAD]"
    names[first : first + 4] = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names[-len(_WORDS) :] = _WORDS
    return with_blip_tokens(BertTokenizer(vocab={name: i for i, name in enumerate(names)}))


def config(tiny: bool) -> BlipConfig:
    ids = tokenizer(200 if tiny else 30522)
    vision = {"image_size": 32, "patch_size": 8} if tiny else {"image_size": 384}
    narrow = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
              "num_attention_heads": 4} if tiny else {}  # fmt: skip
    text = {"vocab_size": len(ids), "num_attention_heads": 12, "max_position_embeddings": 512,
            "bos_token_id": ids.bos_token_id, "sep_token_id": ids.sep_token_id,
            "eos_token_id": ids.sep_token_id, "pad_token_id": ids.pad_token_id}  # fmt: skip
    return BlipConfig(
        vision_config=vision | narrow | {"initializer_range": 0.02},
        text_config=text | narrow,
        image_text_hidden_size=24 if tiny else 256,
    )


def save(folder: Path, *, tiny: bool = False) -> tuple[Path, Path]:
    """Write a captioner and a matcher in transformers' format, with random weights."""
    torch.manual_seed(0)
    made = config(tiny)
    models = {"captioner": BlipForConditionalGeneration, "matcher": BlipForImageTextRetrieval}
    for name, kind in models.items():
        kind(made).save_pretrained(folder / name)
        tokenizer(200 if tiny else 30522).save_pretrained(folder / name)
        size = made.vision_config.image_size
        processor = BlipImageProcessorPil(size={"height": size, "width": size})
        processor.save_pretrained(folder / name)
    return folder / "captioner", folder / "matcher"


def pictures(count: int, size: tuple[int, int] = (640, 480)) -> list[bytes]:
    """JPEGs of coloured ellipses over a gradient, another for each index."""
    files = []
    for index in range(count):
        generator = np.random.default_rng(index)
        ramp = np.linspace(0, 255, size[0] * size[1] * 3) * generator.random()
        image = Image.fromarray(ramp.astype(np.uint8).reshape(size[1], size[0], 3))
        draw = ImageDraw.Draw(image)
        for _ in range(12):
            x, y, w, h = generator.integers(0, size[0], 4).tolist()
            colour = tuple(generator.integers(0, 256, 3).tolist())
            draw.ellipse((x, y, x + 1 + w // 2, y + 1 + h // 2), fill=colour)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def texts(count: int) -> list[list[str]]:
    """Two texts an image, of six and twelve words."""
    generator = np.random.default_rng(0)
    return [[" ".join(generator.choice(_WORDS, n).tolist()) for n in (6, 12)] for _ in range(count)]
