"""Encoded images in, checked and resized images out: upright, sRGB, without metadata.

Images are decoded by `stages.models.images.decode` and handed to img2dataset's `Resizer` as plain
pixels in place of a file: its own decoder ignores EXIF orientation and colour profiles, spoils
16-bit samples, and takes truncated files for whole ones.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from pydantic import Field, model_validator

from stages.base import Config
from stages.models.images import FORMATS, decode

Pixels: TypeAlias = npt.NDArray[np.uint8]
"""(height, width, 3)."""

_FREQUENCIES = np.cos(np.pi / 128 * np.outer(np.arange(16), 2 * np.arange(64) + 1))
"""(16, 64) float64: the lowest frequencies of the DCT-II of 64 numbers."""
_LEAST_COVER = 256  # pixels: enough for the perceptual hash
_LARGEST_PROFILE = 4 << 20
_PICTURE = 256 << 20
_ICON = b"\0\0\1\0"
_LARGE = 4_000_000
"""Pixels. Larger images are decoded one at a time, so that threads share a worker's memory."""


class ImageConfig(Config):
    """Which images are kept, and how."""

    image_size: int = Field(384, ge=1)
    """Pixels; of the shorter side with ``keep_ratio``."""
    resize_mode: Literal["no", "keep_ratio", "center_crop", "border", "keep_ratio_largest"] = (
        "keep_ratio"
    )
    """As in img2dataset. Images are never enlarged."""
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    encode_quality: int | None = Field(None, ge=0, le=100)
    """JPEG and WebP: 0 to 100, None is 95. PNG: compression level, 0 to 9, None is 6."""
    min_image_size: int = Field(1, ge=1)
    """Pixels of the shorter side, as downloaded, below which an image is ``too_small``."""
    max_aspect_ratio: float = Field(20.0, ge=1)
    """Longer side over shorter side."""
    max_pixels: int = Field(25_000_000, ge=1)
    """Checked before a pixel is decoded; a quarter of it for samples of more than 8 bits. Decoding
    takes up to 15 bytes of memory a pixel."""

    @model_validator(mode="after")
    def _png_levels(self) -> ImageConfig:
        if self.encode_format == "png" and (self.encode_quality or 0) > 9:
            raise ValueError(
                f"encode_quality: {self.encode_quality} is not allowed: "
                "with encode_format png it is the compression level, 0 to 9"
            )
        return self

    @property
    def quality(self) -> int:
        if self.encode_quality is not None:
            return self.encode_quality
        return 6 if self.encode_format == "png" else 95


@dataclass(frozen=True)
class Outcome:
    """What became of one sample: the columns of DOWNLOAD that depend on the image."""

    status: str
    detail: str | None = None
    http_code: int | None = None
    sha256: str | None = None
    phash: str | None = None
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    image: bytes | None = None
    pixel_sha256: str | None = None


class _Header(NamedTuple):
    """What the first bytes of an image say, before a pixel is decoded."""

    format: str
    mode: str
    width: int
    height: int
    swapped: bool
    """EXIF turns it by a quarter: height is width once it is upright."""
    profile: bytes | None
    """Its ICC profile."""


class ImageKeeper:
    """Encoded image bytes in, `Outcome` out: checked, decoded, hashed, resized, encoded again. Any
    number of threads may call it.

    The same bytes give the same outcome. Metadata is dropped; EXIF orientation is applied first,
    and colours with an ICC profile (RGB, grey or CMYK) are converted to sRGB.
    """

    def __init__(self, config: ImageConfig) -> None:
        self._config = config
        # Pillow takes memory in blocks of 16 MiB, which glibc would keep for each thread that had
        # them; a large picture in one block is given back.
        Image.core.set_block_size(_PICTURE)  # type: ignore[attr-defined]
        self._alone = threading.RLock()
        warnings.filterwarnings("ignore", module=r"PIL\.")  # what matters ends up in `detail`
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or its import asks the network
        resizer = _resizer()
        # It would send the whole process's stdout and stderr to /dev/null during every resize, to
        # hide what OpenCV's decoders print; they are given plain pixels and print nothing.
        resizer.SuppressStdoutStderr = nullcontext
        resizer.cv2 = _Cv2()
        resizer.A = _Transforms()
        self._resizer: Callable[[io.BytesIO], tuple[Any, ...]] = resizer.Resizer(
            image_size=config.image_size,
            resize_mode=config.resize_mode,
            resize_only_if_bigger=True,
            encode_quality=config.quality,
            encode_format=config.encode_format,
        )

    def __call__(self, data: bytes, content_type: str = "") -> Outcome:
        sha256 = hashlib.sha256(data).hexdigest()
        try:
            # Pillow decodes an icon when it opens it.
            with self._alone if data.startswith(_ICON) else nullcontext():
                outcome = self._outcome(data, content_type)
        except Exception as error:  # noqa: BLE001 - one row's decode: decoders raise anything
            outcome = Outcome(
                "decode", f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            )
        return replace(outcome, sha256=sha256)

    def _outcome(self, data: bytes, content_type: str) -> Outcome:
        if data.startswith(_ICON) and _icon_pixels(data) > self._config.max_pixels:
            return Outcome("too_large", f"an icon of more than {self._config.max_pixels} pixels")
        header = _header(data, content_type)
        return header if isinstance(header, Outcome) else self._judged(data, header)

    def _judged(self, data: bytes, header: _Header) -> Outcome:
        """What is refused is not even decoded."""
        width, height = header.width, header.height
        size = f"{width}x{height} pixels"
        # Deep samples pass through floats of eight bytes on their way to eight bits.
        weight = 4 if header.mode[0] in "IF" else 1
        if width * height * weight > self._config.max_pixels:
            most = self._config.max_pixels // weight
            return Outcome("too_large", f"{size} of mode {header.mode}, at most {most} in all")
        if min(width, height) < self._config.min_image_size:
            return Outcome("too_small", f"{size}, at least {self._config.min_image_size} a side")
        if max(width, height) > self._config.max_aspect_ratio * min(width, height):
            return Outcome("aspect", f"{size}, at most {self._config.max_aspect_ratio:g} to 1")
        # Of a large JPEG not much more than a quarter of the pixels is ever in memory.
        most = 4 * _LARGE if self._drafted(header) else _LARGE
        with self._alone if width * height * weight > most else nullcontext():
            return self._kept(data, header)

    def _drafted(self, header: _Header) -> bool:
        """Whether it may be decoded at a fraction of its size that leaves the resizer enough."""
        return header.format == "JPEG" and self._config.resize_mode != "no"

    def _kept(self, data: bytes, header: _Header) -> Outcome:
        drafted = self._drafted(header)
        cover = max(_LEAST_COVER, 2 * self._config.image_size) if drafted else None
        profile = header.profile
        of_cmyk = None
        if header.mode == "CMYK" and profile is not None:
            of_cmyk = partial(to_srgb, mode="CMYK", profile=profile)
        picture = decode(data, self._config.max_pixels, cover, of_cmyk)
        original = picture.size
        if drafted:
            original = (header.width, header.height)
            original = original[::-1] if header.swapped else original
        if profile is not None and of_cmyk is None:
            picture = to_srgb(picture, header.mode, profile)
        phash, pixels = perceptual_hash(picture), np.asarray(picture)
        del picture
        pixel_sha256 = pixel_hash(pixels)
        image, width, height, _, _, problem = self._resized(pixels)
        if problem is not None or not image:
            return Outcome("decode", f"resizing: {problem}"[:300])
        size = (width, height, *original)
        return Outcome("success", None, None, None, phash, *size, image, pixel_sha256)

    def _resized(self, pixels: Pixels) -> tuple[Any, ...]:
        """What img2dataset's `Resizer` makes of RGB pixels."""
        import cv2

        _HANDED.pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
        try:
            return self._resizer(io.BytesIO(b"pixels"))
        finally:
            del _HANDED.pixels


_HANDED = threading.local()
"""``pixels``, BGR: what this thread's `Resizer` decodes its stream to."""


class _Cv2:
    """cv2 for img2dataset's `Resizer`, which takes nothing but encoded files: decoding gives the
    pixels that this thread has handed over, if it has."""

    def __getattr__(self, name: str) -> Any:
        import cv2

        return getattr(cv2, name)

    @staticmethod
    def imdecode(data: Pixels, flags: int) -> Any:
        import cv2

        handed = getattr(_HANDED, "pixels", None)
        return cv2.imdecode(data, flags) if handed is None else handed


@lru_cache(maxsize=1)
def _resizer() -> Any:
    """img2dataset's module `resizer` without its package, which imports the whole command line with
    torch, pandas and wandb: four seconds, and 270 MiB of memory in a process without them."""
    package = importlib.util.find_spec("img2dataset")
    assert package is not None and package.submodule_search_locations
    file = Path(package.submodule_search_locations[0]) / "resizer.py"
    spec = importlib.util.spec_from_file_location("img2dataset_resizer", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Transforms(threading.local):
    """albumentations for `Resizer`, which makes its transforms anew for every image: half a
    millisecond each. Here a thread makes each once."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        import albumentations

        made: dict[str, Any] = {}

        def make(**options: Any) -> Any:
            key = repr(options)
            if key not in made:
                made[key] = getattr(albumentations, name)(**options)
            return made[key]

        setattr(self, name, make)
        return make


def _icon_pixels(data: bytes) -> int:
    """Pixels of the largest picture in an ICO file, by the pictures' own headers."""
    count = int.from_bytes(data[4:6], "little")
    most = 0
    for entry in range(6, 6 + 16 * count, 16):
        start = int.from_bytes(data[entry + 12 : entry + 16], "little")
        if data[start : start + 4] == b"\x89PNG":
            width, height = (int.from_bytes(data[start + at : start + at + 4]) for at in (16, 20))
        else:  # a bitmap's height counts its mask as well
            width, height = (
                abs(int.from_bytes(data[start + at : start + at + 4], "little", signed=True))
                for at in (4, 8)
            )
        most = max(most, width * height)
    return most


def _header(data: bytes, content_type: str) -> _Header | Outcome:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            profile = image.info.get("icc_profile")
            usable = isinstance(profile, bytes) and 0 < len(profile) <= _LARGEST_PROFILE
            swapped = image.format == "JPEG" and _swapped(image)
            header = _Header(
                image.format or "", image.mode, *image.size, swapped, profile if usable else None
            )
    except UnidentifiedImageError:
        kind = f" (content type {content_type[:60]})" if content_type else ""
        what = "an empty body" if not data else f"not one of {', '.join(FORMATS)}"
        return Outcome("not_an_image", what + kind)
    except Image.DecompressionBombError as error:
        return Outcome("too_large", str(error)[:300])
    return header


def _swapped(image: Image.Image) -> bool:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1)) in {5, 6, 7, 8}
    except Exception:  # noqa: BLE001 - a broken EXIF block says nothing
        return False


_SPACES = {"RGB ": {"RGB", "RGBA", "RGBX", "P", "PA"}, "CMYK": {"CMYK"}}
"""Colour space of an ICC profile → modes of the files that it can speak of; GRAY: all others."""


def to_srgb(picture: Image.Image, mode: str, profile: bytes) -> Image.Image:
    """An RGB picture with the colours of an ICC ``profile`` converted to sRGB.

    ``mode`` is the file's, ``picture`` RGB, or CMYK as the file is. A profile of another colour
    space than the file's, of one that is none of RGB, grey and CMYK, or a broken one says nothing:
    then colours are taken as sRGB, and CMYK is converted by Pillow.
    """
    try:
        transform, takes = _transform(profile, mode)
        if transform is not None:
            # A grey picture came as RGB of equal channels: converting it back loses nothing.
            source = picture if picture.mode == takes else picture.convert(takes)
            converted = ImageCms.applyTransform(source, transform)
            return picture if converted is None else converted
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        pass
    return picture if picture.mode == "RGB" else picture.convert("RGB")


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> tuple[Any, str]:
    """(transform to sRGB, mode that it takes); (None, "") where there is nothing to convert.

    The rendering is the perceptual one, which every profile has.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space
    spoken = next((name for name, modes in _SPACES.items() if mode in modes), "GRAY")
    if space != spoken:
        return None, ""
    if space == "RGB " and "sRGB" in (source.profile.profile_description or ""):
        return None, ""
    takes = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}[space]
    target = ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(source, target, takes, "RGB"), takes


def pixel_hash(pixels: Pixels) -> str:
    """sha256 of size and RGB pixels, in hex: equal for one picture in two lossless files."""
    height, width, _ = pixels.shape
    state = hashlib.sha256(repr(("RGB", (width, height))).encode())
    state.update(np.ascontiguousarray(pixels).data)
    return state.hexdigest()


def perceptual_hash(picture: Image.Image) -> str:
    """256-bit DCT hash of an RGB picture, 64 hex digits: which of the 16 x 16 lowest frequencies of
    64 x 64 grey pixels lie above their median, as `imagehash.phash` with ``hash_size=16`` has it.

    The grey pixels are made by box filter and then Lanczos, several times faster than by Lanczos
    alone; a bit or two may differ for it. So may those of symmetric graphics, whose frequencies are
    exactly zero: here they count as zero, not as what rounding left.
    """
    size = _FREQUENCIES.shape[1], _FREQUENCIES.shape[1]
    grey = picture.convert("L").resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    low = np.round(_FREQUENCIES @ np.asarray(grey, np.float64) @ _FREQUENCIES.T, 6)
    return np.packbits(low > np.median(low)).tobytes().hex()
