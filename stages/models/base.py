"""What captioner, matcher and embedder share: where they run, in which numbers, how many images
at once."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from stages.errors import ConfigError, out_of_memory
from stages.models.feeding import Batch, ahead, batched
from stages.models.linear import PackedLinear, can_pack, in_int8, with_linears
from stages.models.preprocessing import Preprocessing

M = TypeVar("M", bound=nn.Module)
R = TypeVar("R")

_GAIN = 1.05  # a batch twice as large must be so much faster an image, or growing stops
_SHARE = 0.8  # of the memory that may be had: real texts may be longer than the trial's
_MOST = 1024
_MOST_THREADS = 16


class InferenceModel:
    """Device, numbers and batch size of a model.

    ``dtype``: of the towers' weights and activations. ``int8``: linear layers of the towers in
    8-bit integers, see `in_int8`; on a CPU, with ``dtype`` float32. ``batch_size``: images at
    once. It halves where memory runs out, and nothing is lost. Raises `ConfigError` for ``int8``
    elsewhere.
    """

    preprocessing: Preprocessing
    tokens = 0
    """Text tokens written or read so far, without prompts and padding; `Embedder` counts none."""

    threads: int
    """Threads that resize images ahead of the model: one on a CPU, for a GPU 16 at most."""

    def __init__(
        self, device: str | torch.device, dtype: torch.dtype, batch_size: int, int8: bool
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.batch_size, self.int8 = batch_size, int8
        cpus = os.cpu_count() or 1
        self.threads = min(cpus, _MOST_THREADS) if self.device.type == "cuda" else 1
        if int8 and (self.device.type != "cpu" or dtype != torch.float32):
            raise ConfigError(
                f"int8 runs on a CPU over float32, not on {self.device} over {dtype}; "
                "use bfloat16 on a GPU"
            )
        if self.device.type == "cuda" and self.device.index is None:
            # What torch.cuda sets for a device, a share of its memory say, wants its number.
            self.device = torch.device("cuda", torch.cuda.current_device())

    def place(self, module: M) -> M:
        """``module`` on the device, in the model's numbers."""
        placed = module.to(self.device, self.dtype)
        if self.int8:
            return in_int8(placed)
        return with_linears(placed, PackedLinear) if can_pack(self.device, self.dtype) else placed

    def over(
        self, images: Sequence[Image.Image] | Tensor, run: Callable[[Tensor, slice], R]
    ) -> Iterator[R]:
        """``run(pixels, part)`` over all images, ``batch_size`` at a time, in order.

        ``pixels``: (B, 3, S, S) of the images ``part``, on the device in the model's dtype. Images
        are resized in threads and copied to a GPU ahead; a tensor is what `preprocessing` makes or
        takes.
        """
        for batch in self._fed(images):
            first, pixels = batch.rows[0], batch.pixels

            def part(at: slice, first: int = first, pixels: Tensor = pixels) -> R:
                # Before it is looked up in floats, an image is a quarter as large.
                ready = self.preprocessing(pixels[at].to(self.device)).to(self.dtype)
                return run(ready, slice(first + at.start, first + at.stop))

            yield from self.batches(len(pixels), part)

    def _fed(self, images: Sequence[Image.Image] | Tensor) -> Iterator[Batch]:
        if not isinstance(images, Tensor):
            own = _distinct(images)
            resized = ahead(self.preprocessing.resized, own, self.threads, self.batch_size)
            yield from batched(enumerate(resized), self.batch_size, self.device)
        elif len(images):
            yield Batch(list(range(len(images))), images)

    def batches(
        self,
        count: int,
        run: Callable[[slice], R],
        *,
        each: int = 1,
        cut: Callable[[int], int] | None = None,
    ) -> Iterator[R]:
        """``run`` over ``count`` items, ``each`` x ``batch_size`` at a time, in order.

        ``cut``: where a batch that starts at an item ends, if sooner than after so many.
        """
        start = 0
        while start < count:
            end = cut(start) if cut else min(start + each * self.batch_size, count)
            results: list[R] = []
            try:
                results.append(run(slice(start, end)))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or end - start <= each:
                    raise
                while each * self.batch_size >= end - start:  # a short batch must shrink too
                    self.batch_size //= 2
            if results:
                yield from results
                start = end
            else:
                self.release()  # only now: the exception held the failed batch's tensors

    def release(self) -> None:
        """Give back the memory that is kept for the next batch."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def grow(self, run: Callable[[int], object], share: float = 1.0) -> int:
        """Set ``batch_size`` to the best that this device takes, and return it.

        ``run(n)`` works on n images. On a GPU the size doubles until memory runs short, or until
        an image takes hardly less time than before. ``share`` of the whole GPU's memory is the
        most that this process may take, now and later. A CPU keeps the size that it starts from.
        """
        if self.device.type != "cuda":
            return self.batch_size
        free, total = torch.cuda.mem_get_info(self.device)
        most = _SHARE * min(free + torch.cuda.memory_reserved(self.device), share * total)
        torch.cuda.set_per_process_memory_fraction(most / total, self.device)
        best, rate = 1, 0.0
        size = self.batch_size
        torch.cuda.reset_peak_memory_stats(self.device)  # another model's is not this one's
        while size <= _MOST:
            self.batch_size = size
            now = self._rate(run, size)
            if self.batch_size < size:  # it halved itself
                best = max(best, self.batch_size) if rate else self.batch_size
                break
            if now < rate * _GAIN:
                break
            best, rate, size = size, now, 2 * size
            if torch.cuda.max_memory_reserved(self.device) > most / 2:
                break
        self.batch_size = best
        torch.cuda.set_per_process_memory_fraction(share, self.device)
        self.release()
        return best

    def _rate(self, run: Callable[[int], object], size: int) -> float:
        run(size)  # libraries and graphs set themselves up
        torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        run(size)
        torch.cuda.synchronize(self.device)
        return size / (time.perf_counter() - started)


def _distinct(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Copies in place of an image that comes again: two threads cannot read one lazy file."""
    seen: set[int] = set()
    found = []
    for image in images:
        found.append(image.copy() if id(image) in seen else image)
        seen.add(id(image))
    return found
