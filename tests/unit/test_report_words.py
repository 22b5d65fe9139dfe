from __future__ import annotations

import math

import pytest

from pipeline.ledger import ROW_STATES
from pipeline.report.words import METRICS, STAGES, STATES, change, figure, word
from pipeline.runfolder import STAGES as ORDER
from stages.scenes.audit import duplicate_facts, text_facts
from stages.scenes.world import TRUTH
from stages.schemas import PAIR_STATES, PAIRS
from tests.tables import filled


def test_every_state_and_stage_has_its_words() -> None:
    assert {*ROW_STATES, *PAIR_STATES} <= STATES.keys()
    assert set(ORDER) - {"sources"} == STAGES.keys()


def test_every_fact_of_the_sample_world_has_its_words() -> None:
    truth = filled(TRUTH, [])
    pairs = filled(PAIRS, [])
    facts = [*text_facts({}, pairs), *duplicate_facts(truth, pairs.select(["url", "cluster_id"]))]
    assert {fact.metric for fact in facts} <= METRICS.keys()


def test_a_metric_that_is_not_known() -> None:
    assert word("spice").title == "spice" and word("spice").better == 0


@pytest.mark.parametrize(
    ("value", "kind", "shown"),
    [
        (0.4931, "share", "49.3%"),
        (1234.0, "count", "1,234"),
        (0.98549, "number", "0.985"),
        (None, "share", ""),
        (math.nan, "share", "–"),
        (math.inf, "count", "–"),
    ],
)
def test_figures(value: float | None, kind: str, shown: str) -> None:
    assert figure(value, kind) == shown  # type: ignore[arg-type]


def test_changes() -> None:
    assert change(0.5, 0.073, "share") == "−42.7 pp"
    assert change(0.5, 0.5, "share") == "±0.0 pp"
    assert change(0.1, 0.35, "number") == "+0.250"
    assert change(60, 10, "count") == "−50"
