"""The gate: does a round's new captioner or filter replace the one that the loop works with?

It decides on the development probe alone; the test probe's rows are dropped unread.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from stages.base import Config
from stages.errors import RunError

DEV = "dev"

Values = npt.NDArray[np.float64]


class GateConfig(Config):
    """What decides, and how sure it must be. Metrics are those of outcomes.parquet."""

    captioner_metric: Literal["cider"] = "cider"
    filter_metric: Literal["auc", "auc_near", "auc_other", "tr_at_1", "ir_at_1"] = "auc"
    confidence: float = Field(0.95, gt=0, lt=1)
    resamples: int = Field(1000, ge=1)
    tolerance: float = Field(0.0, ge=0)
    """How much worse a new model may be, in units of its metric."""


class Verdict(Config):
    """The gate's word on one model."""

    promoted: bool
    metric: str
    new: float | None
    """Mean of the metric on the development probe; None where it was not measured."""
    old: float | None
    difference: float | None
    low: float | None
    """Ends of the bootstrap interval of the difference new - old."""
    high: float | None
    items: int
    """Probe images that both models were measured on."""
    reason: str


class Decision(Config):
    """The gate's word on both models of a round."""

    captioner: Verdict
    filter: Verdict


def decide(new: pa.Table, old: pa.Table | None, config: GateConfig, seed: int) -> Decision:
    """Promote each model unless it is measurably worse than the one before.

    ``new`` and ``old`` are outcomes (`stages.evaluate.OUTCOMES`) on the same probes; ``old`` is
    None where there is no model yet. A model stays behind only if the whole interval of
    new - old, a paired bootstrap over probe images, lies below -tolerance: the paper's loop
    replaces its models every round, so the doubt speaks for the new one. A model without
    outcomes on the development probe is promoted, and the reason says so.

    Raises:
        RunError: both were measured, but not on the same items.
    """
    return Decision(
        captioner=_verdict("captioner", config.captioner_metric, new, old, config, seed),
        filter=_verdict("filter", config.filter_metric, new, old, config, seed),
    )


def paired_interval(
    differences: Values, confidence: float, resamples: int, seed: int
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of (N,) paired differences (Efron 1979)."""
    generator = np.random.Generator(np.random.Philox(seed))
    means = np.empty(resamples)
    for index in range(resamples):
        means[index] = differences[generator.integers(0, len(differences), len(differences))].mean()
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _verdict(
    model: str, metric: str, new: pa.Table, old: pa.Table | None, config: GateConfig, seed: int
) -> Verdict:
    ours = _values(new, model, metric)
    theirs = _values(old, model, metric) if old is not None else {}
    if not ours or not theirs:
        reason = "no earlier model" if old is None else f"no {metric} on the development probe"
        return Verdict(
            promoted=True,
            metric=metric,
            new=_mean(ours),
            old=_mean(theirs),
            difference=None,
            low=None,
            high=None,
            items=len(ours),
            reason=f"promoted: {reason} to compare with",
        )
    if ours.keys() != theirs.keys():
        odd = min(ours.keys() ^ theirs.keys())
        raise RunError(
            f"gate: the two {model}s were not measured on the same development probe: item "
            f"{odd!r} is in one only; evaluate the older model again"
        )
    return _compare(model, metric, ours, theirs, config, seed)


def _compare(
    model: str,
    metric: str,
    ours: dict[str, float],
    theirs: dict[str, float],
    config: GateConfig,
    seed: int,
) -> Verdict:
    items = sorted(ours)
    differences = np.array([ours[item] - theirs[item] for item in items])
    low, high = paired_interval(differences, config.confidence, config.resamples, seed)
    promoted = high >= -config.tolerance
    share = f"{config.confidence:.0%} interval [{low:+.4f}, {high:+.4f}]"
    reason = (
        f"{'promoted' if promoted else 'not promoted'}: {metric} {_mean(ours):.4f} against "
        f"{_mean(theirs):.4f}, {share} of the difference on {len(items)} images"
        f"{'' if promoted else f', all of it below {-config.tolerance:g}'}"
    )
    return Verdict(
        promoted=promoted,
        metric=metric,
        new=_mean(ours),
        old=_mean(theirs),
        difference=float(differences.mean()),
        low=low,
        high=high,
        items=len(items),
        reason=reason,
    )


def _values(outcomes: pa.Table, model: str, metric: str) -> dict[str, float]:
    mask = pc.and_(pc.equal(outcomes["split"], DEV), pc.equal(outcomes["model"], model))
    rows = outcomes.filter(pc.and_(mask, pc.equal(outcomes["metric"], metric)))
    return dict(zip(rows["item"].to_pylist(), rows["value"].to_pylist(), strict=True))


def _mean(values: dict[str, float]) -> float | None:
    return float(np.mean(list(values.values()))) if values else None
