"""Pixels ahead of the model: made in threads, gathered into batches, copied to a GPU meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stages.errors import out_of_memory

T = TypeVar("T")
R = TypeVar("R")
Pixels = npt.NDArray[np.uint8]
"""(S, S, 3): what `Preprocessing.resized` makes of one image."""


@dataclass
class Batch:
    """Images for the model: their rows where they come from, and (B, S, S, 3) uint8."""

    rows: list[int]
    pixels: Tensor


def ahead(make: Callable[[T], R], items: Iterable[T], threads: int, most: int) -> Iterator[R]:
    """``make`` of each item, in order, in ``threads``; at most ``most`` results wait beside the
    one that is taken next."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def batched(
    images: Iterable[tuple[int, Pixels]], size: int, device: torch.device
) -> Iterator[Batch]:
    """(row, pixels) of every image, ``size`` at a time, in order, on ``device``. What a GPU has no
    memory for stays where it is, for the model to copy in smaller parts."""
    groups = _groups(images, size)
    if device.type != "cuda":
        return (Batch(rows, torch.from_numpy(np.stack(pixels))) for rows, pixels in groups)
    return _uploaded(_gathered(groups, size), device)


def _groups(
    images: Iterable[tuple[int, Pixels]], size: int
) -> Iterator[tuple[list[int], list[Pixels]]]:
    rows: list[int] = []
    group: list[Pixels] = []
    for row, pixels in images:
        rows.append(row)
        group.append(pixels)
        if len(rows) == size:
            yield rows, group
            rows, group = [], []
    if rows:
        yield rows, group


def _gathered(groups: Iterator[tuple[list[int], list[Pixels]]], size: int) -> Iterator[Batch]:
    """Each group in one page-locked buffer, the next one gathered while the model works.

    The thread only copies: a call to CUDA from it would break the capture of a graph.
    """
    first = next(groups, None)
    if first is None:
        return
    shape = size, *first[1][0].shape

    def fill(group: tuple[list[int], list[Pixels]] | None, buffer: Tensor) -> Batch | None:
        group = group or next(groups, None)
        if group is None:
            return None
        rows, pixels = group
        np.stack(pixels, out=buffer.numpy()[: len(rows)])
        return Batch(rows, buffer[: len(rows)])

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(fill, first, _pinned(shape))
        while (batch := coming.result()) is not None:
            coming = thread.submit(fill, None, _pinned(shape))
            yield batch


def _pinned(shape: tuple[int, ...]) -> Tensor:
    """torch keeps such buffers, and hands one out again when the copies out of it have ended."""
    try:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return torch.empty(shape, dtype=torch.uint8)


def _uploaded(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copies the next batch on a stream of its own while the model works on this one."""
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: tuple[Batch, torch.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(side):
            moved = Batch(batch.rows, _moved(batch.pixels, device))
            copied = side.record_event()
        if waiting is not None:
            yield _arrived(*waiting)
        waiting = moved, copied
    if waiting is not None:
        yield _arrived(*waiting)


def _moved(pixels: Tensor, device: torch.device) -> Tensor:
    try:
        return pixels.to(device, non_blocking=True)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return pixels


def _arrived(batch: Batch, copied: torch.Event) -> Batch:
    if batch.pixels.is_cuda:
        now = torch.cuda.current_stream(batch.pixels.device)
        now.wait_event(copied)
        # Its memory was made on the side stream, which must not reuse it while the model reads it.
        batch.pixels.record_stream(now)
    return batch
