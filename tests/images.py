"""Encoded images for tests, whole and broken."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image


def jpeg(seed: int, size: tuple[int, int] = (40, 32)) -> bytes:
    """A JPEG of coloured noise, another for each seed."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def image_rows(images: Sequence[bytes]) -> list[dict[str, Any]]:
    """Rows of IMAGES: samples s000, s001, …"""
    return [
        {"sample_id": f"s{i:03d}", "sha256": hashlib.sha256(data).hexdigest(), "image": data}
        for i, data in enumerate(images)
    ]


def cut(data: bytes) -> bytes:
    """A file whose download broke off half-way."""
    return data[: len(data) // 2]
