"""Ray metrics of published work, for Prometheus; `infra/grafana.json` shows them.

The board emits all of them: it lives as long as the driver, so that no worker that ends takes its
last figures along. What counts is the ledger; these are a view, some seconds late.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from pipeline.engine.shard import payload
from pipeline.records import Record
from pipeline.store import Store

_WORK = ("run", "stage")
_SECONDS = [1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000]
_POWERS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]

COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "capfilt_published": ("shards, or whole-round stages, that were published", _WORK),
    "capfilt_rows": ("rows by status; of download, the reason of failure", (*_WORK, "status")),
    "capfilt_seconds": ("seconds of work on what was published", _WORK),
    "capfilt_tokens": ("text tokens that a captioner wrote or a filter read", _WORK),
}
"""Name → (meaning, labels). Prometheus sees ``ray_<name>_total``."""

HISTOGRAMS: Mapping[str, tuple[str, tuple[str, ...], list[float]]] = {
    # Ray sums a histogram from the middles of its buckets: for means, divide the counters.
    "capfilt_work_seconds": ("seconds of one shard or whole-round stage", _WORK, [*_SECONDS]),
    "capfilt_batch_size": ("images that a model took at once", _WORK, [*_POWERS]),
}
"""Name → (meaning, labels, upper borders of the buckets). Prometheus sees ``ray_<name>_bucket``."""

GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "capfilt_gpu_bytes": ("most GPU memory that the worker which published last had taken", _WORK),
    "capfilt_ledger": (
        "rows and pairs of a round by final state",
        ("run", "round", "account", "source", "state"),
    ),
}
"""Name → (meaning, labels). Prometheus sees ``ray_<name>``."""


@dataclass(frozen=True)
class Work:
    """What one published piece of work took and gave."""

    run: str
    """`Store.root`: alike in the driver and in every worker."""
    stage: str
    seconds: float
    counts: Mapping[str, int]
    """Rows by status."""
    facts: Mapping[str, str]
    """`ShardStage.facts`, or the details of a record."""
    gpu_bytes: int | None = None
    ledger: Mapping[tuple[str, str, str, str], int] = field(default_factory=dict)
    """(round, account, source, state) → rows or pairs; of the ledger alone."""


def of_record(store: Store, record: Record, gpu_bytes: int | None = None) -> Work:
    """The work that a record publishes."""
    ledger = {}
    if record.stage == "ledger":
        for row in store.read_table(payload(record, "ledger.parquet")).to_pylist():
            key = str(record.round), row["account"], row["source"], row["state"]
            ledger[key] = row["count"]
    seconds = record.finished - record.started
    return Work(store.root, record.stage, seconds, record.counts, record.details, gpu_bytes, ledger)


def gpu_bytes() -> int | None:
    """The most memory that this process has had of its GPU; None where it uses none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.max_memory_allocated())


class Meters:
    """The metrics themselves, in the process that emits them."""

    def __init__(self) -> None:
        self._all: dict[str, Any] = {}
        self._standing: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        for name, (meaning, labels) in COUNTERS.items():
            self._all[name] = Counter(name, meaning, labels)
        for name, (meaning, labels, borders) in HISTOGRAMS.items():
            self._all[name] = Histogram(name, meaning, borders, labels)
        for name, (meaning, labels) in GAUGES.items():
            self._all[name] = Gauge(name, meaning, labels)

    def emit(self, work: Work) -> None:
        """Count one piece of work."""
        labels = {"run": work.run, "stage": work.stage}
        meters = self._all
        meters["capfilt_published"].inc(1, labels)
        seconds = max(0.0, work.seconds)
        if seconds > 0:  # a counter takes no zero
            meters["capfilt_seconds"].inc(seconds, labels)
        meters["capfilt_work_seconds"].observe(seconds, labels)
        for status, count in work.counts.items():
            if count > 0:
                meters["capfilt_rows"].inc(count, labels | {"status": status})
        if int(work.facts.get("tokens", 0)) > 0:
            meters["capfilt_tokens"].inc(int(work.facts["tokens"]), labels)
        if "batch_size" in work.facts:
            # "32, 16" where memory ran out on the way: the last one held.
            size = int(work.facts["batch_size"].rpartition(", ")[2])
            meters["capfilt_batch_size"].observe(size, labels)
        if work.gpu_bytes is not None:
            self._stand("capfilt_gpu_bytes", work.gpu_bytes, labels)
        for (round_, account, source, state), count in work.ledger.items():
            where = {"round": round_, "account": account, "source": source, "state": state}
            self._stand("capfilt_ledger", count, {"run": work.run} | where)

    def _stand(self, gauge: str, value: float, labels: Mapping[str, str]) -> None:
        self._standing[gauge, tuple(labels.items())] = value
        self._all[gauge].set(value, dict(labels))

    def stand(self) -> None:
        """Set all gauges again to what they are: Ray exports a gauge only for two intervals (20 s)
        after it was set."""
        for (gauge, labels), value in self._standing.items():
            self._all[gauge].set(value, dict(labels))
