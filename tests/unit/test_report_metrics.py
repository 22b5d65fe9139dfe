from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest

from pipeline.report.collect import Metric, RoundFacts, read_facts
from pipeline.report.metrics import Row, Split, loss_charts, round_style, splits
from pipeline.status import Key
from tests.run_folder import make_run

HOSTILE = "<script>alert(1)</script>\u202e"


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> tuple[RoundFacts, ...]:
    return read_facts(make_run(str(tmp_path_factory.mktemp("run")))).rounds


def measured(rounds: tuple[RoundFacts, ...], *values: Mapping[Key, float]) -> list[RoundFacts]:
    """The rounds with these metrics, each over 40 items."""
    return [
        replace(facts, metrics={key: Metric(value, 40) for key, value in found.items()})
        for facts, found in zip(rounds, values, strict=True)
    ]


def row(split: Split, title: str) -> Row:
    return next(row for group in split.groups for row in group.rows if row.title == title)


def test_tables(rounds: tuple[RoundFacts, ...]) -> None:
    tr, wrong = ("test", "med", "tr_at_1"), ("truth", "data", "wrong_after")
    truth, test = splits(measured(rounds, {tr: 0.25, wrong: 0.5}, {tr: 0.75, wrong: 0.1}))
    assert (truth.name, test.name) == ("truth", "test")
    better = row(test, "TR@1")
    assert better.cells == ("25.0%", "75.0%") and (better.change, better.n) == ("+50.0 pp", "40")
    assert "own text is ranked first" in better.meaning
    assert [better.tone, row(truth, "Wrong texts after").tone] == ["good", "good"]
    assert [chart.title for chart in test.charts] == ["Text retrieval, TR@1"]
    assert [chart.title for chart in truth.charts] == ["Wrong texts"]


def test_a_figure_that_got_worse(rounds: tuple[RoundFacts, ...]) -> None:
    cider, wrong = ("test", "captioner", "cider"), ("truth", "data", "wrong_after")
    truth, test = splits(measured(rounds, {cider: 1.2, wrong: 0.1}, {cider: 0.9, wrong: 0.3}))
    assert row(truth, "Wrong texts after").tone == row(test, "CIDEr").tone == "bad"
    assert row(test, "CIDEr").change == "−0.300"


def test_figures_that_are_not_there(rounds: tuple[RoundFacts, ...]) -> None:
    auc, recall = ("test", "filter", "auc"), ("test", "filter", "recall")
    (test,) = splits(measured(rounds, {recall: 0.5}, {auc: 0.9, recall: math.nan}))
    assert row(test, "AUC").cells == ("–", "90.0%") and row(test, "AUC").change == ""
    assert row(test, "Recall").cells == ("50.0%", "–") and row(test, "Recall").change == ""
    assert test.charts == ()
    assert splits([]) == []


def test_a_raw_round_has_no_filter_and_no_clusters(rounds: tuple[RoundFacts, ...]) -> None:
    recall, found = ("truth", "data", "filter_recall"), ("truth", "data", "duplicates_found")
    (truth,) = splits(measured(rounds, {recall: 1.0, found: 0.0}, {recall: 0.7, found: 52.0}))
    assert row(truth, "Filter recall").cells == ("–", "70.0%")
    assert row(truth, "Duplicates found").cells == ("–", "52")


def test_without_a_test_probe_the_development_probe_is_drawn(
    rounds: tuple[RoundFacts, ...],
) -> None:
    key = ("dev", "med", "tr_at_1")
    (dev,) = splits(measured(rounds, {key: 0.2}, {key: 0.4}))
    assert dev.name == "dev" and len(dev.charts) == 1


def test_names_that_are_not_known(rounds: tuple[RoundFacts, ...]) -> None:
    key = (HOSTILE, HOSTILE, HOSTILE)
    (split,) = splits(measured(rounds, {key: 1.0}, {key: 2.0}))
    assert "\u202e" not in split.title + split.groups[0].title + split.groups[0].rows[0].title


def test_losses(rounds: tuple[RoundFacts, ...]) -> None:
    # Where the parts are known, the sum is not drawn.
    curve = [(1.0, 0.64), (2.0, 0.6)]
    parts = {("pretrain", "loss_itm"): curve, ("pretrain", "loss_lm"): curve}
    losses = parts | {("pretrain", "loss"): curve, ("finetune_filter", "loss"): curve}
    charts = loss_charts([replace(facts, losses=losses) for facts in rounds])
    titles = [chart.title for chart in charts]
    assert titles == ["Pretraining, ITM", "Pretraining, LM", "Filter, loss"]
    assert ["chance" in chart.svg for chart in charts] == [True, False, False]
    assert [name for _, name in charts[0].legend] == ["round 0", "round 1"]
    assert loss_charts([]) == []


def test_a_round_that_is_not_trained_yet(rounds: tuple[RoundFacts, ...]) -> None:
    (chart, *_) = loss_charts([rounds[0], replace(rounds[1], losses={})])
    assert [name for _, name in chart.legend] == ["round 0"]


def test_colours_of_rounds() -> None:
    assert round_style(0, 3) == ("raw", 1.0)
    strengths = [round_style(number, 4)[1] for number in (1, 2, 3)]
    assert strengths == sorted(strengths) and strengths[-1] == 1.0
