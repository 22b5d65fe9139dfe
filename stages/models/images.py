"""Bytes from the web to RGB images, and RGB images to the tensors that vision towers read."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageFile
from torch import Tensor

from stages.base import Config

# Raster formats of the web. Never EPS: opening one runs Ghostscript on the file's program.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "JPEG2000", "ICO")
MAX_PIXELS = 89_478_485  # Pillow's own warning threshold: a quarter of a GB in RGB

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_LONGEST = 32  # aspect ratio from which a crop is cut out before resizing

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class DecodeError(ValueError):
    """These bytes are not an image that we read; ``str(error)`` is one line."""


def decode(
    data: bytes,
    max_pixels: int = MAX_PIXELS,
    cover: int | None = None,
    from_cmyk: Callable[[Image.Image], Image.Image] | None = None,
) -> Image.Image:
    """One upright RGB image, a function of the bytes, of ``cover`` and of ``from_cmyk``.

    - A JPEG is decoded at the smallest of libjpeg's scales (1, 1/2, 1/4, 1/8) whose edges both
      have ``cover`` pixels; None = whole.
    - EXIF orientation is applied, and ignored where the EXIF block is broken.
    - Animated files give their first frame.
    - Transparency is composited on white; palettes are converted by Pillow, and so is CMYK unless
      ``from_cmyk`` makes RGB of it; colour profiles are ignored.
    - 16-bit samples keep their high byte; floats are read as 0 to 1 where none exceeds 1, else as
      0 to 255.

    The pixel count is checked before any pixel is decoded. Raises `DecodeError` for bytes that
    are damaged, truncated, too large, or in a format outside `FORMATS`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, max_pixels)
            if cover is not None:
                image.draft(None, (cover, cover))
            return _decoded(image, max_pixels, from_cmyk)
    except DecodeError:
        raise
    except Exception as error:  # Pillow's parsers raise some twenty kinds on hostile bytes
        message = " ".join(str(error).split())[:200]
        raise DecodeError(f"{type(error).__name__}: {message}") from error


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise DecodeError(f"image is empty: {width}x{height} pixels")
    if width * height > max_pixels:
        raise DecodeError(f"image is too large: {width}x{height}, at most {max_pixels} pixels")


def _decoded(
    image: ImageFile.ImageFile,
    max_pixels: int,
    from_cmyk: Callable[[Image.Image], Image.Image] | None,
) -> Image.Image:
    # Read before load(): some of Pillow's formats turn the pixels and drop the tag while loading.
    orientation = _orientation(image)
    size = image.size
    image.load()
    _check_size(image, max_pixels)  # an ICO's header may understate the picture inside
    turned = image.size != size or _orientation(image) != orientation
    rgb = from_cmyk(image) if from_cmyk and image.mode == "CMYK" else _rgb(image)
    if not turned and orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    return rgb


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 - a broken EXIF block does not spoil the picture itself
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _high_range(image)
    if image.mode in {"LAB", "HSV"}:
        raise DecodeError(f"colour space {image.mode} is not read")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        opaque = Image.alpha_composite(white, image)
        del image, white  # each takes as much memory as what is made next
        return opaque.convert("RGB")
    # copy(): the caller must not hold the opened file's plugin and its buffers.
    return image.copy() if image.mode == "RGB" else image.convert("RGB")


def _high_range(image: Image.Image) -> Image.Image:
    """Grey images of 16 or 32 bits a sample, which Pillow's convert would clip at 255."""
    samples = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        samples = np.nan_to_num(samples, nan=0.0, posinf=255.0, neginf=0.0)
        grey = samples * 255.0 if samples.max() <= 1.0 else samples
    else:
        grey = np.floor(np.clip(samples, 0, 65535) / 256.0)
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            grey[samples == transparent] = 255.0
    return Image.fromarray(np.clip(grey, 0, 255).astype(np.uint8)).convert("RGB")


class Preprocessing(Config):
    """How a vision tower wants its images, as its folder's image processor config says.

    ``shortest_edge``: the whole image is squeezed into the square where None (BLIP); otherwise it
    is scaled until its shorter edge has that many pixels and the centre is cut out (CLIP).
    """

    size: int
    shortest_edge: int | None = None
    resample: int = int(Image.Resampling.BICUBIC)
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    @classmethod
    def of(cls, processor: Mapping[str, Any], *, size: int, crop: bool) -> Preprocessing:
        """From a transformers image processor's JSON (empty = its defaults).

        ``size`` is the edge that the model takes, in pixels: the model's config decides it, since
        a position table fits no other. ``crop`` is whether the model's kind crops by default.
        """
        edge: int | None = None
        if processor.get("do_center_crop", crop):
            asked = processor.get("size", size)
            edge = int(asked.get("shortest_edge", size)) if isinstance(asked, Mapping) else asked
        return cls(
            size=size,
            shortest_edge=edge,
            resample=processor.get("resample", int(Image.Resampling.BICUBIC)),
            mean=tuple(processor.get("image_mean") or CLIP_MEAN),
            std=tuple(processor.get("image_std") or CLIP_STD),
        )

    @property
    def covered(self) -> int:
        """The least edge that a decoded image needs, in pixels; see `decode`."""
        return self.size if self.shortest_edge is None else self.shortest_edge

    def __call__(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """(B, 3, size, size) float32; a tensor is taken to be such, and returned."""
        if isinstance(images, Tensor):
            return images
        edge = self.size, self.mean, self.std
        return preprocess(images, *edge, shortest_edge=self.shortest_edge, resample=self.resample)


def preprocess(
    images: Sequence[Image.Image],
    size: int,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
    *,
    shortest_edge: int | None = None,
    resample: int = Image.Resampling.BICUBIC,
) -> Tensor:
    """RGB images to (B, 3, size, size) float32: resized, over 255, minus ``mean``, over ``std``.

    Equal to transformers' `BlipImageProcessorPil`, and with ``shortest_edge`` to
    `CLIPImageProcessorPil`: one table look-up replaces its rescaling and normalising.
    """
    table = _normalised(tuple(mean), tuple(std))
    pixels = np.empty((len(images), 3, size, size), dtype=np.float32)
    for index, image in enumerate(images):
        rgb = image if image.mode == "RGB" else _rgb(image)
        resized = np.asarray(_resized(rgb, size, shortest_edge, resample))
        for channel in range(3):
            np.take(table[channel], resized[..., channel], out=pixels[index, channel], mode="clip")
    return torch.from_numpy(pixels)


@lru_cache(maxsize=16)
def _normalised(mean: tuple[float, ...], std: tuple[float, ...]) -> npt.NDArray[np.float32]:
    """(3, 256): what each byte becomes in each channel, in transformers' order of roundings."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    means, stds = np.array(mean, dtype=np.float32), np.array(std, dtype=np.float32)
    return (scaled[None, :] - means[:, None]) / stds[:, None]


def _resized(image: Image.Image, size: int, edge: int | None, resample: int) -> Image.Image:
    if edge is None:
        return image.resize((size, size), resample)
    width, height = image.size
    short, long = min(width, height), max(width, height)
    scaled = (edge, int(edge * long / short))
    new_width, new_height = scaled if width <= height else scaled[::-1]
    if long > _LONGEST * short:
        # A 20,000x10 image must not become 448,000x224 on the way: only the crop's source box is
        # resized. Bytes may differ from transformers' by roundings here, and only here.
        left, top = max((new_width - size) / 2, 0), max((new_height - size) / 2, 0)
        across, down = width / new_width, height / new_height
        right, bottom = min((left + size) * across, width), min((top + size) * down, height)
        box = (left * across, top * down, right, bottom)
        return image.resize((size, size), resample, box=box)
    # Where the crop reaches beyond the image, PIL's crop gives the same black borders.
    left, top = (new_width - size) // 2, (new_height - size) // 2
    whole = image.resize((new_width, new_height), resample)
    return whole.crop((left, top, left + size, top + size))
