"""What captioner, matcher and embedder share: where they run, in which numbers, how many images
at once."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import nn

from stages.errors import ConfigError
from stages.models.linear import Int8Linear, PackedLinear, can_pack, with_linears
from stages.models.preprocessing import Preprocessing

M = TypeVar("M", bound=nn.Module)
R = TypeVar("R")

_GAIN = 1.05  # a batch twice as large must be so much faster an image, or growing stops
_SHARE = 0.8  # of the memory that was free: real texts may be longer than the trial's
_MOST = 1024
_NO_MEMORY = (  # of what does not go through torch's allocator for GPUs
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",  # pinned memory and graphs
)


class InferenceModel:
    """Device, numbers and batch size of a model.

    ``dtype``: of weights and activations. ``int8``: linear layers of the towers in 8-bit integers,
    see `Int8Linear`; on a CPU, with ``dtype`` float32. ``batch_size``: images at once. It halves
    where memory runs out, and nothing is lost. Raises `ConfigError` for ``int8`` elsewhere.
    """

    preprocessing: Preprocessing
    tokens = 0
    """Text tokens written or read so far, prompts and padding left out."""

    def __init__(
        self, device: str | torch.device, dtype: torch.dtype, batch_size: int, int8: bool
    ) -> None:
        self.device, self.dtype = torch.device(device), dtype
        self.batch_size, self.int8 = batch_size, int8
        if int8 and (self.device.type != "cpu" or dtype != torch.float32):
            raise ConfigError(
                f"int8 runs on a CPU over float32, not on {self.device} over {dtype}; "
                "use bfloat16 on a GPU"
            )

    def place(self, module: M) -> M:
        """``module`` on the device, in the model's numbers."""
        placed = module.to(self.device, self.dtype)
        if self.int8:
            return with_linears(placed, Int8Linear)
        return with_linears(placed, PackedLinear) if can_pack(self.device, self.dtype) else placed

    def batches(self, count: int, run: Callable[[slice], R]) -> Iterator[R]:
        """``run`` over ``count`` items, ``batch_size`` at a time, in order."""
        start = 0
        while start < count:
            end = min(start + self.batch_size, count)
            results: list[R] = []
            try:
                results.append(run(slice(start, end)))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or end - start == 1:
                    raise
                self.batch_size = (end - start) // 2
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

    def grow(self, run: Callable[[int], object]) -> int:
        """Set ``batch_size`` to the best that this device takes, and return it.

        ``run(n)`` works on n images. On a GPU the size doubles until memory runs short, or until
        an image takes hardly less time than before. A CPU gains nothing from larger batches than
        those it starts from.
        """
        if self.device.type != "cuda":
            return self.batch_size
        best, rate = 1, 0.0
        size = self.batch_size
        free = torch.cuda.mem_get_info(self.device)[0]
        while size <= _MOST:
            self.batch_size = size
            now = self._rate(run, size)
            if self.batch_size < size:  # it halved itself
                best = max(best, self.batch_size) if rate else self.batch_size
                break
            if now < rate * _GAIN:
                break
            best, rate, size = size, now, 2 * size
            if torch.cuda.max_memory_reserved(self.device) > _SHARE / 2 * free:
                break
        self.batch_size = best
        self.release()
        return best

    def _rate(self, run: Callable[[int], object], size: int) -> float:
        run(size)  # libraries and graphs set themselves up
        torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        run(size)
        torch.cuda.synchronize(self.device)
        return size / (time.perf_counter() - started)


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that a GPU's or the machine's memory is used up."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and any(told in message for told in _NO_MEMORY)
