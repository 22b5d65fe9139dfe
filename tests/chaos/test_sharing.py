"""Stages that share a cluster with a fake GPU."""

import os
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.config import EngineConfig
from pipeline.engine.cluster import connected
from pipeline.store import Store
from stages.base import Resources, ShardStage
from tests.integration.fakes import Fake, FakeTask, make_shards, run


class Shared(Fake):
    gpus: float = 0.0
    replicas: int = 1
    seconds: float = 0.0


class SharedTask(FakeTask):
    """The stand-ins of the engine's test, with GPUs, more replicas, and slower."""

    def build(self, model: str | None) -> ShardStage:
        config = self.config
        made = super().build(model)

        class Placed(type(made)):
            resources = Resources(cpus=config.cpus, gpus=config.gpus, max_replicas=config.replicas)

            def process(self, table):
                time.sleep(config.seconds)
                if config.marks:
                    node = ray.get_runtime_context().get_node_id()
                    Path(config.marks, node).touch()
                return self.failed(table, "success", "")

        return Placed(config)


@pytest.fixture
def cluster():
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1})
    try:
        yield made
    finally:
        made.shutdown()


def check_all_succeeded(store, records):
    """Every shard is published, and none of its rows was quarantined."""
    names = [name for shard in records.values() for name in shard.values()]
    for record in store.read_records(names):
        assert record.stage == "sources" or set(record.counts) == {"success"}, record.name


def test_stages_share_one_gpu_and_too_few_cpus(cluster, tmp_path):
    store = Store(str(tmp_path / "run"))
    shards = make_shards(store, [[f"s{n}"] for n in range(4)])
    tasks = [
        SharedTask("download", 1, Shared(replicas=8)),
        SharedTask("caption", 1, Shared(gpus=0.5, replicas=4)),
        SharedTask("embed", 1, Shared(gpus=0.5, replicas=4)),
    ]
    with connected(EngineConfig(address=cluster.address), tmp_path / "ray.log") as board:
        check_all_succeeded(store, run(store, shards, board, tasks))


class OnOneGpu(SharedTask):
    """Each replica works until the other has a shard as well, or ``seconds`` have passed."""

    def build(self, model: str | None) -> ShardStage:
        config = self.config

        class Sharing(type(super().build(model))):
            def process(self, table):
                (gpu,) = ray.get_gpu_ids()
                Path(config.marks, f"{os.getpid()}-{gpu}").touch()
                end = time.monotonic() + config.seconds
                while len(list(Path(config.marks).iterdir())) < 2 and time.monotonic() < end:
                    time.sleep(0.05)
                return self.failed(table, "success", "")

        return Sharing(config)


def test_two_actors_of_one_stage_share_one_gpu(cluster, tmp_path):
    folder = tmp_path / "marks"
    folder.mkdir()
    store = Store(str(tmp_path / "run"))
    shards = make_shards(store, [[f"s{n}"] for n in range(8)])
    part = Shared(cpus=0.25, gpus=0.25, replicas=2, seconds=30.0, marks=str(folder))
    tasks = [SharedTask("download", 1, Shared(cpus=0.1)), OnOneGpu("caption", 1, part)]
    with connected(EngineConfig(address=cluster.address), tmp_path / "ray.log") as board:
        check_all_succeeded(store, run(store, shards, board, tasks))
    marks = [mark.name.split("-") for mark in folder.iterdir()]
    assert len({process for process, _ in marks}) == 2
    assert {gpu for _, gpu in marks} == {"0"}
