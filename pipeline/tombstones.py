"""Tombstones of a run: published once, read by everything that reads samples."""

from __future__ import annotations

from pipeline.store import Store
from stages.removed import Removed

STAGE = "forget"


def names(published: set[str]) -> tuple[str, ...]:
    """The records that hold tombstones, among the names of all records."""
    return tuple(sorted(name for name in published if f"/stage={STAGE}/" in name))


def read_removed(store: Store) -> Removed:
    """All that must not be used, as of now."""
    samples: set[str] = set()
    hashes: set[str] = set()
    for record in store.read_records(names(store.record_names())):
        for payload in record.payloads:
            table = store.read_table(payload, ["sample_id", "sha256"])
            samples.update(filter(None, table["sample_id"].to_pylist()))
            hashes.update(filter(None, table["sha256"].to_pylist()))
    return Removed(frozenset(samples), frozenset(hashes))
