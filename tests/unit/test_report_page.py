from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.report import page
from pipeline.report.collect import Clusters, Metric, RoundFacts, RunFacts, read_facts
from pipeline.report.safe import MASK
from pipeline.runfolder import read_rounds
from pipeline.store import Store
from tests.run_folder import make_run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_run(str(tmp_path / "my run"))


@pytest.fixture
def facts(store: Store) -> RunFacts:
    return read_facts(store)


def with_metrics(facts: RoundFacts, **values: float) -> RoundFacts:
    """A round with facts of the truth, and ``tr``, ``ir`` of MED on the test probe."""
    names = {"tr": ("test", "med", "tr_at_1"), "ir": ("test", "med", "ir_at_1")}
    found = {
        names.get(name, ("truth", "data", name)): Metric(value, 10)
        for name, value in values.items()
    }
    return replace(facts, metrics=found)


def test_the_head(facts: RunFacts) -> None:
    head = page.head(facts)
    told = dict(head.facts)
    assert head.title == "my run" and not head.complete and head.state == "next: round 2"
    assert told["Begun"] == "14 November 2023, 22:13 UTC" and told["Rounds done"] == "2 of 3"
    assert "capfilt" not in told


def test_an_address_with_a_password(facts: RunFacts) -> None:
    status = replace(facts.status, url="s3://me:hunter2@bucket/runs/big/")
    head = page.head(replace(facts, status=status))
    assert head.title == "big" and head.url == f"s3://{MASK}@bucket/runs/big/"


def test_headlines(facts: RunFacts) -> None:
    raw = with_metrics(facts.rounds[0], wrong_before=0.5, wrong_after=0.5, tr=0.22, ir=0.2)
    late = {"duplicates_found": 52, "duplicates_missed": 10}
    boot = with_metrics(facts.rounds[1], wrong_before=0.5, wrong_after=0.07, tr=0.9, ir=0.8, **late)
    boot = replace(boot, clusters=Clusters(357, 47, 41))
    wrong, recall, pairs, duplicates = page.headlines([raw, boot])
    assert (wrong.before, wrong.after, wrong.tone) == ("50.0%", "7.0%", "good")
    assert (recall.before, recall.after, recall.tone) == ("22.0%", "90.0%", "good")
    assert "20.0% → 80.0%" in recall.note
    assert pairs.after == "9" and pairs.note == "of 10: 3 web, 4 synthetic, 2 human"
    assert duplicates.after == "47" and "52 of 62 true duplicate pairs" in duplicates.note
    worse = with_metrics(facts.rounds[1], wrong_before=0.5, wrong_after=0.6, tr=0.1)
    assert [h.tone for h in page.headlines([raw, worse])[:2]] == ["bad", "bad"]


def test_headlines_of_a_raw_round(facts: RunFacts) -> None:
    raw = with_metrics(facts.rounds[0], wrong_before=0.5, wrong_after=0.5, tr=0.22)
    wrong, recall, pairs = page.headlines([raw])
    assert (wrong.before, wrong.after) == ("", "50.0%")
    assert (recall.before, recall.after) == ("", "22.0%")
    assert pairs.after == "6"
    assert page.headlines([]) == []


def test_headlines_of_a_round_that_trained_nothing(facts: RunFacts) -> None:
    """All texts rejected: the share of wrong ones is no number."""
    raw = with_metrics(facts.rounds[0], wrong_before=0.5)
    boot = with_metrics(facts.rounds[1], wrong_before=0.5, wrong_after=float("nan"))
    assert page.headlines([raw, boot])[0].after == "50.0%"


def test_verdicts(facts: RunFacts) -> None:
    first = facts.rounds[0]
    verdict = {"promoted": False, "metric": "cider", "new": 0.8, "old": 1.0, "items": 300}
    verdict |= {"low": -0.3, "high": -0.1, "difference": -0.2, "reason": "not promoted: worse"}
    status = replace(first.status, verdicts={"captioner": verdict, "filter": {"promoted": True}})
    captioner, filter_ = page.verdicts([replace(first, status=status)])
    assert (captioner.old, captioner.new, captioner.items) == ("1.000", "0.800", "300")
    assert captioner.interval == "−0.200 [−0.300, −0.100]" and not captioner.promoted
    assert 'class="bad"' in captioner.svg
    assert filter_.promoted and filter_.svg == "" and filter_.new == ""


def test_times(store: Store, facts: RunFacts) -> None:
    found = {stage.name: stage.cells for stage in page.times(facts.rounds)}
    assert found["download"] == ("3.0 s", "as before")
    assert found["caption"] == ("", "2.0 s")
    store.remove(read_rounds(store)[1].records["caption"][0])
    found = {stage.name: stage.cells for stage in page.times(read_facts(store).rounds)}
    assert found["caption"] == ("", "1 of 2")


def test_settings() -> None:
    config = {
        "sources": [{"path": "a.parquet"}, {"path": "b.parquet"}],
        "caption": {"model": None, "generation": {"method": "nucleus"}},
        "select": {"threshold": 0.5},
        "dev": None,
    }
    found = dict(page.settings(config))
    assert found["Sources"] == "a.parquet, b.parquet"
    assert found["First captioner"] == "pretrained in round 0"
    assert found["Threshold, web texts"] == "0.5" and "Development probe" not in found
    assert page.settings({}) == []


def test_the_whole_config() -> None:
    text = page.whole_config({"a": {"b": "x\u202ey\x1b"}, "c": [1, "ü"]})
    assert text.splitlines()[0] == "a:" and text.splitlines()[1].startswith("  b: ")
    assert "\u202e" not in text and "\x1b" not in text and "ü" in text
    assert page.whole_config({}) == ""
