"""``capfilt run … --retry-failed``: rows whose reasons may have passed, cut into new shards.

Committed shards stay as they are. A row that is tried again gets a row of its own in a
supplementary shard, which the next round takes up; in the accounts the first one is ``retried``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import RunConfig
from pipeline.records import Record, fingerprint
from pipeline.runfolder import tables
from pipeline.sources import link_shards, publish_cut, shards_of
from pipeline.store import Store
from stages import ids
from stages.download import RETRYABLE
from stages.fetch import TRY_AGAIN_CODES
from stages.ingest import parted
from stages.schemas import SOURCES


def retry_failed(config: RunConfig, store: Store) -> int:
    """Cut supplementary shards; returns how many rows they hold. Rows that are being tried again
    already are left alone, unless that failed as well."""
    started = time.time()
    names = store.record_names()
    cut = store.read_records(name for name in names if "/stage=ingest/" in name)
    link_shards(store, cut, names)  # a run may have been killed before it did
    names = store.record_names()
    total = 0
    for kind in ("web", "human"):
        rows = _failed_rows(store, names, kind)
        with tempfile.TemporaryDirectory() as scratch:
            files = _write(rows, Path(scratch), config.ingest.shard_size, shards_of(cut))
            if not files:
                continue
            payloads = tuple(store.put_unique(f"sources/{f.stem}", ".parquet", f) for f in files)
        print_ = fingerprint("retry", 1, None, *(payload.sha256 for payload in payloads))
        details = {"file": "rows tried again", "kind": kind, "identity": f"retry:{print_}"}
        cut.append(publish_cut(store, print_, payloads, details, started))
        link_shards(store, cut[-1:], names)
        total += sum(payload.rows or 0 for payload in payloads)
    return total


def _failed_rows(store: Store, names: set[str], kind: str) -> Iterator[pa.Table]:
    """SOURCES rows to try again, shard by shard."""
    sources = {
        record.shard: record
        for record in store.read_records(n for n in names if "/stage=sources/" in n)
        if record.details.get("kind") == kind
    }
    tried = {
        row
        for record in sources.values()
        for row in _read(store, record, ["retry_of"])["retry_of"].drop_null().to_pylist()
    }
    downloads = store.read_records(n for n in names if "/stage=download/" in n)
    downloads.sort(key=lambda record: (record.shard, record.finished))
    for shard, records in groupby(downloads, key=lambda record: record.shard):
        if shard not in sources:
            continue
        found = _read(store, list(records)[-1], ["row_id", "status", "http_code"])
        passing = pc.or_(
            pc.is_in(found["status"], pa.array(sorted(RETRYABLE))),
            pc.fill_null(pc.is_in(found["http_code"], pa.array(sorted(TRY_AGAIN_CODES))), False),
        )
        failed = set(found.filter(passing)["row_id"].to_pylist()) - tried
        if failed:
            rows = _read(store, sources[shard], None).to_pylist()
            again = [_again(row) for row in rows if row["row_id"] in failed]
            yield pa.Table.from_pylist(again, schema=SOURCES)


def _again(row: dict[str, object]) -> dict[str, object]:
    first = str(row["row_id"])
    return {**row, "row_id": ids.row_id(f"retry:{first}", 0), "retry_of": first}


def _read(store: Store, record: Record, columns: list[str] | None) -> pa.Table:
    (table,) = tables(record)
    return store.read_table(table.payload, columns)


def _write(rows: Iterator[pa.Table], folder: Path, size: int, first: int) -> list[Path]:
    """Shards of at most ``size`` rows, numbered from ``first``."""
    files: list[Path] = []
    for table in parted(rows, size):
        files.append(folder / f"shard={first + len(files):06d}.parquet")
        pq.write_table(table, files[-1])
    return files
