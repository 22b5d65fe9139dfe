"""A download whose workers are killed again and again: is anything lost, doubled or mistold?

    python -m tests.bench.chaos [--json FILE] [--urls 4000] [--kills 10]

A local server in a process of its own serves every image under a URL of its own, and every third
URL is a fault. The real engine downloads them on two CPUs; whenever another share of the shards
is done, one of its workers, found among this process's own descendants, gets SIGKILL. Then each
row is held against the server's truth. Exit code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import EngineConfig
from pipeline.dag import ShardJob, ShardTask, plan_shards
from pipeline.engine.cluster import connected
from pipeline.engine.data import run_shards
from pipeline.engine.shard import load
from pipeline.sources import known_shards, link_shards, publish_cut
from pipeline.store import Store
from stages.base import LocalContext
from stages.download import DownloadConfig
from stages.ingest import IngestConfig, IngestStage, list_files
from stages.readers import SourceConfig
from tests.bench.download import FAULTS, photo
from tests.bench.memory import tree
from tests.servers import WebServer

_DISTINCT = 20
_CPUS = 2


def serve(pipe: Any, images: int) -> None:
    """The server's process: sends its address, ends when told to."""
    with WebServer() as web:
        bodies = [photo(number) for number in range(_DISTINCT)]
        for number in range(images):
            web.serve(f"/{number}.jpg", bodies[number % _DISTINCT])
        pipe.send(web.address)
        pipe.recv()


def paths(urls: int) -> list[str]:
    """What is asked of the server, row by row."""
    faults = list(FAULTS)
    return [faults[n // 3 % len(faults)] if n % 3 == 2 else f"/{n}.jpg" for n in range(urls)]


class Killer(threading.Thread):
    """Kills one worker each time that another share of the shards is published."""

    def __init__(self, store: Store, shards: int, kills: int) -> None:
        super().__init__(daemon=True)
        self.killed: list[int] = []
        self._store, self._shards, self._kills = store, shards, kills
        self._over = threading.Event()

    def run(self) -> None:
        for number in range(self._kills):
            while len(published(self._store)) < number * self._shards // self._kills:
                if self._over.wait(0.02):
                    return
            while (victim := self._worker()) is None:
                if self._over.wait(0.02):
                    return
            os.kill(victim, signal.SIGKILL)
            self.killed.append(victim)

    def end(self) -> None:
        self._over.set()
        self.join()

    def _worker(self) -> int | None:
        """A worker of the download, started by this very process."""
        for pid in tree(os.getpid())[1:]:
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue  # it ended while we looked
            if b"StageWorker" in command and pid not in self.killed:
                return pid
        return None


def published(store: Store) -> list[str]:
    """Records of the download."""
    return [name for name in store.record_names() if "/stage=download/" in name]


def cut(store: Store, asked: list[str], size: int) -> dict[str, tuple[str, str]]:
    """Shards of ``size`` rows; returns the name of each with its kind and source record."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        urls = [f"http://web.test{path}" for path in asked]
        texts = [f"text {number}" for number in range(len(asked))]
        pq.write_table(pa.table({"url": urls, "text": texts}), folder / "list.parquet")
        (file,) = list_files(SourceConfig(path=str(folder / "list.parquet")))
        (folder / "out").mkdir()
        config = IngestConfig(shard_size=size, language=False)
        IngestStage(config, [file]).run({}, folder / "out", LocalContext())
        payloads = tuple(
            store.put_unique(f"sources/{shard.stem}", ".parquet", shard)
            for shard in sorted((folder / "out").iterdir())
        )
    details = {"file": file.path, "kind": file.origin, "identity": file.identity}
    cut = publish_cut(store, "chaos", payloads, details, 0.0)
    link_shards(store, [cut], set())
    return known_shards([cut])


def download(store: Store, asked: list[str], address: str, size: int, kills: int) -> dict[str, int]:
    """Download all of it under fire; returns what is wrong, thing by thing, and the kills."""
    shards = cut(store, asked, size)
    config = DownloadConfig(
        image_size=128,
        threads=16,
        retries=0,
        host_connections=32,
        host_failures=10**6,
        connect_to={"web.test": address},
    )
    tasks = [ShardTask("download", 0, config)]

    def plan() -> list[ShardJob]:
        return plan_shards(tasks, shards, store.record_names(), {})

    killer = Killer(store, len(shards), kills)
    with connected(EngineConfig(cpus=_CPUS), Path(store.root) / "logs" / "ray.log") as board:
        killer.start()
        run_shards(store, tasks, plan, board)
        killer.end()
    return {"workers killed": len(killer.killed), **wrongs(store, shards, asked)}


def wrongs(store: Store, shards: dict[str, tuple[str, str]], asked: list[str]) -> dict[str, int]:
    """How many shards and rows are not as they should be."""
    records = [store.read_record(name) for name in published(store)]
    of_shard = Counter(record.shard for record in records)
    truth = Counter(
        (f"text {number}", FAULTS.get(path, ("success", 200))[0])
        for number, path in enumerate(asked)
    )
    found: Counter[tuple[str, str]] = Counter()
    lost_images = 0
    for record in records:
        table = load(record.name, store)
        found.update(zip(table["text"].to_pylist(), table["status"].to_pylist(), strict=True))
        of_samples = set(
            table.filter(pc.equal(table["status"], "success"))["sample_id"].to_pylist()
        )
        lost_images += len(of_samples) - (len(table) - table["image"].null_count)
    rows = Counter(text for text, _ in found.elements())
    return {
        "shards without exactly one record": sum(of_shard[shard] != 1 for shard in shards)
        + len(of_shard.keys() - shards.keys()),
        "rows lost or doubled": sum(rows[f"text {number}"] != 1 for number in range(len(asked))),
        "rows with another status than the server's truth": (truth - found).total(),
        "images lost": lost_images,
    }


def run(urls: int, kills: int, size: int) -> dict[str, int]:
    """All of it, in a folder of its own."""
    asked = paths(urls)
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    server = context.Process(target=serve, args=(other, urls), daemon=True)
    server.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            return download(Store(folder), asked, pipe.recv(), size, kills)
    finally:
        pipe.send("end")
        server.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--urls", type=int, default=4000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--shard-size", type=int, default=100)
    options = parser.parse_args()
    found = run(options.urls, options.kills, options.shard_size)
    for metric, value in found.items():
        print(f"{metric:50} {value:8,}")
    if options.json is not None:
        results = [
            {"metric": metric, "value": value, "unit": "", "against": "truth", "ratio": None}
            for metric, value in found.items()
        ]
        options.json.write_text(json.dumps(results, indent=1))
    killed = found.pop("workers killed")
    return int(killed < options.kills or any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
