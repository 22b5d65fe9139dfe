"""``capfilt forget … --scrub``: files without the samples that must not be used again.

Each file that holds one of them is written anew under another name. Its record is then replaced
as a whole, with the same name and fingerprint and the new checksums, so that nothing is computed
again; this is the one case in which a record changes. Last of all goes every image and table that
no record names: the files replaced, and what killed attempts left behind. What a kill interrupts,
a second call finishes. Out of reach are backups, versions that a bucket keeps, and other machines'
copies of a remote store.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.engine.shard import count_by
from pipeline.engine.spread import SPREAD
from pipeline.forget import catch_up
from pipeline.lease import held
from pipeline.ledger import LedgerStage
from pipeline.records import Payload, Record
from pipeline.runfolder import Published, Round, read_books, read_rounds, tables
from pipeline.store import Store
from pipeline.tombstones import read_removed
from stages.base import LocalContext
from stages.removed import among
from stages.scrub import ID_COLUMNS, scrub_shared_texts, scrub_table, scrub_tar

_OURS = ("sources/", "images/", "stage=", "round=")
"""Folders of a run that hold images and tables of samples."""
_ENDINGS = (".tar", ".parquet")
_REPORT = "report.html"

Samples = frozenset[str]
Rewritten = dict[str, Payload]
"""Path → what takes the file's place."""


@dataclass(frozen=True)
class Scrubbed:
    """What a call came to."""

    rewritten: int
    """Files."""
    deleted: int
    """Files that nothing names any more."""


def scrub(store: Store, tell: Callable[[str], None]) -> Scrubbed:
    """Take all samples with a tombstone out of every file, as the only driver of the run.

    Raises:
        LeaseHeldError: a run is under way; ``tell`` gets a line if that has to be found out.
        StoreError: the run folder cannot be read or written.
        LedgerError: an account of a round does not balance.
    """
    with held(store, tell) as fenced:
        return _scrub(fenced)


def _scrub(store: Store) -> Scrubbed:
    catch_up(store)
    samples = read_removed(store).samples
    work = partial(_scrub_record, store, samples=samples)
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        rewritten: set[str] = set().union(*pool.map(work, sorted(store.record_names())))
    for round_ in read_rounds(store):
        rewritten |= _balance_anew(store, round_)
    return Scrubbed(len(rewritten), _sweep(store))


def _scrub_record(store: Store, name: str, samples: Samples) -> set[str]:
    """The files of the record that were rewritten."""
    record = store.read_record(name)
    changed: dict[str, tuple[pa.Table, pa.Table]] = {}
    done: Rewritten = {}
    for one in tables(record):
        if not _holds(store, one, samples):
            continue
        before = store.read_table(one.payload)
        after = scrub_table(one.table, before, samples)
        if not after.equals(before):
            changed[one.table] = before, after
            done[one.payload.path] = _put_table(store, one.payload, after)
    if "pairs" in changed:
        done |= _shared_texts(store, record, changed["pairs"][0], samples)
    if changed:
        done |= _tars(store, record, changed, samples)
    counted = next((after for _, after in changed.values() if "status" in after.column_names), None)
    _replace(store, record, done, counted)
    return set(done)


def _holds(store: Store, one: Published, samples: Samples) -> bool:
    """Whether a table names one of the samples; only ids are read."""
    columns = [name for name in ID_COLUMNS if name in one.schema.names]
    if "sample_id" not in columns:
        return False
    table = store.read_table(one.payload, columns)
    return any(pc.any(among(table[name], samples)).as_py() for name in columns)


def _shared_texts(store: Store, record: Record, pairs: pa.Table, samples: Samples) -> Rewritten:
    done = {}
    for one in tables(record):
        if one.table == "texts":
            before = store.read_table(one.payload)
            after = scrub_shared_texts(before, pairs, samples)
            if len(after) < len(before):
                done[one.payload.path] = _put_table(store, one.payload, after)
    return done


def _tars(
    store: Store,
    record: Record,
    changed: Mapping[str, tuple[pa.Table, pa.Table]],
    samples: Samples,
) -> Rewritten:
    """The record's tars that hold something of the samples; training shards as the index says."""
    named: set[str] | None = None
    if "index" in changed:
        before, after = changed["index"]
        left = set(after["pair_id"].to_pylist())
        names = zip(before["pair_id"].to_pylist(), before["tar"].to_pylist(), strict=True)
        named = {tar for pair, tar in names if pair not in left}
    done = {}
    for payload in record.payloads:
        tar = payload.path.rpartition("/")[2]
        if payload.path.endswith(".tar") and (named is None or tar in named):
            before = store.read_bytes(payload.path)
            after = scrub_tar(before, samples)
            if after != before:
                done[payload.path] = _put(store, payload, after, None)
    return done


def _put_table(store: Store, payload: Payload, table: pa.Table) -> Payload:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return _put(store, payload, buffer.getvalue(), table.num_rows)


def _put(store: Store, payload: Payload, data: bytes, rows: int | None) -> Payload:
    """Write what takes a payload's place; under the name of its content, so that whoever writes it
    once more, after a kill or for another record, writes the same file."""
    digest = hashlib.sha256(data).hexdigest()
    folder, _, file = payload.path.rpartition("/")
    stem, suffix = Path(file).stem, Path(file).suffix
    if re.fullmatch("[0-9a-f]{32}", stem):
        path = f"{folder}/{digest[:32]}{suffix}"
    else:  # what a whole-round stage named, in the folder of its attempt
        path = f"{folder.rpartition('/')[0]}/{digest[:32]}/{file}"
    store.write_bytes(path, data)
    first = payload.first_sha256 or payload.sha256
    return Payload(path=path, bytes=len(data), sha256=digest, rows=rows, first_sha256=first)


def _replace(store: Store, record: Record, done: Rewritten, counted: pa.Table | None) -> None:
    if not done:
        return
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    changes: dict[str, object] = {
        "payloads": tuple(done.get(payload.path, payload) for payload in record.payloads),
        "details": record.details | {"scrubbed": now},
    }
    if counted is not None:
        changes["counts"] = count_by(counted, "status")
    store.replace(record.model_copy(update=changes))


def _balance_anew(store: Store, round_: Round) -> set[str]:
    """Bring the ledger of a round up to its tables; returns the files that were rewritten."""
    names = [name for stage in round_.records.values() for name in stage]
    published = store.record_names().intersection(names)
    done: Rewritten = {}
    for name in published.intersection(round_.records.get("ledger", ())):
        record = store.read_record(name)
        books = read_books(store, store.read_records(published))
        with tempfile.TemporaryDirectory() as scratch:
            LedgerStage().run(books, Path(scratch), LocalContext())
            for one in tables(record):
                after = pq.read_table(Path(scratch) / one.payload.path.rpartition("/")[2])
                if not after.equals(store.read_table(one.payload)):
                    done[one.payload.path] = _put_table(store, one.payload, after)
        _replace(store, record, done, None)
    return set(done)


def _sweep(store: Store) -> int:
    """Delete images and tables that no record publishes, here and in this machine's cache, and the
    report, which may show the samples."""
    records = store.read_records(store.record_names())
    kept = {payload.path for record in records for payload in record.payloads}
    found = [path for path in store.files() if _unnamed(path, kept) or path == _REPORT]
    for path in (*found, SPREAD):
        store.remove(path)
    for file in store.cache.rglob("*"):
        if _unnamed(file.relative_to(store.cache).as_posix(), kept):
            file.unlink(missing_ok=True)
    return len(found)


def _unnamed(path: str, kept: set[str]) -> bool:
    return path.startswith(_OURS) and path.endswith(_ENDINGS) and path not in kept
