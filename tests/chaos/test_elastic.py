"""Training on two nodes, then on one: the number of workers may change between rounds."""

import time
from collections.abc import Mapping, Sequence
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
