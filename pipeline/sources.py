"""Cutting source files into URL shards, each file once and for good.

One ``ingest`` record a source file publishes all of its shards at once; each shard then gets a
``sources`` record of its own, derived from it, that the shard stages read.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.in_turn import InTurn
from pipeline.records import Payload, Record, fingerprint
from pipeline.store import Store
from pipeline.version import code_version
from stages.base import LocalContext
from stages.errors import SourceError, StoreError
from stages.ingest import IngestStage, check_distinct, list_files
from stages.readers import SourceFile
from stages.seen import SeenPairs

Shards = dict[str, tuple[str, str]]
"""Shard → (web or human, name of its source record)."""


def ingest(config: RunConfig, store: Store) -> Shards:
    """Cut what is new; returns every shard of the run. A source that has no file yet has no shards;
    whether that is an error, `pipeline.preflight` says.

    Raises:
        SourceError: a file is missing or lacks a column. Nothing of it is published.
    """
    names = store.record_names()
    records = store.read_records(name for name in names if "/stage=ingest/" in name)
    if files := new_files(config, records):
        earlier = [payload for record in records for payload in record.payloads]
        with SeenPairs() as seen:
            seen.read(InTurn(store, [payload.path for payload in earlier]))
            for file in files:
                records.append(_cut(config, store, file, shards_of(records), seen))
    link_shards(store, records, names)
    return known_shards(records)


def known_shards(records: Sequence[Record]) -> Shards:
    """The shards that ingest records have cut.

    Raises:
        StoreError: two have cut one shard. A driver that stood still between its look at the lease
            and its write, longer than a lease lasts, could do so.
    """
    shards: Shards = {}
    cut_by: dict[str, str] = {}
    for record in records:
        for source in _shards_in(record):
            other = cut_by.setdefault(source.shard, record.name)
            if other != record.name:
                raise StoreError(
                    f"shard {source.shard} was cut twice, by {other} and {record.name}; remove the "
                    "one that was finished last, whose rows are then cut again"
                )
            shards[source.shard] = source.details["kind"], source.name
    return shards


def new_files(config: RunConfig, records: Sequence[Record]) -> list[SourceFile]:
    """Source files that no ingest record covers, in the order of the config."""
    done = {record.fingerprint for record in records}
    identities = {record.details["identity"]: record for record in records}
    files = [
        *(file for source in config.sources for file in list_files(source, awaited=True)),
        *(file for source in config.human for file in list_files(source, "human")),
    ]
    new = [file for file in files if _fingerprint(file) not in done]
    check_distinct(new)
    for file in new:
        if file.identity in identities:
            # Its rows would get the ids that they have already.
            raise SourceError(
                f"{file.path}: was cut before with other column settings; restore them, or use a "
                "new run folder"
            )
    return new


def _fingerprint(file: SourceFile) -> str:
    """Of the file's content and how it is read, wherever it lies."""
    reading = file.config.model_copy(update={"path": "", "image_root": None})
    return fingerprint("ingest", IngestStage.version, reading, file.identity, file.origin)


def shards_of(records: Sequence[Record]) -> int:
    """How many shards ingest records have cut; numbers go on from there."""
    return sum(len(record.payloads) for record in records)


def _cut(
    config: RunConfig, store: Store, file: SourceFile, first_shard: int, seen: SeenPairs
) -> Record:
    """Cut one file and publish it; one without rows, as Spark writes beside others, as no shard."""
    started = time.time()
    stage = IngestStage(config.ingest, [file], first_shard, seen)
    with tempfile.TemporaryDirectory() as scratch:
        stage.run({}, Path(scratch), LocalContext())
        cut = sorted(Path(scratch).glob("shard=*.parquet"))
        payloads = tuple(
            store.put_unique(f"sources/{shard.stem}", ".parquet", shard) for shard in cut
        )
    details = {"file": file.path, "kind": file.origin, "identity": file.identity}
    return publish_cut(store, _fingerprint(file), payloads, details, started)


def publish_cut(
    store: Store,
    fingerprint_: str,
    payloads: tuple[Payload, ...],
    details: dict[str, str],
    started: float,
) -> Record:
    """Publish shards that were cut together; returns the published record."""
    record = Record(
        stage="ingest",
        stage_version=IngestStage.version,
        round=None,
        shard="file",
        fingerprint=fingerprint_,
        payloads=payloads,
        counts={"rows": sum(payload.rows or 0 for payload in payloads)},
        details=details,
        code_version=code_version(),
        started=started,
        finished=time.time(),
    )
    return record if store.publish(record) else store.read_record(record.name)


def link_shards(store: Store, records: Sequence[Record], published: set[str]) -> None:
    """Give the shards of ingested files records of their own, where they have none yet."""
    sources = (source for record in records for source in _shards_in(record))
    store.publish_all(source for source in sources if source.name not in published)


def _shards_in(record: Record) -> list[Record]:
    """The records of their own that the shards of one ingested file have, or will have."""
    return [
        record.model_copy(
            update={
                "stage": "sources",
                "shard": payload.path.partition("shard=")[2].partition("/")[0],
                "fingerprint": (payload.first_sha256 or payload.sha256)[:16],
                "payloads": (payload,),
                "counts": {"rows": payload.rows or 0},
            }
        )
        for payload in record.payloads
    ]
