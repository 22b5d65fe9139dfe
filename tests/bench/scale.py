"""What the engine itself costs on a large cluster: real records, stages that only sleep.

    python -m tests.bench.scale [--json FILE] [--gpus 64 128 256 512] [--replicas 64]
                                [--shards 20000] [--seconds 8]
    python -m tests.bench.scale --raylets [--shards 200] [--seconds 1]

The unmodified engine runs download, caption, filter and embed over source shards of one row, on a
`cluster_utils` cluster of fake GPUs. A stage sleeps its part of ``--seconds``, the GPU time of a
shard, then writes its table and publishes its record. Every replica is a real process of about
230 MiB, so this machine's memory bounds their number, and beyond ``--replicas`` a replica holds
several GPUs, which take a shard together in as much less time. Its cores bound the driver too,
which shares them with all its workers: figures at many GPUs are worse than a cluster's.

Overhead is the wall time of a shard beyond what sleeping takes at best, the start of the workers
included. The GPU idle share is one minus time asleep over (GPUs times the time from the first GPU
work's start to the last one's end), by the records; ``steady`` is that of the middle half of this
time, in which no stage waits for the first shards or has run out of the last. Shares of a shard's
GPU time are those of the replicas, so that all stages are equally fast: who gives the stages other
shares of the GPUs than they need has idle ones whatever runs them. Driver memory is its own PSS.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from ray.cluster_utils import Cluster

from pipeline.config import EngineConfig
from pipeline.dag import ShardTask, plan_shards
from pipeline.engine.cluster import connected
from pipeline.engine.data import run_shards
from pipeline.records import Record
from pipeline.store import Store
from stages.base import Config, Resources, ShardStage
from stages.schemas import (
    CAPTIONS,
    DOWNLOAD,
    EMBEDDINGS,
    IMAGES,
    IMAGES_WITH_TEXTS,
    SCORES,
    SOURCES,
)
from tests.tables import filled

_NODES = 8
_PARTS = {"caption": 0.6, "filter": 0.3, "embed": 0.1}
"""Share of the GPUs, and so of a shard's GPU time."""
_DOWNLOADS = 1 / 8
"""Replicas of download for each of the GPU stages'."""
_SCHEMAS = {
    "download": (SOURCES, DOWNLOAD),
    "caption": (IMAGES, CAPTIONS),
    "filter": (IMAGES_WITH_TEXTS, SCORES),
    "embed": (IMAGES, EMBEDDINGS),
}


class Sleep(Config):
    seconds: float
    resources: Resources


class Sleeping(ShardStage):
    """Sleeps, then gives each row of its input a row of its output."""

    version = 1

    def __init__(self, name: str, config: Sleep) -> None:
        self.name, self.config = name, config  # type: ignore[misc]
        self.input_schema, self.output_schema = _SCHEMAS[name]  # type: ignore[misc]

    @property
    def resources(self) -> Resources:
        return self.config.resources

    def process(self, table: pa.Table) -> pa.Table:
        time.sleep(self.config.seconds)
        return self.failed(table, "success", "")

    def failed(self, table: pa.Table, status: str, detail: str) -> pa.Table:
        same = [name for name in table.column_names if name in self.output_schema.names]
        rows = table.select(same).to_pylist()
        image = {"image": b"not decoded"} if self.name == "download" else {}
        return filled(self.output_schema, rows, status=status, **image)


class SleepingTask(ShardTask):
    def build(self, model: str | None) -> ShardStage:
        assert isinstance(self.config, Sleep)
        return Sleeping(self.name, self.config)


@dataclass(frozen=True)
class Result:
    wall: float
    overhead: float
    """Seconds of wall time a shard, beyond what sleeping takes."""
    idle: float
    steady: float
    """`idle` in the middle half of the time."""
    memory: tuple[int, int]
    """Bytes of the driver in the second quarter and in the last."""


def make_sources(store: Store, count: int) -> dict[str, tuple[str, str]]:
    """Source records of ``count`` shards, which share one payload of one row."""
    row = {"row_id": "r", "sample_id": "s", "source": "web", "url": "http://x/", "text": "a text"}
    payload = store.put_table("sources/shared", filled(SOURCES, [row]))
    made = {}
    for number in range(count):
        record = Record(
            stage="sources",
            stage_version=1,
            round=None,
            shard=f"{number:06d}",
            fingerprint=f"{number:016x}",
            payloads=(payload,),
            code_version="bench",
            started=0,
            finished=0,
        )
        store.publish(record)
        made[record.shard] = ("web", record.name)
    return made


def replicas(count: int) -> dict[str, int]:
    """GPU stage → its replicas; together ``count``, at least one each."""
    embed, filter_ = (max(1, round(_PARTS[name] * count)) for name in ("embed", "filter"))
    return {"caption": count - filter_ - embed, "filter": filter_, "embed": embed}


def tasks_for(gpus: int, count: int, seconds: float) -> list[ShardTask]:
    """The four stages, ``count`` replicas on ``gpus`` GPUs; downloads are fast enough for all."""
    downloads = max(1, round(count * _DOWNLOADS))
    needs = Resources(cpus=0.01, min_replicas=downloads, max_replicas=downloads)
    download = Sleep(seconds=seconds / gpus * downloads / 2, resources=needs)
    tasks = [SleepingTask("download", 1, download)]
    for name, held in replicas(count).items():
        needs = Resources(cpus=0.01, gpus=gpus // count, min_replicas=held, max_replicas=held)
        config = Sleep(seconds=seconds * held / gpus, resources=needs)
        tasks.append(SleepingTask(name, 1, config))
    return list(tasks)


def measure(gpus: int, raylets: int, options: argparse.Namespace, folder: Path) -> Result:
    """One run over all shards on ``raylets`` nodes that have ``gpus`` together."""
    shards, seconds, count = options.shards, options.seconds, min(gpus, options.replicas)
    store = Store(str(folder / f"run-{gpus}-{raylets}"))
    store.ensure()
    known = make_sources(store, shards)
    tasks = tasks_for(gpus, count, seconds)
    # Ray starts a worker ahead for each CPU; one is enough, since only the stages work here.
    here = {"num_cpus": 1, "num_gpus": gpus // raylets}
    cluster = Cluster(initialize_head=True, head_node_args=here)
    try:
        for _ in range(raylets - 1):
            cluster.add_node(**here)
        with (
            connected(EngineConfig(address=cluster.address), folder / "ray.log") as board,
            _Watch() as watch,
        ):
            started = time.time()
            run_shards(
                store,
                tasks,
                lambda: plan_shards(tasks, known, store.record_names(), {}),
                board,
            )
            wall = time.time() - started
    finally:
        cluster.shutdown()
    done = [record for record in store.read_records(store.record_names()) if record.stage in _PARTS]
    assert len(done) == len(_PARTS) * shards, "shards are missing"
    asleep = [
        (r.started, r.started + seconds * replicas(count)[r.stage] / gpus, gpus // count)
        for r in done
    ]
    begin, end = min(r.started for r in done), max(r.finished for r in done)
    edge = (end - begin) / 4
    quarter = max(1, len(watch.bytes) // 4)
    return Result(
        wall,
        (wall - shards * seconds / gpus) / shards,
        _idle(asleep, begin, end, gpus),
        _idle(asleep, begin + edge, end - edge, gpus),
        (max(watch.bytes[quarter : 2 * quarter] or watch.bytes), max(watch.bytes[-quarter:])),
    )


def _idle(asleep: list[tuple[float, float, int]], begin: float, end: float, gpus: int) -> float:
    """Share of GPU time between ``begin`` and ``end`` in which nothing slept; of each sleep its
    start, its end and the GPUs that it held."""
    busy = sum(max(0.0, min(b, end) - max(a, begin)) * held for a, b, held in asleep)
    return 1 - busy / ((end - begin) * gpus)


def _own_memory() -> int:
    """PSS of this process, bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024


class _Watch:
    """PSS of this process, once a second."""

    def __init__(self) -> None:
        self.bytes = [_own_memory()]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        while not self._stop.wait(1.0):
            self.bytes.append(_own_memory())

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def by_gpus(options: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    print("  GPUs  shards/s   wall s   overhead ms/shard   GPU idle   steady"
          "   driver MiB: 2nd quarter, last")  # fmt: skip
    rows: list[dict[str, object]] = []
    for gpus in options.gpus:
        found = measure(gpus, min(_NODES, gpus // 4), options, folder)
        early, late = (held / 2**20 for held in found.memory)
        print(f"{gpus:6d} {options.shards / found.wall:9.1f} {found.wall:8.1f}"
              f" {1e3 * found.overhead:19.2f} {found.idle:10.1%} {found.steady:8.1%}"
              f"   {early:.0f}, {late:.0f}", flush=True)  # fmt: skip
        told = {"against": f"{options.shards} shards, {gpus} fake GPUs", "ratio": None}
        rows += [
            {"metric": "overhead a shard", "value": found.overhead, "unit": "s", **told},
            {"metric": "GPU idle share", "value": found.idle, "unit": "1", **told},
            {"metric": "GPU idle share, steady", "value": found.steady, "unit": "1", **told},
            {"metric": "driver memory", "value": late, "unit": "MiB", **told,
             "ratio": late / early},
        ]  # fmt: skip
    return rows


def two_raylets(options: argparse.Namespace, folder: Path) -> list[dict[str, object]]:
    """The same replicas and work on one node and on two."""
    gpus = options.gpus[0]
    one, two = (measure(gpus, n, options, folder).wall for n in (1, 2))
    print(f"one raylet {one:.1f} s, two {two:.1f} s: efficiency {one / two:.1%}")
    return [{"metric": "two raylets: wall", "value": two, "unit": "s",
             "against": "one raylet", "ratio": one / two}]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--gpus", type=int, nargs="+", default=[4, 8], help="fake GPUs, at least 4")
    parser.add_argument("--replicas", type=int, default=64, help="of all GPU stages, at most")
    parser.add_argument("--shards", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=0.5, help="GPU time of a shard")
    parser.add_argument("--raylets", action="store_true", help="only: two raylets against one")
    options = parser.parse_args(arguments)
    for gpus in options.gpus:
        count, nodes = min(gpus, options.replicas), min(_NODES, gpus // 4)
        if gpus < 4 or gpus % count or gpus % nodes:
            parser.error(f"--gpus {gpus}: not a multiple of {count} replicas and {nodes} nodes")
    with tempfile.TemporaryDirectory() as scratch:
        rows = (two_raylets if options.raylets else by_gpus)(options, Path(scratch))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    sys.exit(main())
