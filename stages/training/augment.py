"""BLIP's training augmentation: a random crop, a flip, and RandAugment without colour changes.

From transform/randaugment.py and data/__init__.py of the original release, with Pillow's
operations in place of OpenCV's. Flips and shifts break texts that speak of left and right; the
original has them all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

OPERATIONS = 2
"""N of RandAugment: how many operations are drawn; each is then applied with probability 1/2."""

_FILL = (128, 128, 128)
# M = 5 of at most 10. At this magnitude BLIP's brightness and sharpness factor is 1.0: no change.
_ENHANCE = 5 / 10 * 1.8 + 0.1
_SHEAR = 5 / 10 * 0.3
_TRANSLATE = 5 / 10 * 10  # pixels
_ROTATE = 5 / 10 * 30  # degrees

_CROP_ATTEMPTS = 10
_LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))

Operation = Callable[[Image.Image, float], Image.Image]
"""An image and a sign, +1 or -1, for operations that have a direction."""


def augmented(
    image: Image.Image, size: int, min_scale: float, random: np.random.Generator
) -> Image.Image:
    """``image`` (RGB) cropped to a random part of ``min_scale`` to 1 of its area, as a square of
    ``size`` pixels, perhaps mirrored, then distorted."""
    box = random_box(image.size, min_scale, random)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for index in random.integers(0, len(RAND_AUGMENT), OPERATIONS):
        applied, sign = random.random() < 0.5, 1.0 if random.random() < 0.5 else -1.0
        if applied:
            image = RAND_AUGMENT[int(index)](image, sign)
    return image


def random_box(
    size: tuple[int, int], min_scale: float, random: np.random.Generator
) -> tuple[int, int, int, int]:
    """Where torchvision's RandomResizedCrop cuts: left, top, right, bottom."""
    width, height = size
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * random.uniform(min_scale, 1.0)
        ratio = math.exp(random.uniform(*_LOG_RATIO))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left = int(random.integers(0, width - across + 1))
            top = int(random.integers(0, height - down + 1))
            return left, top, left + across, top + down
    # No such part fits: the middle, with the nearest aspect ratio that is allowed.
    across, down = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down


def _affine(image: Image.Image, *coefficients: float) -> Image.Image:
    return image.transform(
        image.size,
        Image.Transform.AFFINE,
        coefficients,
        resample=Image.Resampling.BILINEAR,
        fillcolor=_FILL,
    )


def _rotate(image: Image.Image, sign: float) -> Image.Image:
    return image.rotate(sign * _ROTATE, Image.Resampling.BILINEAR, fillcolor=_FILL)


RAND_AUGMENT: tuple[Operation, ...] = (
    lambda image, sign: image,
    lambda image, sign: ImageOps.autocontrast(image),
    lambda image, sign: ImageEnhance.Brightness(image).enhance(_ENHANCE),
    lambda image, sign: ImageEnhance.Sharpness(image).enhance(_ENHANCE),
    lambda image, sign: ImageOps.equalize(image),
    lambda image, sign: _affine(image, 1, sign * _SHEAR, 0, 0, 1, 0),
    lambda image, sign: _affine(image, 1, 0, 0, sign * _SHEAR, 1, 0),
    lambda image, sign: _affine(image, 1, 0, sign * _TRANSLATE, 0, 1, 0),
    lambda image, sign: _affine(image, 1, 0, 0, 0, 1, sign * _TRANSLATE),
    _rotate,
)
