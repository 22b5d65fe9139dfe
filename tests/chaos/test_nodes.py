"""Nodes that join a cluster while shards are worked on, and nodes that leave it."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray

from pipeline.config import EngineConfig
from pipeline.dag import plan_shards
from pipeline.engine.cluster import connected
from pipeline.engine.isolate import run_alone
from pipeline.store import Store
from tests.chaos.test_sharing import (  # noqa: F401
    Shared,
    SharedTask,
    check_all_succeeded,
    cluster,
)
from tests.integration.fakes import make_shards, run, statuses


def test_nodes_that_join_are_used_and_nodes_that_leave_are_survived(cluster, tmp_path):  # noqa: F811
    folder = tmp_path / "marks"
    folder.mkdir()
    store = Store(str(tmp_path / "run"))
    shards = make_shards(store, [[f"s{n}"] for n in range(40)])
    slow = Shared(cpus=0.5, gpus=1, replicas=2, seconds=1.0, marks=str(folder))
    tasks = [SharedTask("download", 1, Shared(cpus=0.1)), SharedTask("caption", 1, slow)]

    with (
        connected(EngineConfig(address=cluster.address), tmp_path / "ray.log") as board,
        ThreadPoolExecutor(1) as pool,
    ):
        going = pool.submit(run, store, shards, board, tasks)
        node = cluster.add_node(num_cpus=1, num_gpus=1)  # sets signal handlers: this thread only
        while len(list(folder.iterdir())) < 2 and not going.done():
            time.sleep(0.1)
        cluster.remove_node(node, allow_graceful=False)
        records = going.result()
        assert ray.get(board.read.remote()).done == {"download": 40, "caption": 40}
    assert len(list(folder.iterdir())) >= 2, "the node that joined had no work"
    check_all_succeeded(store, records)


class FirstStays(SharedTask):
    """Marks its node; where it is the first, it works until the node is gone."""

    def build(self, model):
        config = self.config

        class Staying(type(super().build(model))):
            def process(self, table):
                Path(config.marks, ray.get_runtime_context().get_node_id()).touch()
                end = time.monotonic() + config.seconds
                while len(list(Path(config.marks).iterdir())) < 2 and time.monotonic() < end:
                    time.sleep(0.05)
                return self.failed(table, "success", "")

        return Staying(config)


def test_a_shard_that_is_run_alone_survives_the_loss_of_its_node(cluster, tmp_path):  # noqa: F811
    marks = tmp_path / "marks"
    marks.mkdir()
    store = Store(str(tmp_path / "run"))
    shards = make_shards(store, [["a", "b"]])
    # Whole nodes, so that it is never the driver's.
    task = FirstStays("caption", 1, Shared(cpus=1, gpus=2, seconds=120.0, marks=str(marks)))
    download = SharedTask("download", 1, Shared(cpus=0.1))
    nodes = [cluster.add_node(num_cpus=1, num_gpus=2) for _ in range(2)]
    with (
        connected(EngineConfig(address=cluster.address), tmp_path / "ray.log") as board,
        ThreadPoolExecutor(1) as pool,
    ):
        run(store, shards, board, [download])
        (job,) = plan_shards([download, task], shards, store.record_names(), {})
        going = pool.submit(run_alone, store, task, job)
        while not (found := list(marks.iterdir())) and not going.done():
            time.sleep(0.1)
        assert found, going.result()
        (held,) = (node for node in nodes if node.node_id == found[0].name)
        cluster.remove_node(held, allow_graceful=False)
        going.result()
    assert {mark.name for mark in marks.iterdir()} == {node.node_id for node in nodes}
    assert statuses(store, {job.shard: job.records}) == {"a": "success", "b": "success"}
