"""``capfilt forget``: tombstones for samples that must not be used again.

A tombstone counts at once. Download does not ask for the image any more, no model sees it, the
report and `inspect` do not show it, and every round that is not finished selects anew without it:
texts that a survivor carried for it leave, and the cluster of a removed survivor chooses again.
The command says which models have seen the samples, unfinished ones and those of an earlier config
too. Files of finished rounds stay as they are, unless `pipeline.scrub` takes the samples out of
them.
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

from pipeline.records import CHECKPOINTS, Record, fingerprint
from pipeline.runfolder import tables
from pipeline.store import Store
from pipeline.tombstones import STAGE, names, read_removed
from pipeline.version import code_version
from stages import ids
from stages.errors import UserError
from stages.removed import among
from stages.schemas import TOMBSTONES

Kind = Literal["url", "id", "hash"]

_FORMS: Mapping[Kind, tuple[str, str]] = {
    "url": (r"\S(.*\S)?", "a URL"),  # some that samples have come from hold blanks
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
    """Folders of training sets, models and checkpoints that the samples had a part in."""


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
    published = store.record_names()
    table = _resolve(store, kind, values, _of_stage(store, published, "download"))
    samples = set(filter(None, table["sample_id"].to_pylist()))
    before = read_removed(store)
    hashes = set(filter(None, table["sha256"].to_pylist()))
    new = not (samples <= before.samples and hashes <= before.hashes)
    seen_by = _noted(store, published, samples)
    seen_by |= dict.fromkeys(_seen_by(store, published, samples))
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
    found = _resolve(store, "hash", sorted(before.hashes), _of_stage(store, published, "download"))
    new = pc.invert(among(found["sample_id"], before.samples))
    table = found.filter(pc.and_(new, pc.is_valid(found["sample_id"])))
    if table.num_rows:
        samples = set(table["sample_id"].to_pylist())
        _publish(store, table, _seen_by(store, published, samples), started)


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
    for record in _of_stage(store, published, "sources"):
        for one in tables(record):
            column = store.read_table(one.payload, ["sample_id"])["sample_id"]
            known.update(column.filter(pc.is_in(column, wanted)).to_pylist())
    return known


def _seen_by(store: Store, published: set[str], samples: set[str]) -> list[str]:
    """The training sets that hold one of the samples, and the models and unfinished checkpoints
    that were trained on these; those of before a config change too, which no plan names any more.
    """
    seen: set[str] = set()
    places: dict[str, None] = {}
    for record in _of_stage(store, published, "assemble"):
        if _holds(store, record, frozenset(samples)):
            seen.add(record.name)
            places[record.payloads[0].path.rpartition("/")[0] + "/"] = None
    # The captioner and the filter are tuned on human pairs, but start from MED.
    for stage, model in _MODELS.items():
        for record in _of_stage(store, published, stage):
            if _has_read(record, seen):
                seen.add(record.name)
                attempts = (p.path.partition(f"/{model}/") for p in record.payloads)
                places |= {f"{folder}/{model}/": None for folder, found, _ in attempts if found}
    if seen:
        places |= dict.fromkeys(_unfinished(store, seen))
    return sorted(places, key=lambda place: place.partition("/")[0])


def _of_stage(store: Store, published: set[str], stage: str) -> list[Record]:
    return store.read_records(name for name in published if f"/stage={stage}/" in name)


def _holds(store: Store, assemble: Record, samples: frozenset[str]) -> bool:
    """Whether a training set has a pair of one of the samples."""
    for one in tables(assemble):
        index = store.read_table(one.payload, ["sample_id", "origin"])
        if any(pc.any(among(column, samples)).as_py() for column in index.columns):
            return True
    return False


def _has_read(record: Record, seen: set[str]) -> bool:
    """Whether a model comes from one of these records. Where it does not say, of a code that did
    not write it down, it may be any training set of its round."""
    if "reads" in record.details:
        return not seen.isdisjoint(json.loads(record.details["reads"]))
    of_round = f"records/round={record.round:02d}/"
    return any(name.startswith(of_round) for name in seen)


def _unfinished(store: Store, seen: set[str]) -> Iterable[str]:
    """Folders of checkpoints of training that is under way, or was given up."""
    for path in sorted(store.files(CHECKPOINTS)):
        if path.endswith("/last.json"):
            reads = (store.read_json(path) or {}).get("reads")  # it may just have been finished
            if reads is None or not seen.isdisjoint(reads):
                yield path.removesuffix("last.json")
