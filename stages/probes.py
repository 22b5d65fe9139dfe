"""Probe sets: a few hundred annotated images on which models are measured, never trained."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from stages.errors import SourceError
from stages.models.images import DecodeError, decode

ANNOTATIONS = "annotations.jsonl"
_NEEDED = '{"image": file, "captions": [text, …]} a line, "wrong_captions" optional'


@dataclass(frozen=True)
class Probe:
    """One image of a probe set with what is and what is not true of it."""

    name: str
    """The image's file name within the folder; names the item in every table."""
    image: bytes
    captions: tuple[str, ...]
    """At least one."""
    wrong_captions: tuple[str, ...] = ()
    """Texts known not to describe the image."""


def read_probes(folder: Path) -> list[Probe]:
    """The probes of a folder with ``annotations.jsonl`` and the images it names, in its order.

    Each line is ``{"image": "0001.png", "captions": ["…"], "wrong_captions": ["…"]}``; the last
    is optional, other keys are ignored.

    Raises:
        SourceError: no such file, a line that is not of this form, or no line at all.
    """
    file = folder / ANNOTATIONS
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{file}: cannot be read: {error}; need {_NEEDED}") from error
    probes = [
        _probe(folder, line, f"{file}:{number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not probes:
        raise SourceError(f"{file}: no probes; need {_NEEDED}")
    names = [probe.name for probe in probes]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SourceError(f"{file}: image {twice!r} stands on two lines; put its texts on one")
    return probes


def _probe(folder: Path, line: str, where: str) -> Probe:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise SourceError(f"{where}: not JSON: {error}; need {_NEEDED}") from error
    if not isinstance(row, dict) or not isinstance(row.get("image"), str):
        raise SourceError(f"{where}: no image; need {_NEEDED}")
    captions = _texts(row, "captions", where)
    if not captions:
        raise SourceError(f"{where}: captions is missing or empty; need {_NEEDED}")
    name = row["image"]
    try:
        image = (folder / name).read_bytes()
    except (OSError, ValueError) as error:
        raise SourceError(f"{where}: image {name!r} cannot be read: {error}") from error
    return Probe(name, image, captions, _texts(row, "wrong_captions", where))


def _texts(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    texts = row.get(key) or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise SourceError(f"{where}: {key} must be a list of texts; need {_NEEDED}")
    return tuple(texts)


def decode_probes(probes: list[Probe], folder: Path) -> list[Image.Image]:
    """The probes' images, RGB. Raises `SourceError` naming the first that cannot be decoded."""
    images = []
    for probe in probes:
        try:
            images.append(decode(probe.image))
        except DecodeError as error:
            raise SourceError(f"{folder / probe.name}: {error}; give an image file") from error
    return images
