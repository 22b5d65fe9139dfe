"""RGB images to the tensors that vision towers read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from stages.base import Config
from stages.models.images import upright_rgb

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_LONGEST = 32  # aspect ratio from which a crop is cut out before resizing


class Preprocessing(Config):
    """How a vision tower wants its images, as its folder's image processor config says.

    ``shortest_edge``: the whole image is squeezed into the square where None (BLIP); otherwise it
    is scaled until its shorter edge has that many pixels and the centre is cut out (CLIP).

    Equal to transformers' `BlipImageProcessorPil` and `CLIPImageProcessorPil`: one table look-up
    replaces their rescaling and normalising.
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
        """(B, 3, size, size) float32, on the images' device; a tensor is either what `resized`
        makes, a row an image, or the result already, which is returned."""
        if not isinstance(images, Tensor):
            pixels = np.empty((len(images), self.size, self.size, 3), dtype=np.uint8)
            for index, image in enumerate(images):
                pixels[index] = self.resized(image)
            images = torch.from_numpy(pixels)
        return _normalised(images, self.mean, self.std) if images.dtype == torch.uint8 else images

    def resized(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """(size, size, 3) uint8 of an image of any mode, upright as its EXIF says: all that takes
        long, a quarter of the bytes. Threads may call it at once, each with an image of its own:
        PIL opens lazily, and two cannot read one file."""
        rgb = upright_rgb(image)
        return np.asarray(_resized(rgb, self.size, self.shortest_edge, self.resample))


def _normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(B, S, S, 3) uint8 to (B, 3, S, S) float32, equal on every device: a look-up has no
    rounding."""
    table = torch.from_numpy(_table(mean, std)).to(pixels.device)
    batch, height, width, _ = pixels.shape
    result = table.new_empty(batch, 3, height, width)
    for channel in range(3):
        levels = pixels[..., channel].flatten().int()
        result[:, channel] = table[channel].index_select(0, levels).view(batch, height, width)
    return result


@lru_cache(maxsize=16)
def _table(mean: tuple[float, ...], std: tuple[float, ...]) -> npt.NDArray[np.float32]:
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
        # resized. Bytes may differ from transformers' by roundings here, and only here; and where
        # the image is smaller than the crop, it is stretched, not set into black.
        left, top = max((new_width - size) / 2, 0), max((new_height - size) / 2, 0)
        across, down = width / new_width, height / new_height
        right, bottom = min((left + size) * across, width), min((top + size) * down, height)
        box = (left * across, top * down, right, bottom)
        return image.resize((size, size), resample, box=box)
    # Where the crop reaches beyond the image, PIL's crop gives the same black borders.
    left, top = (new_width - size) // 2, (new_height - size) // 2
    whole = image.resize((new_width, new_height), resample)
    return whole.crop((left, top, left + size, top + size))
