"""Captioning and filtering from store to store, and all three models over many images; run by
`tests.bench.capfilt`."""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.config import EngineConfig
from pipeline.dag import ShardTask, plan_shards
from pipeline.engine import shard as shards
from pipeline.engine.cluster import connected
from pipeline.engine.data import run_shards
from pipeline.records import record_name
from pipeline.store import Store
from stages.base import Resources, ShardStage
from stages.caption import CaptionConfig, CaptionStage
from stages.download import DownloadConfig
from stages.embed import EmbedConfig, EmbedStage
from stages.filter import FilterConfig, FilterStage
from stages.inference import batches
from stages.models.config import GenerationConfig
from stages.schemas import DOWNLOAD, IMAGES_WITH_TEXTS
from tests.bench import blip
from tests.bench.memory import tree_memory
from tests.tables import filled

_SHARDS = 4
_TABLE = 200
_SIZE = 640, 480
_WEB_TEXT = "a big red round picture on the small green square"


def store_to_store(
    options: argparse.Namespace, folder: Path, generation: GenerationConfig
) -> list[dict[str, object]]:
    """Shards of images in a store, captioned, then scored with that caption and a web text, through
    Ray; against captioner and matcher alone.

    Both decode the same files ahead of the model, in the same threads, and score the same texts. A
    stage's first shard, which waits for the weights, is left out of the engine's time; reading,
    checking and publishing of the others is in it.
    """
    files = pictures(options.images, options.quick)
    caption, filtered = stages(options, folder, generation)[:2]
    store = Store(str(folder / "run"))
    with connected(EngineConfig(cpus=options.threads), folder / "ray.log") as board:
        rates = _engine_rates(files, [caption, filtered], store, board)
        captions = _captions(store)
    bare = {"caption": _bare_captions(files, caption.config),
            "filter": _bare_scores(files, captions, filtered.config)}  # fmt: skip
    rates["caption + filter"], bare["caption + filter"] = (
        1 / sum(1 / rate for rate in of.values()) for of in (rates, bare)
    )
    for name, rate in rates.items():
        print(f"{name:<16} store to store {rate:9.3f} images/s, {rate / bare[name]:.1%} of "
              f"the classes' {bare[name]:.3f}")  # fmt: skip
    return [
        {"metric": f"{name}: store to store", "value": rate, "unit": "images/s",
         "against": "the class alone", "ratio": rate / bare[name]}
        for name, rate in rates.items()
    ]  # fmt: skip


def stages(
    options: argparse.Namespace, folder: Path, generation: GenerationConfig
) -> tuple[CaptionStage, FilterStage, EmbedStage]:
    """The stages that have a model, as ``options`` say."""
    gpus = 1.0 if options.device == "cuda" else 0.0
    common: dict[str, Any] = {
        "batch_size": options.batch[0],
        "precision": options.dtype,
        "device": options.device,
        "threads": options.threads,
        "decode_threads": options.resize_threads,
        "resources": Resources(cpus=float(options.threads), gpus=gpus),
    }
    matcher = str(folder / "matcher")
    captioner = str(folder / "captioner")
    return (
        CaptionStage(CaptionConfig(model=captioner, generation=generation, **common)),
        FilterStage(FilterConfig(model=matcher, **common)),
        EmbedStage(EmbedConfig(model=matcher, **common)),
    )


def pictures(count: int, quick: bool) -> list[bytes]:
    return blip.pictures(count, (64, 48) if quick else _SIZE)


def _engine_rates(
    files: list[bytes], timed: Sequence[ShardStage], store: Store, board: object
) -> dict[str, float]:
    """Images a second of each stage, one run after the other."""
    store.ensure()
    # Records carry the time; a model's name stands for its hash here.
    tasks = [
        ShardTask("download", 1, DownloadConfig()),
        *(ShardTask(s.name, 1, s.config, s.config.model, weights="bench") for s in timed),
    ]
    known = {
        f"{number:06d}": ("web", record_name("sources", None, f"{number:06d}", "0" * 16))
        for number in range(_SHARDS + 1)
    }
    for job in plan_shards(tasks, known, set(), {}):
        shards.publish(tasks[0], job, _download(job.shard, files), store, time.time())
    rates = {}
    for last in range(2, len(tasks) + 1):
        now = tasks[:last]

        def plan(now: list[ShardTask] = now) -> list[Any]:
            return plan_shards(now, known, store.record_names(), {})

        run_shards(store, now, plan, board)
        name = now[-1].name
        done = sorted(store.read_record(job.records[name]).finished for job in plan())
        rates[name] = _SHARDS * len(files) / (done[-1] - done[0])
    return rates


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
    return filled(DOWNLOAD, rows, status="success", source="web", text=_WEB_TEXT)


def _captions(store: Store) -> list[str]:
    """What the engine wrote for the pictures of one shard."""
    name = max(name for name in store.record_names() if "/stage=caption/" in name)
    return [str(text) for text in shards.load(name, store)["text"].to_pylist()]


def _bare_captions(files: list[bytes], config: CaptionConfig) -> float:
    stage = CaptionStage(config)
    stage.setup()
    keys = [hashlib.sha256(data).digest() for data in files]
    return _rate(
        files, stage, lambda images, own: stage.model(images, own, config.generation), keys
    )


def _bare_scores(files: list[bytes], captions: list[str], config: FilterConfig) -> float:
    stage = FilterStage(config)
    stage.setup()
    texts = [[_WEB_TEXT, caption] for caption in captions]
    return _rate(files, stage, stage.model.match, texts)


def _rate(
    files: list[bytes], stage: CaptionStage | FilterStage, run: Any, beside: list[Any]
) -> float:
    model, threads = stage.model, stage.config.decode_threads

    def once(some: list[bytes]) -> None:
        table = pa.table({"image": some})
        for batch in batches(
            table, model.batch_size, model.preprocessing, {}, threads, model.device
        ):
            run(batch.pixels, [beside[row] for row in batch.rows])

    once(files[: model.batch_size])
    started = time.perf_counter()
    for _ in range(_SHARDS):
        once(files)
    return _SHARDS * len(files) / (time.perf_counter() - started)


def memory(
    options: argparse.Namespace, folder: Path, generation: GenerationConfig
) -> list[dict[str, object]]:
    """Bytes of this process while each stage with a model works through ``--memory`` images."""
    rows: list[dict[str, object]] = []
    for stage in stages(options, folder, generation):
        stage.setup()
        held = []
        for table in _tables(options.memory, stage.input_schema):
            stage.process(table)
            held.append(tree_memory(os.getpid()) / 2**20)
        part = max(1, len(held) // 4)
        early, late = max(held[part : 2 * part] or held), max(held[-part:])
        print(f"{stage.name:<8} memory over {options.memory} images: {early:.0f} MiB in the second "
              f"quarter, {late:.0f} MiB in the last")  # fmt: skip
        rows.append({"metric": f"{stage.name}: memory", "value": late, "unit": "MiB",
                     "against": "second quarter", "ratio": late / early})  # fmt: skip
    return rows


def _tables(count: int, schema: pa.Schema) -> Iterator[pa.Table]:
    files = blip.pictures(min(count, _TABLE), _SIZE)
    for start in range(0, count, _TABLE):
        rows: list[dict[str, object]] = []
        for at, data in enumerate(files[: count - start]):
            name = f"{start + at:064x}"
            row = {"sample_id": name, "image": data, "sha256": name}
            if schema == IMAGES_WITH_TEXTS:
                own = {"texts": [_WEB_TEXT, name], "owners": [name] * 2, "sources": ["web"] * 2}
                row |= own
            rows.append(row)
        yield filled(schema, rows)
