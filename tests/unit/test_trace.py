"""The Chrome trace of a run: its structure as viewers need it, and every record in it once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.records import Record
from pipeline.store import Store
from pipeline.trace import trace, write_trace
from stages.errors import UserError
from tests.run_folder import make_run

EVENT = {"pid": int, "tid": int, "ph": str, "name": str, "cat": str, "ts": int, "dur": int}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_run(str(tmp_path / "run"))


def made(store: Store, tmp_path: Path) -> tuple[list[dict[str, Any]], dict[tuple[int, int], str]]:
    """The events of a written trace, and the names of its tracks."""
    document = json.loads(write_trace(store, tmp_path / "trace.json").read_text())
    assert document["displayTimeUnit"] == "ms"
    assert document["otherData"]["run"] == store.url
    works = [e for e in document["traceEvents"] if e["ph"] == "X"]
    names = {
        (e["pid"], e["tid"]): e["args"]["name"]
        for e in document["traceEvents"]
        if e["name"] == "thread_name"
    }
    processes = {pid for pid, _ in names}
    assert len(works) + len(names) + len(processes) == len(document["traceEvents"])
    return works, names


def test_it_is_what_viewers_read(store: Store, tmp_path: Path) -> None:
    works, names = made(store, tmp_path)
    for event in works:
        assert {key: type(event[key]) for key in EVENT} == EVENT
        assert event["ts"] >= 0 and event["dur"] >= 0 and event["tid"] > 0
        assert (event["pid"], event["tid"]) in names
    assert min(event["ts"] for event in works) == 0
    for track in names:
        mine = [e for e in works if (e["pid"], e["tid"]) == track]
        ends = [e["ts"] + e["dur"] for e in mine]
        assert all(end <= e["ts"] for end, e in zip(ends, mine[1:], strict=False)), track


def test_a_shard_goes_through_its_stages(store: Store, tmp_path: Path) -> None:
    works, names = made(store, tmp_path)
    track = next(t for t, name in names.items() if name == "shard 000001")
    life = [(e["name"], e["cat"]) for e in works if (e["pid"], e["tid"]) == track]
    assert life == [
        ("sources", "run"),
        ("download", "run"),
        ("caption", "round 1"),
        ("filter", "round 1"),
        ("embed", "run"),
    ]
    caption = next(e for e in works if e["name"] == "caption" and e["args"]["shard"] == "000001")
    assert caption["args"]["rows"] == {"success": 2} and caption["dur"] == 1_000_000


def test_every_record_is_there(store: Store, tmp_path: Path) -> None:
    works, names = made(store, tmp_path)
    assert len(works) == len(store.record_names())
    assert {"round 0", "round 1"} < set(names.values())


def test_work_that_a_later_round_takes_over_is_shown_once() -> None:
    record = Record(
        stage="caption",
        stage_version=1,
        round=1,
        shard="000000",
        fingerprint="0" * 16,
        payloads=(),
        code_version="0",
        started=10.0,
        finished=12.5,
    )
    taken_over = record.model_copy(update={"round": 2})
    again = record.model_copy(update={"round": 2, "started": 20.0, "finished": 21.0})
    events = [e for e in trace([taken_over, again, record], "x")["traceEvents"] if e["ph"] == "X"]
    told = [(e["cat"], e["ts"], e["dur"], e["args"]["rounds"]) for e in events]
    assert told == [
        ("round 1", 0, 2_500_000, [1, 2]),
        ("round 2", 10_000_000, 1_000_000, [2]),
    ]


def test_secrets_in_the_address_of_a_source_are_masked() -> None:
    file = "https://me:hunter2@host.test/web.parquet?X-Amz-Signature=abcdef0123"
    ingest = Record(
        stage="ingest",
        stage_version=1,
        round=None,
        shard="file",
        fingerprint="0f",
        payloads=(),
        code_version="0",
        started=1.0,
        finished=2.0,
        details={"file": file},
    )
    told = json.dumps(trace([ingest], file))
    assert "host.test/web.parquet" in told
    assert "hunter2" not in told and "abcdef0123" not in told


def test_a_run_without_records_has_no_trace(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is published yet"):
        write_trace(Store(str(tmp_path)), tmp_path / "trace.json")


def test_a_place_that_cannot_be_written(store: Store, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trace: .* cannot be written"):
        write_trace(store, tmp_path / "none" / "trace.json")
