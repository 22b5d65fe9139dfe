"""Training on two nodes, then on one: the number of workers may change between rounds."""

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.config import EngineConfig
from pipeline.dag import DatasetTask, Published
from pipeline.engine.cluster import connected
from pipeline.engine.placement import nodes
from pipeline.engine.train import run_training
from pipeline.store import Store
from stages.base import Context, DatasetStage
from stages.errors import ConfigError


class Group(DatasetStage):
    """Adds up what all ranks give; every rank marks its node and writes, and one is published."""

    name, version = "pretrain", 1

    def __init__(self, marks: Path) -> None:
        self.marks = marks

    def run(self, inputs: Mapping[str, Sequence[Path]], output_dir: Path, ctx: Context) -> None:
        import torch

        total = torch.tensor(ctx.rank + 1.0)
        if ctx.world_size > 1:
            torch.distributed.all_reduce(total)
        (self.marks / ray.get_runtime_context().get_node_id()).touch()
        before = "".join(path.read_text() for path in inputs.get("before", ()))
        text = f"{before}{ctx.world_size} workers: {total:g}; "
        (output_dir / f"rank-{ctx.rank}").write_text(text)


def task_of(marks: Path, number: int, before: DatasetTask | None = None) -> DatasetTask:
    marks.mkdir()
    inputs = {} if before is None else {"before": Published((before.record,), "*/rank-*")}
    return DatasetTask(Group(marks), number, "0" * 16, f"round={number:02d}/models", inputs)


@pytest.mark.timeout(300)
def test_rounds_are_trained_by_as_many_workers_as_there_are(tmp_path: Path) -> None:
    node = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    store = Store(str(tmp_path / "run"))
    first = task_of(tmp_path / "first", 0)
    second = task_of(tmp_path / "second", 1, first)
    two, one = (EngineConfig(address=cluster.address, train_workers=n) for n in (2, 1))
    try:
        leaving = cluster.add_node(num_cpus=1)
        with connected(two, tmp_path / "ray.log") as board:
            run_training(store, [first], two, board)
            assert len(list((tmp_path / "first").iterdir())) == 2  # a node each
            cluster.remove_node(leaving, allow_graceful=False)
            while len(nodes()) > 1:
                time.sleep(0.1)
            with pytest.raises(
                ConfigError, match=r"engine\.train_workers: 2 workers .* the 1 nodes"
            ):
                run_training(store, [first, second], two, board)
            run_training(store, [first, second], one, board)
    finally:
        cluster.shutdown()
    (published,) = store.read_record(first.record).payloads
    assert published.path.endswith("/rank-0")
    (published,) = store.read_record(second.record).payloads
    assert store.read_bytes(published.path) == b"2 workers: 3; 1 workers: 1; "


class Halting(DatasetStage):
    """Counts its steps in a checkpoint; the first worker on each node waits at the third one."""

    name, version = "pretrain", 1

    def __init__(self, marks: Path) -> None:
        self.marks = marks

    def run(self, inputs: Mapping[str, Sequence[Path]], output_dir: Path, ctx: Context) -> None:
        node = ray.get_runtime_context().get_node_id()
        last = ctx.resume_from()
        begun = 0 if last is None else int((last / "steps").read_text())
        (self.marks / f"{time.time_ns()}-{node}-{begun}").touch()
        for step in range(begun, 5):
            if step == 3 and begun == 0:
                time.sleep(600)  # until its node leaves
            ctx.save(lambda folder, done=step + 1: (folder / "steps").write_text(str(done)))
        (output_dir / "steps").write_text("5")


@pytest.mark.timeout(300)
def test_training_goes_on_elsewhere_when_its_node_leaves(tmp_path: Path) -> None:
    """The head has no CPU for training, so the worker is on the node that leaves, and then on the
    one that has joined; from its last checkpoint."""
    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    store, marks = Store(str(tmp_path / "run")), tmp_path / "marks"
    marks.mkdir()
    task = DatasetTask(Halting(marks), 0, "0" * 16, "round=00/models", {})
    try:
        leaving = cluster.add_node(num_cpus=1)
        config = EngineConfig(address=cluster.address, train_workers=1)
        with (
            connected(config, tmp_path / "ray.log") as board,
            ThreadPoolExecutor(1) as pool,
        ):
            going = pool.submit(run_training, store, [task], config, board)
            checkpoint = store.path(f"scratch/checkpoints/pretrain-{'0' * 16}/last.json")
            while not going.done() and not saved(checkpoint, 3):
                time.sleep(0.1)
            cluster.add_node(num_cpus=1)
            cluster.remove_node(leaving, allow_graceful=False)
            going.result()
    finally:
        cluster.shutdown()
    first, second = (mark.name.split("-") for mark in sorted(marks.iterdir()))
    assert first[1] != second[1]
    assert (first[2], second[2]) == ("0", "3")
    assert store.exists(task.record)


def saved(pointer: str, steps: int) -> bool:
    """Whether the checkpoint that ``pointer`` names has so many steps."""
    try:
        folder = json.loads(Path(pointer).read_text())["folder"]
        root = Path(pointer).parents[3]
        return int((root / folder / "steps").read_text()) >= steps
    except (FileNotFoundError, json.JSONDecodeError):
        return False
