"""Is what a run folder says true? Every record and every file held against each other.

Nothing is trusted that can be computed again: checksums from the bytes, row counts from the
Parquet, images from the tars, accounts from the tables.
"""

from __future__ import annotations

import json
import os
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TypeVar

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.dag import WHOLE_ROUND_READS, needed_by
from pipeline.ledger import balance
from pipeline.records import Payload, Record
from pipeline.runfolder import STAGES, Published, Round, read_books, read_rounds, tables
from pipeline.store import Store
from stages.errors import CapfiltError, LedgerError, StoreError
from stages.schemas import LEDGER

T = TypeVar("T")
R = TypeVar("R")

_SHARD_STAGES = ("download", "caption", "filter", "embed")
_OWN_FILES = ("records/", "leases/", "logs/", "world/", "tombstones/")
"""Parts of a run folder that hold no payloads."""


@dataclass
class Verification:
    """What was looked at, and everything that is wrong with it."""

    problems: list[str] = field(default_factory=list)
    """One line each; empty if the run folder is sound."""
    records: int = 0
    files: int = 0
    bytes: int = 0
    balanced: list[int] = field(default_factory=list)
    """Rounds whose accounts were computed again and balance."""
    scratch_files: int = 0
    """Files that no record publishes: unfinished attempts, harmless."""
    scratch_bytes: int = 0


def verify(store: Store) -> Verification:
    """Check the whole run folder; changes nothing.

    Raises:
        StoreError: the folder itself cannot be listed or read.
    """
    found = Verification()
    _check_description(store, found)
    records = _records(store, found)
    payloads = _payloads(records, found)
    for problems in _together(lambda one: _check_file(store, *one), payloads.values()):
        found.problems += problems
    found.files = len(payloads)
    found.bytes = sum(payload.bytes for payload, _ in payloads.values())
    found.problems += chain.from_iterable(
        _together(lambda record: _check_record(store, record), records.values())
    )
    for round_ in _rounds(store, found):
        found.problems += _check_plan(round_, records)
        _check_ledger(store, round_, records, found)
    _measure_scratch(store, payloads.keys(), found)
    return found


def _together(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """``function`` of every item, in order; hashing and waiting for storage overlap."""
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        return list(pool.map(function, items))


def _check_description(store: Store, found: Verification) -> None:
    try:
        described = store.read_json("run.json")
    except StoreError as error:
        found.problems.append(str(error))
        return
    if not isinstance(described, dict) or not isinstance(described.get("config"), dict):
        found.problems.append("run.json: holds no config; `capfilt run` writes it again")


# ---- records ---------------------------------------------------------------------------------


def _records(store: Store, found: Verification) -> dict[str, Record]:
    """Every record that can be read, by name."""
    names = sorted(store.record_names())
    found.records = len(names)
    records = {}
    for name, read in zip(names, _together(lambda n: _read(store, n), names), strict=True):
        if isinstance(read, str):
            found.problems.append(read)
        elif read.name != name:
            found.problems.append(f"{name}: its content belongs under {read.name}")
        else:
            records[name] = read
    return records


def _read(store: Store, name: str) -> Record | str:
    try:
        return store.read_record(name)
    except CapfiltError as error:
        return f"{name}: {error}"


def _payloads(
    records: Mapping[str, Record], found: Verification
) -> dict[str, tuple[Payload, Published | None]]:
    """Path → the payload, once, however many records share it, and the table that it holds."""
    payloads: dict[str, tuple[Payload, Published | None]] = {}
    for name, record in records.items():
        held = {table.payload.path: table for table in tables(record)}
        for payload in record.payloads:
            known = payloads.setdefault(payload.path, (payload, held.get(payload.path)))[0]
            if known != payload:
                found.problems.append(f"{name}: {payload.path}: another record describes it else")
    return payloads


# ---- files -----------------------------------------------------------------------------------


def _check_file(store: Store, payload: Payload, table: Published | None) -> list[str]:
    """Size, checksum and, of Parquet, rows and columns."""
    try:
        digest = store.checksum(payload)
    except CapfiltError as error:
        return [f"{payload.path}: {error}"]
    if digest is None:
        return [f"{payload.path}: is missing"]
    if digest != payload.sha256:
        size = store.fs.size(store.path(payload.path))
        said = f"{payload.bytes} bytes, sha256 {payload.sha256[:12]}…"
        return [f"{payload.path}: {size} bytes, sha256 {digest[:12]}…; its record says {said}"]
    if payload.path.endswith(".parquet"):
        return _check_parquet(store, payload, table)
    return []


def _check_parquet(store: Store, payload: Payload, table: Published | None) -> list[str]:
    problems = []
    try:
        with store.fs.open(store.path(payload.path), "rb") as file:
            parquet = pq.ParquetFile(file)
            rows, schema = parquet.metadata.num_rows, parquet.schema_arrow
    except (pa.ArrowInvalid, OSError) as error:
        return [f"{payload.path}: not readable Parquet: {_one_line(error)}"]
    if rows != payload.rows:
        problems.append(f"{payload.path}: {rows} rows, its record says {payload.rows}")
    expected = table.schema if table is not None else None
    if expected is not None and not schema.equals(expected):
        problems.append(f"{payload.path}: {_schema_problem(schema, expected)}")
    return problems


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _schema_problem(found: pa.Schema, expected: pa.Schema) -> str:
    missing = [name for name in expected.names if name not in found.names]
    extra = [name for name in found.names if name not in expected.names]
    if missing or extra:
        return f"columns missing {missing}, unexpected {extra}"
    for name in expected.names:
        if found.field(name).type != expected.field(name).type:
            return f"column {name} is {found.field(name).type}, not {expected.field(name).type}"
    return f"columns are in another order: {', '.join(found.names)}"


# ---- a record against its files --------------------------------------------------------------


def _check_record(store: Store, record: Record) -> list[str]:
    """Counts and tars against the tables. Files that cannot be read are told of elsewhere."""
    try:
        problems = _check_counts(store, record)
        if record.stage == "download":
            problems += _check_images(store, record)
        if record.stage == "assemble":
            problems += _check_training_set(store, record)
    except (CapfiltError, pa.ArrowInvalid, KeyError):
        return []
    return [f"{record.name}: {problem}" for problem in problems]


def _check_counts(store: Store, record: Record) -> list[str]:
    """The record's rows by status are those of its table."""
    if record.stage not in _SHARD_STAGES:
        return []
    counts: Counter[str] = Counter()
    for table in tables(record):
        counts.update(store.read_table(table.payload, ["status"])["status"].to_pylist())
    if dict(counts) == record.counts:
        return []
    return [f"counts {record.counts}, but the table has {dict(counts)}"]


def _check_images(store: Store, record: Record) -> list[str]:
    """The tar of a shard has exactly one image for each sample that the table has."""
    expected: set[str] = set()
    for table in tables(record):
        rows = store.read_table(table.payload, ["sample_id", "status"])
        success = rows.filter(pc.equal(rows["status"], "success"))
        expected.update(success["sample_id"].to_pylist())
    members: Counter[str] = Counter()
    for payload in record.payloads:
        if payload.path.endswith(".tar"):
            read = _members(store, payload)
            if isinstance(read, str):
                return [read]
            members.update(name.partition(".")[0] for name, _ in read)
    return _differences("image", expected, members)


def _check_training_set(store: Store, record: Record) -> list[str]:
    """The tars of a training set hold exactly the samples, and the texts, of their index."""
    expected: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for table in tables(record):
        for row in store.read_table(table.payload, ["tar", "key", "pair_id"]).to_pylist():
            expected[row["tar"]][row["key"]].add(row["pair_id"])
    tars = {p.path.rpartition("/")[2]: p for p in record.payloads if p.path.endswith(".tar")}
    problems = [f"the index names {tar}, which is not published" for tar in expected.keys() - tars]
    for name, payload in sorted(tars.items()):
        read = _members(store, payload)
        if isinstance(read, str):
            problems.append(read)
            continue
        stems = Counter(member.partition(".")[0] for member, _ in read if not _is_json(member))
        problems += [f"{name}: {p}" for p in _differences("sample", set(expected[name]), stems)]
        for member, data in read:
            pairs = expected[name].get(member.partition(".")[0])
            if _is_json(member) and _pairs_of(data) != pairs:
                problems.append(f"{name}: {member}: other texts than the index has")
    return problems


def _pairs_of(sample: bytes) -> set[str] | None:
    """The pair ids in the JSON of a training sample; None where it is not of that form."""
    try:
        return {text["pair_id"] for text in json.loads(sample)["texts"]}
    except (ValueError, KeyError, TypeError):
        return None


def _is_json(member: str) -> bool:
    return member.endswith(".json")


def _differences(what: str, expected: set[str], found: Mapping[str, int]) -> list[str]:
    """How the things found differ from those that there should be, one each."""
    kinds = {
        "missing": expected - found.keys(),
        "that nothing mentions": found.keys() - expected,
        "twice": {name for name, count in found.items() if count > 1},
    }
    return [
        f"{len(names)} {what}s {kind}, first {min(names)}" for kind, names in kinds.items() if names
    ]


def _members(store: Store, payload: Payload) -> list[tuple[str, bytes]] | str:
    """(name, content) of every member, contents of JSON only; or what is wrong with the tar."""
    members = []
    try:
        with _opened(store, payload) as path, tarfile.open(path, "r:") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is None:
                    return f"{payload.path}: {member.name} is not a file"
                data = file.read()
                members.append((member.name, data if _is_json(member.name) else b""))
    except (tarfile.TarError, EOFError, OSError) as error:
        return f"{payload.path}: not a readable tar: {_one_line(error)}"
    return members


@contextmanager
def _opened(store: Store, payload: Payload) -> Iterator[Path]:
    """A local path to what is stored now; never an earlier copy."""
    if store.is_local:
        yield Path(store.path(payload.path))
        return
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "payload"
        store.fs.get_file(store.path(payload.path), str(target))
        yield target


# ---- rounds ----------------------------------------------------------------------------------


def _rounds(store: Store, found: Verification) -> list[Round]:
    try:
        return read_rounds(store)
    except CapfiltError as error:
        found.problems.append(str(error))
        return []


def _check_plan(round_: Round, records: Mapping[str, Record]) -> list[str]:
    """Whatever a published stage was made from is published too."""
    gone_on: dict[str, str] = {}
    for stage, names in round_.records.items():
        if stage in WHOLE_ROUND_READS and any(name in records for name in names):
            gone_on |= dict.fromkeys(needed_by(stage), stage)
    return [
        f"{name}: is missing or unreadable, though round {round_.number} has gone on to "
        f"{gone_on[stage]}"
        for stage in STAGES
        if stage in gone_on
        for name in round_.records.get(stage, ())
        if name not in records
    ]


def _check_ledger(
    store: Store, round_: Round, records: Mapping[str, Record], found: Verification
) -> None:
    """Compute the accounts of a round again, once select is published."""
    if not any(name in records for name in round_.records.get("select", ())):
        return
    names = [name for stage in STAGES for name in round_.records.get(stage, ())]
    published = [records[name] for name in names if name in records]
    try:
        written = [
            store.read_table(table.payload)
            for record in published
            for table in tables(record)
            if table.table == "ledger"
        ]
        accounts = balance(read_books(store, published))
    except LedgerError as error:
        found.problems.append(f"round {round_.number}: {error}")
        return
    except (CapfiltError, OSError, KeyError, ValueError, duckdb.Error):
        # Files that are missing or damaged are told of one by one.
        found.problems.append(f"round {round_.number}: the ledger's tables cannot all be read")
        return
    if any(_entries(table) != _entries(accounts) for table in written):
        found.problems.append(f"round {round_.number}: ledger.parquet is not what the tables say")
        return
    found.balanced.append(round_.number)


def _entries(ledger: pa.Table) -> list[tuple[object, ...]]:
    return sorted(tuple(row.values()) for row in ledger.select(LEDGER.names).to_pylist())


def _measure_scratch(store: Store, published: Iterable[str], found: Verification) -> None:
    known = set(published)
    for path, size in store.files().items():
        planned = path.endswith("/plan.json") or "/" not in path
        if path not in known and not planned and not path.startswith(_OWN_FILES):
            found.scratch_files += 1
            found.scratch_bytes += size
