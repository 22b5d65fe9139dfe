"""Learning rates and alpha, value for value those of the original's formulas."""

import math

import pytest

from stages.training.schedule import Schedule

PAPER = Schedule(
    steps=100_000,
    steps_per_epoch=5000,
    lr=3e-4,
    min_lr=1e-6,
    warmup_lr=1e-6,
    warmup_steps=3000,
    decay="step",
    decay_rate=0.9,
    alpha=0.4,
    alpha_epochs=2,
)


def test_warmup_is_linear_from_its_start() -> None:
    assert PAPER.lr_at(0) == pytest.approx(1e-6)
    assert PAPER.lr_at(1500) == pytest.approx((1e-6 + 3e-4) / 2)
    assert PAPER.lr_at(3000) == pytest.approx(3e-4)


def test_step_decay_moves_once_an_epoch_and_stops_at_its_floor() -> None:
    assert PAPER.lr_at(4999) == pytest.approx(3e-4)
    assert PAPER.lr_at(5000) == PAPER.lr_at(9999) == pytest.approx(3e-4 * 0.9)
    assert PAPER.lr_at(99_999) == pytest.approx(3e-4 * 0.9**19)
    assert PAPER.lr_at(5000 * 200) == 1e-6


def test_alpha_ramps_over_its_epochs() -> None:
    assert PAPER.alpha_at(0) == 0
    assert PAPER.alpha_at(5000) == pytest.approx(0.2)
    assert PAPER.alpha_at(10_000) == PAPER.alpha_at(70_000) == pytest.approx(0.4)


def schedule(**changes: object) -> Schedule:
    return Schedule(**{**vars(PAPER), "warmup_steps": 0, **changes})  # type: ignore[arg-type]


def test_cosine_reaches_its_floor_at_the_end() -> None:
    cosine = schedule(decay="cosine", min_lr=1e-5)
    assert cosine.lr_at(0) == pytest.approx(3e-4)
    assert cosine.lr_at(50_000) == pytest.approx((3e-4 + 1e-5) / 2)
    assert cosine.lr_at(100_000) == pytest.approx(1e-5)


def test_epoch_cosine_is_constant_within_an_epoch() -> None:
    cosine = schedule(decay="epoch_cosine", min_lr=0.0, steps=25_000)
    for epoch in range(5):
        expected = 3e-4 * 0.5 * (1 + math.cos(math.pi * epoch / 5))
        assert cosine.lr_at(epoch * 5000) == pytest.approx(expected)
        assert cosine.lr_at(epoch * 5000 + 4999) == pytest.approx(expected)


def test_without_a_ramp_alpha_is_constant() -> None:
    assert schedule(alpha_epochs=0).alpha_at(0) == 0.4


@pytest.mark.parametrize(("pairs", "batch"), [(566_747, 256), (1000, 10), (7, 256)])
def test_epoch_cosine_counts_the_epochs_that_begin(pairs: int, batch: int) -> None:
    """Where batches do not divide the pairs, the last one reaches into an epoch more (COCO)."""
    per_epoch, epochs = pairs / batch, 5
    steps = math.ceil(epochs * per_epoch)
    cosine = schedule(
        decay="epoch_cosine", lr=1.0, min_lr=0.0, steps=steps, steps_per_epoch=per_epoch
    )
    factors = sorted({round(cosine.lr_at(step), 3) for step in range(steps)}, reverse=True)
    assert factors == ([1.0] if steps == 1 else [1.0, 0.905, 0.655, 0.345, 0.095])


def test_epoch_cosine_of_a_part_of_an_epoch_is_constant() -> None:
    cosine = schedule(decay="epoch_cosine", min_lr=0.0, steps=100)
    assert cosine.lr_at(0) == cosine.lr_at(99) == 3e-4
