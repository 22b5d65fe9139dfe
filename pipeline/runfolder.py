"""What lies in a run folder, for those who only read it: status, inspect, verify, the report."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.records import Payload, Record
from pipeline.store import Store
from stages.errors import StoreError, UserError
from stages.schemas import (
    CAPTIONS,
    CLUSTERS,
    CONTAMINATED,
    DEDUP,
    DOWNLOAD,
    EMBEDDINGS,
    HOSTS,
    LEDGER,
    METRICS,
    OUTCOMES,
    PAIRS,
    PROBE_CAPTIONS,
    ROWS,
    SCORES,
    SHARED,
    SOURCES,
    TEXTS,
    TRAINING_INDEX,
    TRAINING_LOG,
)

STAGES = (
    "sources",
    "download",
    "embed",
    "copies",
    "caption",
    "filter",
    "dedup",
    "select",
    "assemble",
    "ledger",
    "pretrain",
    "finetune_captioner",
    "finetune_filter",
    "evaluate",
    "audit",
    "gate",
)
"""All stages of a round, in the order in which they are done."""

_SHARD_TABLES: Mapping[str, pa.Schema] = {
    "ingest": SOURCES,
    "sources": SOURCES,
    # Images lie in the tar beside it.
    "download": DOWNLOAD.remove(DOWNLOAD.get_field_index("image")),
    "embed": EMBEDDINGS,
    "shared": SHARED,
    "caption": CAPTIONS,
    "filter": SCORES,
}
"""Shard stage → the table that it publishes, one file a shard."""

_FILES: Mapping[str, tuple[str, pa.Schema]] = {
    "copies.parquet": ("copies", DEDUP),
    "clusters.parquet": ("clusters", CLUSTERS),
    "contaminated.parquet": ("contaminated", CONTAMINATED),
    "dedup.parquet": ("dedup", DEDUP),
    "texts.parquet": ("texts", TEXTS),
    "pairs.parquet": ("pairs", PAIRS),
    "rows.parquet": ("rows", ROWS),
    "ledger.parquet": ("ledger", LEDGER),
    "hosts.parquet": ("hosts", HOSTS),
    "index.parquet": ("index", TRAINING_INDEX),
    "log.parquet": ("training_log", TRAINING_LOG),
    "metrics.parquet": ("metrics", METRICS),
    "outcomes.parquet": ("outcomes", OUTCOMES),
    "captions.parquet": ("probe_captions", PROBE_CAPTIONS),
}
"""File of a whole-round stage → the table that it holds."""


@dataclass(frozen=True)
class Published:
    """One Parquet file that a record publishes."""

    table: str
    """What it is part of: ``caption``, ``pairs``, ``metrics``…"""
    schema: pa.Schema
    stage: str
    payload: Payload


@dataclass(frozen=True)
class Round:
    """One round as plan.json has it."""

    number: int
    shards: Mapping[str, tuple[str, str]]
    """Shard → (web or human, name of its source record)."""
    records: Mapping[str, tuple[str, ...]]
    """Stage → the records that are, or will be, its output; in the order of `STAGES`."""


def open_run(url: str) -> Store:
    """The store at ``url``, which must hold a run.

    Raises:
        StoreError: it cannot be reached, or no run was ever begun there.
    """
    store = Store(url)
    if not store.exists("run.json") and not store.exists("records"):
        raise StoreError(
            f"run folder {url!r}: no run here (no run.json); give the `run:` of a config that "
            "`capfilt run` has begun"
        )
    return store


def read_rounds(store: Store) -> list[Round]:
    """The rounds that were begun, from their plans alone.

    Raises:
        StoreError: a plan is not what a run writes.
    """
    rounds = []
    for number in count():
        plan = store.read_json(f"round={number:02d}/plan.json")
        if plan is not None:
            rounds.append(_round(store, number, plan))
        elif number > 0:
            break
    return rounds


def _round(store: Store, number: int, plan: Any) -> Round:
    try:
        shards = {
            str(name): (str(kind), str(record)) for name, (kind, record) in plan["shards"].items()
        }
        records = {str(stage): tuple(map(str, names)) for stage, names in plan["records"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"run folder {store.url!r}: round={number:02d}/plan.json is not a plan"
        ) from error
    if shards:
        records["sources"] = tuple(record for _, record in shards.values())
    known = {stage: records[stage] for stage in STAGES if stage in records}
    return Round(number, shards, known | records)


def tables(record: Record) -> list[Published]:
    """The Parquet files that a record publishes; those of no known kind are left out."""
    found = []
    for payload in record.payloads:
        if not payload.path.endswith(".parquet"):
            continue
        file = payload.path.rpartition("/")[2]
        if record.stage in _SHARD_TABLES:
            schema = _SHARD_TABLES[record.stage]
            found.append(Published(record.stage, schema, record.stage, payload))
        elif record.stage == "copies" and file.startswith("shard="):
            found.append(Published("shared", SHARED, record.stage, payload))
        elif file in _FILES:
            found.append(Published(*_FILES[file], record.stage, payload))
    return found


_BOOKS = {
    "sources": "sources",
    "download": "download",
    "caption": "captions",
    "rows": "rows",
    "pairs": "pairs",
    "index": "index",
}
"""Table → what `pipeline.ledger.balance` calls it."""


def read_books(store: Store, records: Iterable[Record]) -> dict[str, list[Path]]:
    """What the accounts of a round are made of, as local files, from the round's records."""
    books: dict[str, list[Path]] = {}
    for record in records:
        for one in tables(record):
            if one.table in _BOOKS:
                path = store.local_copy(one.payload.path)
                books.setdefault(_BOOKS[one.table], []).append(path)
    return books


def table_names() -> list[str]:
    """Every table that a run can hold, in the order in which they are made."""
    shard_tables = [name for name in _SHARD_TABLES if name != "ingest"]
    return [*shard_tables, *(name for name, _ in _FILES.values())]


def write_output(output: Path, text: str, command: str) -> Path:
    """Write what ``command`` made of a run to a local file, replaced as a whole; returns it.

    Raises:
        UserError: it cannot be written.
    """
    scratch = output.with_name(f".{output.name}.{uuid.uuid4().hex}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(output)
    except OSError as error:
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise UserError(
            f"{command}: {output}: cannot be written: {error.strerror or error}; "
            "give a file in a folder that is there with --output"
        ) from error
    return output
