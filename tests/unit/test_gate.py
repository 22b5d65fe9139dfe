"""The gate's word on better, equal, worse and unknown models."""

import numpy as np
import pyarrow as pa
import pytest

from stages.errors import RunError
from stages.gate import GateConfig, decide, paired_interval
from stages.schemas import OUTCOMES

ITEMS = 200


def outcomes(
    cider: float, auc: float, seed: int, split: str = "dev", items: int = ITEMS
) -> pa.Table:
    """Noisy values around the given means; the noise of an item is common to all models."""
    hard = np.random.default_rng(0).normal(0, 1.0, items)
    own = np.random.default_rng(seed).normal(0, 0.1, (2, items))
    rows = [
        {"split": split, "model": model, "metric": metric, "item": f"{i}.png", "value": value}
        for model, metric, values in (
            ("captioner", "cider", cider + hard + own[0]),
            ("filter", "auc", auc + hard / 10 + own[1]),
        )
        for i, value in enumerate(values)
    ]
    return pa.Table.from_pylist(rows, schema=OUTCOMES)


def test_the_first_models_are_promoted() -> None:
    decision = decide(outcomes(1.0, 0.9, 1), None, GateConfig(), seed=0)
    assert decision.captioner.promoted and decision.filter.promoted
    assert "no earlier model" in decision.filter.reason
    assert decision.captioner.low is None


def test_each_model_is_judged_by_itself() -> None:
    old, new = outcomes(1.0, 0.8, 1), outcomes(0.9, 0.9, 2)
    decision = decide(new, old, GateConfig(), seed=0)
    assert not decision.captioner.promoted
    assert decision.captioner.high is not None and decision.captioner.high < 0
    assert "not promoted" in decision.captioner.reason
    assert decision.filter.promoted
    assert decision.filter.low is not None and decision.filter.low > 0


def test_doubt_speaks_for_the_new_model() -> None:
    decision = decide(outcomes(1.0, 0.9, 2), outcomes(1.001, 0.9, 1), GateConfig(), seed=0)
    low, high = decision.captioner.low, decision.captioner.high
    assert low is not None and high is not None and low < 0 < high
    assert decision.captioner.promoted


def test_tolerance_lets_a_worse_model_pass() -> None:
    old, new = outcomes(1.0, 0.9, 1), outcomes(0.9, 0.9, 2)
    assert decide(new, old, GateConfig(tolerance=0.2), seed=0).captioner.promoted


def test_the_test_probe_is_not_looked_at() -> None:
    old, new = outcomes(1.0, 0.9, 1), outcomes(1.0, 0.9, 2)
    worse = outcomes(0.0, 0.0, 3, split="test")
    plain = decide(new, old, GateConfig(), seed=0)
    assert decide(pa.concat_tables([new, worse]), old, GateConfig(), seed=0) == plain
    alone = decide(worse, old, GateConfig(), seed=0)
    assert (
        alone.captioner.promoted and "no cider on the development probe" in alone.captioner.reason
    )


def test_other_probes_cannot_be_compared() -> None:
    with pytest.raises(RunError, match="not measured on the same"):
        decide(outcomes(1, 0.9, 1), outcomes(1, 0.9, 2, items=ITEMS - 1), GateConfig(), seed=0)


def test_the_decision_hangs_on_the_seed_alone() -> None:
    old, new = outcomes(1.0, 0.9, 1), outcomes(1.01, 0.9, 2)
    assert decide(new, old, GateConfig(), seed=3) == decide(new, old, GateConfig(), seed=3)
    other = decide(new, old, GateConfig(), seed=4)
    assert other.captioner.low != decide(new, old, GateConfig(), seed=3).captioner.low


def test_the_interval_covers_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        low, high = paired_interval(random.normal(0.3, 1.0, 80), 0.9, 300, seed=trial)
        covered += low <= 0.3 <= high
    assert 0.82 < covered / 200 < 0.96
