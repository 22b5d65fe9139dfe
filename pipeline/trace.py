"""The life of every shard as a Chrome trace, from records alone: for Perfetto or chrome://tracing.

One track a shard, its stages one after the other; one track for the whole-round stages of each
round; one for the source files that were cut.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.records import Record
from pipeline.report.safe import masked, masked_tree
from pipeline.runfolder import write_output
from pipeline.store import Store
from stages.errors import UserError

Event = dict[str, Any]

_SHARDS, _ROUNDS, _FILES = 1, 2, 3
_PROCESSES = {_SHARDS: "shards", _ROUNDS: "whole rounds", _FILES: "source files"}


def write_trace(store: Store, output: Path) -> Path:
    """Write the trace of the run in ``store`` to ``output``, replaced as a whole.

    Raises:
        StoreError: the run cannot be read.
        UserError: nothing is published yet, or ``output`` cannot be written.
    """
    records = store.read_records(store.record_names())
    if not records:
        raise UserError(f"trace: {store.url}: nothing is published yet; run it first")
    return write_output(output, json.dumps(trace(records, store.url)), "trace")


def trace(records: Iterable[Record], run: str) -> dict[str, Any]:
    """The trace as Chrome's Trace Event Format has it (JSON object form); times in microseconds
    since the first record's beginning."""
    works = _works(records)
    origin = min(record.started for record, _ in works)
    cut = sorted((r.started, r.fingerprint) for r, _ in works if r.stage == "ingest")
    files = {fingerprint: place for place, (_, fingerprint) in enumerate(cut, 1)}
    events, names = [], {}
    for record, rounds in works:
        pid, tid, name = _track(record, files)
        names[pid, tid] = name
        events.append({"pid": pid, "tid": tid} | _event(record, rounds, origin))
    events.sort(key=lambda event: (event["pid"], event["tid"], event["ts"]))
    used = sorted({pid for pid, _ in names})
    told = [_name("process_name", pid, 0, _PROCESSES[pid]) for pid in used]
    told += [_name("thread_name", *track, names[track]) for track in sorted(names)]
    began = datetime.fromtimestamp(origin, UTC).isoformat(timespec="milliseconds")
    return {
        "displayTimeUnit": "ms",
        "otherData": {"run": masked(run), "began": began},
        "traceEvents": masked_tree([*told, *events]),
    }


def _works(records: Iterable[Record]) -> list[tuple[Record, list[int]]]:
    """Work that was really done, with the rounds that it serves: a later round publishes what an
    earlier one made under its own name, too."""
    found: dict[tuple[str, str, str, float], tuple[Record, list[int]]] = {}
    for record in sorted(records, key=lambda r: -1 if r.round is None else r.round):
        key = record.stage, record.shard, record.fingerprint, record.started
        _, rounds = found.setdefault(key, (record, []))
        if record.round is not None:
            rounds.append(record.round)
    return list(found.values())


def _event(record: Record, rounds: list[int], origin: float) -> Event:
    """One complete event ("X"), but for its track."""
    known = {
        "shard": record.shard,
        "rounds": rounds,
        "fingerprint": record.fingerprint,
        "code_version": record.code_version,
        "bytes": sum(payload.bytes for payload in record.payloads),
        "rows": record.counts,
    }
    return {
        "ph": "X",
        "name": record.stage,
        "cat": "run" if record.round is None else f"round {record.round}",
        "ts": round((record.started - origin) * 1e6),
        "dur": max(0, round((record.finished - record.started) * 1e6)),
        "args": known | record.details,
    }


def _track(record: Record, files: Mapping[str, int]) -> tuple[int, int, str]:
    """(process, thread, the thread's name). To viewers thread 0 means idleness."""
    if record.stage == "ingest":
        return _FILES, files[record.fingerprint], record.details.get("file", "")
    if record.shard.isdigit():
        return _SHARDS, int(record.shard) + 1, f"shard {record.shard}"
    round_ = record.round or 0
    return _ROUNDS, round_ + 1, f"round {round_}"


def _name(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}
