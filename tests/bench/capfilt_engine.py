"""Captioning from store to store, and over many images; run by `tests.bench.capfilt`."""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from pipeline.config import EngineConfig
from pipeline.dag import ShardTask, plan_shards
from pipeline.engine import shard as shards
from pipeline.engine.cluster import connected
from pipeline.engine.data import run_shards
from pipeline.records import record_name
from pipeline.store import Store
from stages.base import Resources
from stages.caption import CaptionConfig, CaptionStage
from stages.download import DownloadConfig
from stages.models.config import GenerationConfig
from stages.models.images import decode
from stages.schemas import DOWNLOAD, IMAGES
from tests.bench import blip
from tests.bench.memory import tree_memory
from tests.tables import filled

_SHARDS = 4
_TABLE = 200


def store_to_store(
    options: argparse.Namespace, folder: Path, generation: GenerationConfig
) -> list[dict[str, object]]:
    """Shards of images in a store, captioned through Ray, against the captioner alone.

    Both decode the same files. The first shard, which waits for the weights, is left out of the
    engine's time; reading, checking and publishing of the others is in it.
    """
    files = pictures(options.images, options.quick)
    config = CaptionConfig(
        model=str(folder / "captioner"),
        batch_size=options.batch[0],
        precision=options.dtype,
        device=options.device,
        threads=options.threads,
        generation=generation,
        resources=Resources(
            cpus=float(options.threads), gpus=1.0 if options.device == "cuda" else 0.0
        ),
    )
    with connected(EngineConfig(cpus=options.threads), folder / "ray.log") as board:
        engine = _engine_rate(files, config, Store(str(folder / "run")), board)
    bare = _bare_rate(files, config)
    print(f"captions, store to store {engine:9.3f} images/s, {engine / bare:.1%} of the class's")
    print(f"captions, the class      {bare:9.3f} images/s")
    row = {"metric": "captions: store to store", "value": engine, "unit": "images/s",
           "against": "the class alone", "ratio": engine / bare}  # fmt: skip
    return [row]


def pictures(count: int, quick: bool) -> list[bytes]:
    return blip.pictures(count, (64, 48) if quick else (640, 480))


def _engine_rate(files: list[bytes], config: CaptionConfig, store: Store, board: object) -> float:
    store.ensure()
    # Records carry the time; a model's name stands for its hash here.
    caption = ShardTask("caption", 1, config, config.model, weights="bench")
    tasks = [ShardTask("download", 1, DownloadConfig()), caption]
    known = {
        f"{number:06d}": ("web", record_name("sources", None, f"{number:06d}", "0" * 16))
        for number in range(_SHARDS + 1)
    }
    planned = plan_shards(tasks, known, set(), {})
    for job in planned:
        shards.publish(tasks[0], job, _download(job.shard, files), store, time.time())
    run_shards(store, tasks, lambda: plan_shards(tasks, known, store.record_names(), {}), board)
    done = sorted(store.read_record(job.records["caption"]).finished for job in planned)
    return _SHARDS * len(files) / (done[-1] - done[0])


def _download(shard: str, files: list[bytes]) -> pa.Table:
    """A shard as download leaves it; the keys differ between shards."""
    rows = [
        {
            "row_id": f"{shard}-{number}",
            "sample_id": f"{shard}-{number}",
            "image": data,
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        for number, data in enumerate(files)
    ]
    return filled(DOWNLOAD, rows, status="success", source="web", text="")


def _bare_rate(files: list[bytes], config: CaptionConfig) -> float:
    stage = CaptionStage(config)
    stage.setup()
    captioner = stage.model
    keys = [hashlib.sha256(data).digest() for data in files]
    captioner([decode(files[0])], keys[:1], config.generation)
    started = time.perf_counter()
    for _ in range(_SHARDS):
        captioner([decode(data) for data in files], keys, config.generation)
    return _SHARDS * len(files) / (time.perf_counter() - started)


def memory(
    options: argparse.Namespace, folder: Path, generation: GenerationConfig
) -> list[dict[str, object]]:
    """Bytes of this process while the caption stage works through ``--memory`` images."""
    config = CaptionConfig(
        model=str(folder / "captioner"),
        batch_size=options.batch[0],
        precision=options.dtype,
        device=options.device,
        threads=options.threads,
        generation=generation,
    )
    stage = CaptionStage(config)
    stage.setup()
    held = []
    for table in _tables(options.memory, options.quick):
        stage.process(table)
        held.append(tree_memory(os.getpid()) / 2**20)
    part = max(1, len(held) // 4)
    early, late = max(held[part : 2 * part] or held), max(held[-part:])
    print(f"memory over {options.memory} images: {early:.0f} MiB in the second quarter, "
          f"{late:.0f} MiB in the last")  # fmt: skip
    row = {"metric": "captions: memory", "value": late, "unit": "MiB",
           "against": "second quarter", "ratio": late / early}  # fmt: skip
    return [row]


def _tables(count: int, quick: bool) -> Iterator[pa.Table]:
    files = pictures(min(count, _TABLE), quick)
    for start in range(0, count, _TABLE):
        rows = [
            {"sample_id": str(start + at), "image": data, "sha256": f"{start + at:064x}"}
            for at, data in enumerate(files[: count - start])
        ]
        yield filled(IMAGES, rows)
