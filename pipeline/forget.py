"""``capfilt forget``: tombstones for samples that must not be used again.

A tombstone counts at once. Download does not ask for the image any more, no model sees it, the
report and `inspect` do not show it, and every round that is not finished selects anew without it:
texts that a survivor carried for it leave, and the cluster of a removed survivor chooses again.
The command says which models have seen the samples. Files of finished rounds stay as they are,
unless `pipeline.scrub` takes the samples out of them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.records import Record, fingerprint
from pipeline.runfolder import Round, read_rounds, tables
from pipeline.store import Store
from pipeline.tombstones import STAGE, names, read_removed
from pipeline.version import code_version
from stages import ids
from stages.errors import UserError
from stages.removed import among
from stages.schemas import TOMBSTONES

Kind = Literal["url", "id", "hash"]

_FORMS: Mapping[Kind, tuple[str, str]] = {
    "url": (r"\S+", "a URL"),
    "id": (r"[0-9a-f]{32}", "a sample_id, 32 hex digits"),
    "hash": (r"[0-9a-f]{64}", "the sha256 of an image as downloaded, 64 hex digits"),
}
_MODELS = {"pretrain": "med", "finetune_captioner": "captioner", "finetune_filter": "filter"}


@dataclass(frozen=True)
class Forgotten:
    """What a call to `forget` came to."""

    asked: int
    """Lines of the file, each once."""
    samples: int
    """Samples of this run among them."""
    new: bool
    """False where all of it was forgotten before."""
    seen_by: tuple[str, ...]
    """Folders of models, and training sets, that the samples had a part in."""


def read_list(path: Path, kind: Kind) -> list[str]:
    """The lines of a file, each once, blank ones and those that begin with # left out.

    Raises:
        UserError: it cannot be read, holds nothing, or a line is not of the form.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"forget: {path}: cannot be read: {error}") from error
    pattern, form = _FORMS[kind]
    found: dict[str, None] = {}
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#"):
            continue
        value = line if kind == "url" else line.lower()
        if not re.fullmatch(pattern, value):
            raise UserError(f"forget: {path}, line {number}: {line[:80]!r} is not {form}")
        found[value] = None
    if not found:
        raise UserError(f"forget: {path}: holds nothing; expected {form} a line")
    return list(found)


def forget(store: Store, kind: Kind, values: Sequence[str]) -> Forgotten:
    """Publish tombstones; what is unknown to the run is remembered for sources to come.

    Raises:
        StoreError: the run folder cannot be read or written.
    """
    started = time.time()
    rounds = read_rounds(store)
    published = store.record_names()
    table = _resolve(store, kind, values, _downloads(store, published))
    samples = set(filter(None, table["sample_id"].to_pylist()))
    before = read_removed(store)
    hashes = set(filter(None, table["sha256"].to_pylist()))
    new = not (samples <= before.samples and hashes <= before.hashes)
    seen_by = _noted(store, published, samples)
    seen_by |= dict.fromkeys(_seen_by(store, rounds, published, samples))
    if new:
        _publish(store, table, seen_by, started)
    known = _known(store, samples, published)
    return Forgotten(len(values), len(known), new, tuple(seen_by))


def catch_up(store: Store) -> None:
    """Publish tombstones for the samples of forgotten hashes that were downloaded since. A pass
    keeps to the tombstones of its beginning, and what later stages and readers know is samples.

    Raises:
        StoreError: the run folder cannot be read or written.
    """
    started = time.time()
    before = read_removed(store)
    if not before.hashes:
        return
    published = store.record_names()
    found = _resolve(store, "hash", sorted(before.hashes), _downloads(store, published))
    new = pc.invert(among(found["sample_id"], before.samples))
    table = found.filter(pc.and_(new, pc.is_valid(found["sample_id"])))
    if table.num_rows:
        samples = set(table["sample_id"].to_pylist())
        _publish(store, table, _seen_by(store, read_rounds(store), published, samples), started)


def _downloads(store: Store, published: set[str]) -> list[Record]:
    return store.read_records(name for name in published if "/stage=download/" in name)


def _resolve(
    store: Store, kind: Kind, values: Sequence[str], downloads: Iterable[Record]
) -> pa.Table:
    """TOMBSTONES of what was asked for."""
    rows: dict[tuple[str | None, str | None], str] = {}
    if kind == "url":
        rows = {(ids.sample_id(url), None): url for url in values}
    elif kind == "id":
        rows = {(sample, None): sample for sample in values}
    else:
        rows = {(None, sha256): sha256 for sha256 in values}
        rows |= {(ids.sample_id(ids.media_url(sha256)), sha256): sha256 for sha256 in values}
        wanted = pa.array(values, pa.string())
        for record in downloads:
            for one in tables(record):
                table = store.read_table(one.payload, ["sample_id", "sha256"])
                for row in table.filter(pc.is_in(table["sha256"], wanted)).to_pylist():
                    rows[row["sample_id"], row["sha256"]] = row["sha256"]
    found = [
        {"sample_id": sample, "sha256": sha256, "kind": kind, "asked": asked}
        for (sample, sha256), asked in rows.items()
    ]
    return pa.Table.from_pylist(found, schema=TOMBSTONES)


def _publish(store: Store, table: pa.Table, seen_by: Iterable[str], started: float) -> None:
    payload = store.put_table("tombstones", table)
    store.publish(
        Record(
            stage=STAGE,
            stage_version=1,
            round=None,
            shard="all",
            fingerprint=fingerprint(STAGE, 1, None, payload.sha256),
            payloads=(payload,),
            counts={"tombstones": table.num_rows},
            # A scrub takes the samples out of the index that tells it.
            details={"seen_by": json.dumps(list(seen_by))},
            code_version=code_version(),
            started=started,
            finished=time.time(),
        )
    )


def _noted(store: Store, published: set[str], samples: set[str]) -> dict[str, None]:
    """Who had seen them, as earlier tombstones of theirs say."""
    seen_by: dict[str, None] = {}
    wanted = frozenset(samples)
    for record in store.read_records(names(published)):
        for payload in record.payloads:
            column = store.read_table(payload, ["sample_id"])["sample_id"]
            if pc.any(among(column, wanted)).as_py():
                seen_by |= dict.fromkeys(json.loads(record.details.get("seen_by", "[]")))
    return seen_by


def _known(store: Store, samples: set[str], published: set[str]) -> set[str]:
    """Those of the samples that a source of the run has."""
    known: set[str] = set()
    wanted = pa.array(sorted(samples), pa.string())
    for record in store.read_records(n for n in published if "/stage=sources/" in n):
        for one in tables(record):
            column = store.read_table(one.payload, ["sample_id"])["sample_id"]
            known.update(column.filter(pc.is_in(column, wanted)).to_pylist())
    return known


def _seen_by(
    store: Store, rounds: Iterable[Round], published: set[str], samples: set[str]
) -> Iterable[str]:
    """Models that were trained on one of the samples, and the training sets that hold them."""
    for round_ in rounds:
        records = store.read_records(set(round_.records.get("assemble", ())) & published)
        sources: set[str] = set()
        for record in records:
            for one in tables(record):
                index = store.read_table(one.payload, ["sample_id", "origin", "source"])
                rows = index.to_pylist()
                sources |= {r["source"] for r in rows if {r["sample_id"], r["origin"]} & samples}
            if sources:
                yield record.payloads[0].path.rpartition("/")[0] + "/"
        for stage, model in _MODELS.items():
            # The captioner and the filter are tuned on human pairs, but start from MED.
            for name in set(round_.records.get(stage, ())) & published if sources else ():
                for payload in store.read_record(name).payloads:
                    folder, found, _ = payload.path.partition(f"/{model}/")
                    if found:
                        yield f"{folder}/{model}/"
                        break
