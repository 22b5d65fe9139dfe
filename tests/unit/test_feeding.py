"""Batches gathered and copied ahead of the model; CUDA's streams are stood in for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from stages.models import feeding
from stages.models.base import InferenceModel
from stages.models.feeding import Batch, Pixels, ahead, batched
from stages.models.preprocessing import Preprocessing
from tests.unit.test_matcher import random_images


class Stream:
    """Notes the order of what happens on it."""

    told: list[str]

    def __init__(self, device: object = None) -> None:
        pass

    def record_event(self) -> int:
        Stream.told.append("copied")
        return len(Stream.told)

    def wait_event(self, event: int) -> None:
        Stream.told.append("waited")


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Stream.told = []
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda side: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(feeding, "_pinned", lambda shape: torch.empty(shape, dtype=torch.uint8))


def numbered(count: int) -> Iterator[tuple[int, Pixels]]:
    for row in range(count):
        yield row, np.full((2, 2, 3), row, dtype=np.uint8)


def test_results_keep_their_order_and_errors_their_place() -> None:
    gate = threading.Event()

    def make(item: int) -> int:
        if item == 0:
            assert gate.wait(10)
        if item == 1:
            gate.set()
        return 12 // (3 - item)

    found = ahead(make, range(5), threads=2, most=2)
    assert [next(found) for _ in range(3)] == [4, 6, 12]
    with pytest.raises(ZeroDivisionError):
        next(found)


@pytest.mark.parametrize("count", [0, 1, 4, 11])
def test_a_gpu_gets_every_image_once(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "_moved", lambda pixels, device: pixels.clone())
    found = list(batched(numbered(count), 4, torch.device("cuda")))
    assert [row for batch in found for row in batch.rows] == list(range(count))
    assert all(batch.pixels[:, 0, 0, 0].tolist() == batch.rows for batch in found)
    assert [len(batch.rows) for batch in found[:-1]] == [4] * (len(found) - 1)


def test_the_next_batch_is_copied_before_the_model_gets_this_one() -> None:
    device = torch.device("cpu")
    batches = (Batch([n], torch.zeros(1, 2, 2, 3, dtype=torch.uint8)) for n in range(3))
    for batch in feeding._uploaded(batches, device):
        Stream.told.append(f"model {batch.rows[0]}")
    assert Stream.told == ["copied", "copied", "model 0", "copied", "model 1", "model 2"]


def test_what_a_gpu_has_no_room_for_the_model_copies_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(self: torch.Tensor, device: torch.device, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    images, copied = random_images(8), []
    model = InferenceModel("cpu", torch.float32, 8, int8=False)
    model.preprocessing = Preprocessing(size=8)
    expected = model.preprocessing(images)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "to", full)
        [batch] = feeding._uploaded(batched(resized(model, images), 8, model.device), model.device)
    monkeypatch.setattr(model, "_fed", lambda images: [batch])

    def run(pixels: torch.Tensor, part: slice) -> torch.Tensor:
        copied.append((part.start, part.stop))
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return pixels

    assert torch.equal(torch.cat(list(model.over(images, run))), expected)
    assert copied == [(0, 8), (0, 4), (0, 2), (2, 4), (4, 6), (6, 8)]


def resized(model: InferenceModel, images: list[object]) -> Iterator[tuple[int, Pixels]]:
    return enumerate(map(model.preprocessing.resized, images))


def test_an_error_of_another_kind_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "_moved", lambda pixels, device: pixels)

    def broken() -> Iterator[tuple[int, Pixels]]:
        yield from numbered(4)
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        list(batched(broken(), 4, torch.device("cuda")))


def test_pixels_are_those_of_whole_batches() -> None:
    """Images in threads, a tensor of bytes, and a tensor of floats come to the same."""
    images = random_images(7)
    model = InferenceModel("cpu", torch.float32, 3, int8=False)
    model.preprocessing, model.threads = Preprocessing(size=8), 3
    whole = model.preprocessing(images)
    levels = torch.from_numpy(np.stack([model.preprocessing.resized(i) for i in images]))
    for given in (images, whole, levels):
        parts: list[slice] = []

        def run(pixels: torch.Tensor, part: slice, parts: list[slice] = parts) -> torch.Tensor:
            parts.append(part)
            return pixels

        assert torch.equal(torch.cat(list(model.over(given, run))), whole)
        assert [(p.start, p.stop) for p in parts] == [(0, 3), (3, 6), (6, 7)]
    assert list(model.over([], lambda pixels, part: part)) == []
    assert list(model.over(whole[:0], lambda pixels, part: part)) == []
