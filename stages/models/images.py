"""Bytes from the web to RGB images, and nothing else: no torch, so that any worker may decode."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image

# Raster formats of the web. Never EPS: opening one runs Ghostscript on the file's program.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "JPEG2000", "ICO")
MAX_PIXELS = 89_478_485  # Pillow's own warning threshold: a quarter of a GB in RGB
MAX_SCANS = 100
"""Of a JPEG. Encoders write about 10; each costs a pass over all pixels, and 53 bytes can ask for
one."""

_MAX_MARKERS = 10_000  # some hundred are usual at most, in files with long metadata
# What a decoder of JPEG takes for a marker: not a stuffed 0xFF, a restart or padding.
_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
# Tags of a TIFF: where its strips and its tiles are, and how long.
_STRIPS = ((273, 279), (324, 325))
_MAX_READINGS = 16
"""Of a TIFF's bytes. Files with a few wrong sizes are common, and decoders forgive them."""

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

    The pixel count, a JPEG's scans and a TIFF's strips are counted before any pixel is decoded.
    Raises `DecodeError` for bytes that are damaged, truncated, too large, or in a format outside
    `FORMATS`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, max_pixels)
            _check_scans(data)
            _check_strips(image, len(data))
            if cover is not None:
                image.draft(None, (cover, cover))

            def convert(loaded: Image.Image) -> Image.Image:
                _check_size(loaded, max_pixels)  # an ICO's header may understate what is inside
                return from_cmyk(loaded) if from_cmyk and loaded.mode == "CMYK" else _rgb(loaded)

            rgb = upright_rgb(image, convert)
            # copy(): the caller must not hold the opened file's plugin and its buffers.
            rgb = rgb.copy() if rgb is image else rgb
            rgb.info.clear()  # its EXIF would turn it, and its tRNS whiten it, once more
            return rgb
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


def _check_scans(data: bytes) -> None:
    """Raises `DecodeError` for a JPEG with too many scans before its end. What EXIF holds, and what
    follows the end (a film, say), does not count: it may be any bytes."""
    if not data.startswith(b"\xff\xd8") or data.count(b"\xff\xda") <= MAX_SCANS:
        return
    at = scans = 0
    for _ in range(_MAX_MARKERS):
        found = _MARKER.search(data, at)
        if found is None or found[1] == b"\xd9":  # end of image
            return
        at = found.end()
        scans += found[1] == b"\xda"
        if scans > MAX_SCANS:
            break
        if found[1] >= b"\xc0" and found[1] != b"\xd8":  # a segment, its length first
            at += int.from_bytes(data[at : at + 2])
    raise DecodeError(f"a JPEG of more than {MAX_SCANS} scans or {_MAX_MARKERS} markers")


def _check_strips(image: Image.Image, length: int) -> None:
    """Raises `DecodeError` for a TIFF whose strips or tiles share bytes: each is read, so that some
    thousands of them that are the whole file take hours."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    for places, sizes in _STRIPS:
        # A decoder takes those without a size to reach to the end of the file; a wrong one, too.
        told = tags.get(sizes) or [length] * len(tags.get(places, ()))
        if sum(min(size, length) for size in told) > _MAX_READINGS * length:
            raise DecodeError(f"a TIFF whose {len(told)} strips share bytes")


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
    return image if image.mode == "RGB" else image.convert("RGB")


def upright_rgb(
    image: Image.Image, convert: Callable[[Image.Image], Image.Image] = _rgb
) -> Image.Image:
    """An image that Pillow has opened, of any mode, as `decode` gives it; itself where nothing is
    to be done. ``convert`` makes RGB of the loaded image.

    Raises `DecodeError` for a colour space that is not read.
    """
    # Read before load(): some of Pillow's formats turn the pixels and drop the tag while loading.
    orientation, size = _orientation(image), image.size
    image.load()
    turned = image.size != size or _orientation(image) != orientation
    rgb = convert(image)
    if turned or orientation not in _UPRIGHT:
        return rgb
    return rgb.transpose(_UPRIGHT[orientation])


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
