"""Batches that halve where memory runs out, and batch sizes that grow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.cuda._utils import _get_device_index

from stages.errors import ConfigError, out_of_memory
from stages.models.base import InferenceModel
from stages.models.captioner import Captioner
from stages.models.config import GenerationConfig
from stages.models.linear import Int8Linear, PackedLinear, can_pack
from tests import tiny_models
from tests.unit.test_captioner import random_images


def model(batch_size: int) -> InferenceModel:
    return InferenceModel("cpu", torch.float32, batch_size, int8=False)


def no_memory() -> RuntimeError:
    """What torch really raises where the machine has no memory left."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.int8)
    return raised.value


def test_batches_halve_until_they_fit_and_nothing_is_lost() -> None:
    runs, tried = model(8), []

    def run(part: slice) -> list[int]:
        tried.append(part.stop - part.start)
        if tried[-1] > 3:
            raise no_memory()
        return list(range(part.start, part.stop))

    assert [item for batch in runs.batches(11, run) for item in batch] == list(range(11))
    assert tried == [8, 4, 2, 2, 2, 2, 2, 1]
    assert runs.batch_size == 2


def test_one_image_that_does_not_fit_is_an_error() -> None:
    runs = model(2)

    def run(part: slice) -> None:
        raise no_memory()

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        list(runs.batches(2, run))


def test_as_many_texts_as_an_image_has_that_do_not_fit_are_an_error() -> None:
    runs, tried = model(4), []

    def run(part: slice) -> None:
        tried.append(part.stop - part.start)
        raise MemoryError

    with pytest.raises(MemoryError):
        list(runs.batches(20, run, each=4))
    assert tried == [16, 8, 4] and runs.batch_size == 1


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    def run(part: slice) -> None:
        torch.zeros(2) @ torch.zeros(3)

    runs = model(4)
    with pytest.raises(RuntimeError):
        list(runs.batches(4, run))
    assert runs.batch_size == 4
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(MemoryError())
    assert out_of_memory(RuntimeError("CUDA error: out of memory\nCompile with"))
    assert not out_of_memory(RuntimeError("shapes"))


class Capture:
    """Ends as `torch.cuda.graph` does where what it captures fails."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("shapes"), False),
    ],
)
def test_a_lack_of_memory_is_told_from_what_it_leads_to(raised: Exception, expected: bool) -> None:
    with pytest.raises(RuntimeError, match="capture") as caught, Capture():
        raise raised
    assert out_of_memory(caught.value) == expected
    with pytest.raises(ValueError, match="twice") as again:
        raise ValueError("twice") from caught.value
    assert out_of_memory(again.value) == expected
    with pytest.raises(ValueError, match="apart") as apart:
        try:
            raise raised
        except type(raised):
            raise ValueError("apart") from None
    assert not out_of_memory(apart.value)


def test_a_short_batch_halves_the_size_no_further_than_it_must() -> None:
    runs, tried = model(16), []

    def run(part: slice) -> None:
        tried.append(part.stop - part.start)
        if tried[-1] > 16:
            raise no_memory()

    list(runs.batches(20, run, each=4))
    assert tried == [20, 16, 4] and runs.batch_size == 4


def test_a_cpu_keeps_the_size_it_starts_from() -> None:
    assert model(16).grow(lambda count: None) == 16


class Gpu:
    """What torch says of a GPU of 100 units, 10 of them taken by others; an image takes one."""

    free, total, weights = 88, 100, 2

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fast_until: int, fits: int = 10**6) -> None:
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
        self.model = InferenceModel("cuda", torch.float32, 4, int8=False)
        self.fast_until, self.fits, self.sizes, self.allowed = fast_until, fits, [], [1.0]
        self.before = 90  # at most, of another model that this process had
        patched = {
            "mem_get_info": lambda _: (self.free, self.total),
            "memory_reserved": lambda _: self.weights,
            "max_memory_reserved": lambda _: max(self.before, self.weights + max(self.sizes)),
            "reset_peak_memory_stats": self.forget,
            "set_per_process_memory_fraction": self.allow,
            "empty_cache": lambda: None,
        }
        for name, instead in patched.items():
            monkeypatch.setattr(torch.cuda, name, instead)
        monkeypatch.setattr(InferenceModel, "_rate", self.rate)

    def forget(self, _: object) -> None:
        self.before = 0

    def allow(self, most: float, device: torch.device) -> None:
        assert _get_device_index(device) == 3  # torch refuses a device without a number
        self.allowed.append(most)

    def rate(self, run: object, size: int) -> float:
        def fitting(part: slice) -> None:
            count = part.stop - part.start
            if count > self.fits or self.weights + count > self.allowed[-1] * self.total:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
            self.sizes.append(count)

        assert list(self.model.batches(size, fitting))
        return float(min(size, self.fast_until))


def test_growing_stops_where_speed_does(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, fast_until=8)
    assert gpu.model.grow(lambda count: None) == gpu.model.batch_size == 8
    assert gpu.sizes == [4, 8, 16]


def test_growing_stops_before_memory_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 % of the 90 units that are to be had: 64 images would take 66, and 128 are not tried."""
    gpu = Gpu(monkeypatch, fast_until=1000)
    assert gpu.model.grow(lambda count: None) == 64
    assert gpu.sizes == [4, 8, 16, 32, 64]
    assert gpu.allowed[1:] == [pytest.approx(0.72), 1.0]


def test_growing_takes_its_share_of_the_gpu_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, fast_until=1000)
    assert gpu.model.grow(lambda count: None, share=0.25) == 16
    assert gpu.sizes == [4, 8, 16]
    assert gpu.allowed[1:] == [pytest.approx(0.2), 0.25]
    tight = Gpu(monkeypatch, fast_until=1000)
    assert tight.model.grow(lambda count: None, share=0.05) == 2
    assert tight.weights + max(tight.sizes) <= 0.05 * tight.total


def test_growing_goes_on_from_the_half_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, fast_until=1000, fits=20)
    assert gpu.model.grow(lambda count: None) == 16
    assert gpu.sizes == [4, 8, 16, 16, 16]
    first = Gpu(monkeypatch, fast_until=1000, fits=3)
    assert first.model.grow(lambda count: None) == 2
    assert first.model.batch_size == 2


def test_a_captioner_that_runs_out_of_memory_gives_the_same_captions(tmp_path: Path) -> None:
    folder = tiny_models.save_blip(tiny_models.captioner_model(), tmp_path / "captioner")
    images, config = random_images(10), GenerationConfig(captions_per_image=2)
    expected = Captioner(folder, batch_size=3)(images, config=config)
    captioner = Captioner(folder, batch_size=6)
    vision = captioner.vision.forward

    def small_machine(pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 3:
            raise no_memory()
        return vision(pixels)

    captioner.vision.forward = small_machine
    assert captioner(images, config=config) == expected
    assert captioner.batch_size == 3


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("meta", torch.float32)])
def test_int8_elsewhere_is_refused(device: str, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match="int8 runs on a CPU over float32"):
        InferenceModel(device, dtype, 1, int8=True)


@pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.float32), reason="torch is built without oneDNN"
)
def test_linear_layers_are_packed_in_float32_alone() -> None:
    def kinds(dtype: torch.dtype, int8: bool) -> set[type]:
        runs = InferenceModel("cpu", dtype, 1, int8)
        return {type(part) for part in runs.place(nn.Sequential(nn.Linear(4, 4)))}

    assert kinds(torch.float32, int8=False) == {PackedLinear}
    assert kinds(torch.float32, int8=True) == {Int8Linear}
    assert kinds(torch.bfloat16, int8=False) == {nn.Linear}
