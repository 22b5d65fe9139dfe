from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.lease import held
from pipeline.runfolder import read_rounds
from pipeline.status import Figures, print_figures, print_status, read_figures, read_status
from pipeline.store import Store
from pipeline.terminal import console
from stages.errors import StoreError
from tests.run_folder import make_run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_run(str(tmp_path / "run"))


def shown(store: Store) -> list[str]:
    out = io.StringIO()
    print_status(read_status(store), console(out))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in out.getvalue()
    return [line.rstrip() for line in lines]


def forget(store: Store, round_: int, *stages: str) -> None:
    """Take back what a round published of some stages."""
    for found in read_rounds(store):
        if found.number == round_:
            for stage in stages:
                for name in found.records[stage]:
                    store.remove(name)


def test_a_finished_round(store: Store) -> None:
    status = read_status(store)
    assert [round_.complete for round_ in status.rounds] == [True, True]
    first, second = status.rounds
    download = first.stages[0]
    assert (download.name, download.done, download.total) == ("download", 3, 3)
    assert download.counts == {"success": 6, "duplicate_row": 1, "http_4xx": 1}
    assert download.seconds == 3.0 and not download.reused
    assert second.stages[0].reused
    assert second.metrics["truth", "data", "wrong_after"] == pytest.approx(0.1)
    assert second.pairs["web", "rejected"] == 1
    assert second.verdicts["captioner"]["promoted"] is True
    assert status.next == "round 2"


def test_what_it_looks_like(store: Store) -> None:
    lines = shown(store)
    assert "begun 2023-11-14 22:13 UTC, 2 of 3 rounds done" in lines[:3]
    assert any(re.match(r"download +3/3 +3\.0 s +8: 6 success, 1 duplicate_row", x) for x in lines)
    assert any(re.match(r"download +3/3 +as before$", line) for line in lines)
    assert "next: round 2" in lines
    assert any(re.match(r"web rejected +1$", line) for line in lines)
    assert any(re.match(r"test med tr_at_1 +0\.250 +0\.750$", line) for line in lines)
    assert any(re.match(r"truth data wrong_after +0\.500 +0\.100$", line) for line in lines)


@pytest.mark.parametrize(
    ("stages", "following"),
    [
        (("gate",), "round 1, gate"),
        (("gate", "evaluate"), "round 1, evaluate"),
        (("gate", "filter"), "round 1, filter, 2 of 2 shards left"),
    ],
)
def test_what_is_next(store: Store, stages: tuple[str, ...], following: str) -> None:
    forget(store, 1, *stages)
    status = read_status(store)
    assert not status.rounds[1].complete
    assert status.next == following
    assert f"next: {following}" in shown(store)


def test_the_gate_is_planned_only_when_it_is_its_turn(store: Store) -> None:
    plan = store.read_json("round=01/plan.json")
    forget(store, 1, "gate")
    del plan["records"]["gate"]
    store.write_json("round=01/plan.json", plan)
    assert read_status(store).next == "round 1, gate"


def test_one_shard_of_two(store: Store) -> None:
    store.remove(read_rounds(store)[1].records["caption"][1])
    stage = next(s for s in read_status(store).rounds[1].stages if s.name == "caption")
    assert (stage.done, stage.total, stage.seconds) == (1, 2, 1.0)
    assert stage.counts == {"success": 2}


def test_a_run_that_is_done(store: Store) -> None:
    run = store.read_json("run.json")
    run["config"]["rounds"]["count"] = 1
    store.write_json("run.json", run)
    assert read_status(store).next == "nothing; all rounds are done"
    assert any(line.endswith("2 of 2 rounds done") for line in shown(store))


def test_time_between_two_tries_does_not_count(store: Store) -> None:
    name = read_rounds(store)[1].records["caption"][1]
    record = store.read_record(name)
    store.remove(name)
    store.publish(record.model_copy(update={"started": 1.8e9, "finished": 1.8e9 + 4}))
    stage = next(s for s in read_status(store).rounds[1].stages if s.name == "caption")
    assert stage.seconds == pytest.approx(5.0)


def test_figures_are_read_without_the_records_of_shards(store: Store) -> None:
    whole = read_status(store).rounds
    for record in store.record_names():
        if not any(f"stage={stage}/" in record for stage in ("ledger", "evaluate", "audit")):
            Path(store.path(record)).write_text("{")
    figures = read_figures(store)
    assert [(f.number, f.metrics, f.pairs) for f in figures] == [
        (r.number, r.metrics, r.pairs) for r in whole
    ]
    assert figures[1].pairs and figures[1].metrics


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_json("run.json", {"config": {"rounds": {"count": 2}}, "created": 0.0})
    status = read_status(store)
    assert status.rounds == () and status.next == "round 0"
    out = io.StringIO()
    print_figures(status.rounds, console(out))
    assert out.getvalue() == ""
    assert any(line.endswith("0 of 3 rounds done") for line in shown(store))


def test_released_models_are_only_measured_in_round_0(store: Store) -> None:
    plan = store.read_json("round=00/plan.json")
    records = {"evaluate": plan["records"]["evaluate"]}
    store.write_json("round=00/plan.json", {"round": 0, "shards": {}, "records": records})
    assert read_status(store).rounds[0].complete


@pytest.mark.parametrize(("count", "shown"), [(6, range(6)), (28, (0, 23, 24, 25, 26, 27))])
def test_the_figures_of_many_rounds_fit(count: int, shown: Sequence[int]) -> None:
    """Of 28 rounds, a column each would be a digit wide."""
    states = [("synthetic", state) for state in ("contaminated", "kept", "quarantined")]
    metrics = [("test", "captioner", "cider"), ("truth", "filter", "precision_synthetic")]
    rounds = [
        Figures(
            number,
            dict.fromkeys(metrics, 0.5 + number / 1000),
            dict.fromkeys(states, 4_000_000 + number),
        )
        for number in range(count)
    ]
    out = io.StringIO()
    print_figures(rounds, console(out))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 100
    heading = f"pairs {' '.join(f'round {number}' for number in shown)}"
    heading = heading if count == 6 else heading.replace("round 0", "round 0 …")
    assert [" ".join(line.split()) for line in lines if "round" in line] == [
        heading,
        heading.replace("pairs", "metric"),
    ]
    numbers = " ".join(f"{4_000_000 + number:,}" for number in shown)
    said = [" ".join(line.split()) for line in lines]
    assert f"synthetic contaminated {numbers}" in said
    assert f"test captioner cider {' '.join(f'{0.5 + n / 1000:.3f}' for n in shown)}" in said


def test_a_damaged_record_is_one_line(store: Store) -> None:
    name = read_rounds(store)[1].records["caption"][0]
    Path(store.path(name)).write_text("{")
    with pytest.raises(StoreError, match="is not a record"):
        read_status(store)


def test_a_run_that_is_held_names_its_driver(store: Store) -> None:
    with held(store, print):
        assert f"driver: process {os.getpid()} on " in shown(store)[2]
    assert not any(line.startswith("driver:") for line in shown(store))
