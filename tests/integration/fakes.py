"""Stand-ins for the shard stages, which the real engine runs, and shards for them."""

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.dag import ShardTask, plan_shards
from pipeline.engine.data import run_shards
from pipeline.engine.shard import load
from pipeline.records import Record
from pipeline.store import Store
from stages.base import Config, Resources, ShardStage
from stages.errors import CheckpointError, StoreError
from stages.schemas import CAPTIONS, DOWNLOAD, EMBEDDINGS, IMAGES, SOURCES

_PATIENCE = 30.0
PNG = b"\x89PNG not decoded here"


class Fake(Config):
    """What the stand-in stages are told."""

    cpus: float = 1.0
    replicas: int = 1
    marks: str = ""


class FakeDownload(ShardStage):
    name, version = "download", 1
    input_schema, output_schema = SOURCES, DOWNLOAD

    def __init__(self, config: Fake) -> None:
        self.config = config

    @property
    def resources(self) -> Resources:
        return Resources(cpus=self.config.cpus, max_replicas=self.config.replicas)

    def shared(self) -> Callable[[], int]:
        return itertools.count(1).__next__

    def share(self, ask: Callable[[], int], worker: str) -> None:
        self._ask = ask

    def facts(self) -> dict[str, str]:
        return {"asked": str(self._ask())} if self.config.replicas > 1 else {}

    def process(self, table: pa.Table) -> pa.Table:
        return self.failed(table, "success", "")

    def failed(self, table: pa.Table, status: str, detail: str) -> pa.Table:
        rows = table.num_rows
        image = PNG if status == "success" else None
        filled = {"status": status, "detail": detail, "image": image, "sha256": "00", "phash": "00"}
        columns = {
            field.name: table[field.name]
            if field.name in table.column_names
            else pa.array([filled.get(field.name)] * rows, field.type)
            for field in DOWNLOAD
        }
        return pa.table(columns, schema=DOWNLOAD)


class FakeCaption(FakeDownload):
    """Dies, fails or succeeds as the sample's id says; leaves a mark for every call."""

    name = "caption"
    input_schema, output_schema = IMAGES, CAPTIONS

    def process(self, table: pa.Table) -> pa.Table:
        if self.config.marks:
            mark = f"{self.config.marks}/{table['sample_id'][0].as_py()}-{time.time_ns()}"
            os.close(os.open(mark, os.O_CREAT))
        for sample in table["sample_id"].to_pylist():
            if "deadly" in sample:
                os._exit(7)
            if "hungry" in sample:
                raise MemoryError(f"no memory for {sample}")
            if "broken" in sample:
                raise ValueError(f"cannot caption {sample}")
        return self.failed(table, "success", "")

    def facts(self) -> dict[str, str]:
        return {"batch_size": "1"}

    def failed(self, table: pa.Table, status: str, detail: str) -> pa.Table:
        rows = table.num_rows
        return pa.table(
            {
                "sample_id": table["sample_id"],
                "caption_index": [0] * rows,
                "text": ["a caption"] * rows,
                "status": [status] * rows,
                "detail": [detail] * rows,
                "model": [""] * rows,
            },
            schema=CAPTIONS,
        )


class FakeEmbed(FakeDownload):
    name = "embed"
    input_schema, output_schema = IMAGES, EMBEDDINGS

    def failed(self, table: pa.Table, status: str, detail: str) -> pa.Table:
        rows = table.num_rows
        return pa.table(
            {
                "sample_id": table["sample_id"],
                "embedding": [[1.0, 0.0]] * rows,
                "status": [status] * rows,
                "detail": [detail] * rows,
                "model": [""] * rows,
            },
            schema=EMBEDDINGS,
        )


class NoWeights(FakeCaption):
    def setup(self) -> None:
        if self.config.marks:
            Path(self.config.marks, "asked").touch()
        raise CheckpointError("weights/: not a BLIP captioner")


class Meeting(FakeDownload):
    """Small enough for four actors at once, and at work until three have begun to start."""

    @property
    def resources(self) -> Resources:
        return Resources(cpus=0.1, max_replicas=4)

    def process(self, table: pa.Table) -> pa.Table:
        wait_for_three(Path(self.config.marks))
        return super().process(table)


def wait_for_three(marks: Path) -> None:
    """Until three actors have begun to start; leaves a mark where they do not."""
    end = time.monotonic() + _PATIENCE
    while len(list(marks.glob("start-*"))) < 3 and not (marks / "alone").exists():
        if time.monotonic() > end:
            (marks / "alone").touch()
        time.sleep(0.05)


class FakeTask(ShardTask):
    """A task that builds stand-ins: the engine asks nothing but `build` and `fingerprint`."""

    def build(self, model: str | None) -> ShardStage:
        stages = {"download": FakeDownload, "caption": FakeCaption, "embed": FakeEmbed}
        return (NoWeights if self.weights == "none" else stages[self.name])(self.config)


class Marked(FakeDownload):
    """Leaves a mark for every shard; after twenty it waits for the captioner to be asked."""

    def process(self, table: pa.Table) -> pa.Table:
        marks, end = Path(self.config.marks), time.monotonic() + _PATIENCE
        (marks / table["sample_id"][0].as_py()).touch()
        while len(list(marks.iterdir())) > 20 and not (marks / "asked").exists():
            assert time.monotonic() < end, "nobody asked for the captioner"
            time.sleep(0.05)
        time.sleep(0.2)
        return super().process(table)


class Slow(FakeTask):
    def build(self, model: str | None) -> ShardStage:
        return Marked(self.config)


class Unsteady(FakeTask):
    """The first time, and wherever it cannot note that, the store fails its worker."""

    def build(self, model: str | None) -> ShardStage:
        stage = super().build(model)
        process = stage.process

        def failing(table: pa.Table) -> pa.Table:
            try:
                (Path(self.config.marks) / "failed").touch(exist_ok=False)
            except FileExistsError:
                return process(table)
            except FileNotFoundError:
                pass
            raise StoreError("the store is away")

        stage.process = failing
        return stage


class MeetingTask(FakeTask):
    """Where an actor starts, and is not the first, it waits until another one starts beside it.
    ``weights`` is the driver's process."""

    def build(self, model: str | None) -> ShardStage:
        return Meeting(self.config)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if os.getpid() == int(self.weights):
            return
        marks = Path(self.config.marks)
        (marks / f"start-{os.getpid()}").touch()
        if len(list(marks.glob("start-*"))) > 1:
            wait_for_three(marks)


def make_shards(store: Store, samples: list[list[str]]) -> dict[str, tuple[str, str]]:
    """Publish one source shard for each list of sample ids."""
    shards = {}
    for number, names in enumerate(samples):
        shard = f"{number:06d}"
        table = pa.table(
            {
                **{name: [None] * len(names) for name in SOURCES.names},
                "row_id": names,
                "sample_id": names,
                "source": ["web"] * len(names),
                "url": [f"http://x/{name}" for name in names],
                "text": ["a text"] * len(names),
            },
            schema=SOURCES,
        )
        payload = store.put_table(f"sources/shard={shard}", table)
        record = Record(
            stage="sources",
            stage_version=1,
            round=None,
            shard=shard,
            fingerprint=payload.sha256[:16],
            payloads=(payload,),
            code_version="0",
            started=0,
            finished=0,
        )
        store.publish(record)
        shards[shard] = ("web", record.name)
    return shards


def run(store, shards, board, tasks):
    def plan():
        return plan_shards(tasks, shards, store.record_names(), {})

    run_shards(store, tasks, plan, board)
    return {job.shard: job.records for job in plan_shards(tasks, shards, set(), {})}


def statuses(store, records, shard="000000", stage="caption"):
    table = load(records[shard][stage], store)
    return dict(zip(table["sample_id"].to_pylist(), table["status"].to_pylist(), strict=True))
