"""Nodes that join a cluster while shards are worked on, and nodes that leave it."""

import time
from concurrent.futures import ThreadPoolExecutor

from pipeline.config import EngineConfig
from pipeline.engine.cluster import connected
from pipeline.store import Store
from tests.chaos.test_sharing import (  # noqa: F401
    Shared,
    SharedTask,
    check_all_succeeded,
    cluster,
)
from tests.integration.test_engine import make_shards, run


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
    assert len(list(folder.iterdir())) >= 2, "the node that joined had no work"
    check_all_succeeded(store, records)
