"""Work on two Ray nodes that are not alike, and the files that go with what is mapped."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import get_current_placement_group

from pipeline.config import EngineConfig
from pipeline.engine import cluster
from pipeline.engine.board import Board
from pipeline.engine.dataset import run_dataset
from pipeline.engine.spread import SharedFile, Spread, machines
from pipeline.engine.train import run_training
from pipeline.plan import dataset_task
from pipeline.store import Store
from stages.base import Context, DatasetStage, LocalContext, Resources
from stages.dedup import SearchConfig, search
from stages.dedup.images import Vectors
from stages.evaluate import EvaluateConfig, EvaluateStage

_PATIENCE = 120.0


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)  # type: ignore[no-untyped-call]
    try:
        kind = {"accelerator_type:H100": 1}
        cluster.add_node(num_cpus=1, num_gpus=1, resources=kind, object_store_memory=80 << 20)  # type: ignore[no-untyped-call]
        ray.init(address=cluster.address, log_to_driver=False)
        yield
    finally:
        ray.shutdown()  # type: ignore[no-untyped-call]
        cluster.shutdown()  # type: ignore[no-untyped-call]


def test_work_runs_on_every_node_and_finds_its_files(tmp_path: Path, two_nodes: None) -> None:
    store = Store(str(tmp_path / "run"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "data").write_text("what was written")

    def meet(number: int) -> tuple[str, str]:
        """Ends only when another node with one CPU works at the same time."""
        (tmp_path / f"here-{number}").touch()
        end = time.monotonic() + _PATIENCE
        while not (tmp_path / f"here-{1 - number}").exists():
            assert time.monotonic() < end, "nobody else came"
            time.sleep(0.05)
        return ray.get_runtime_context().get_node_id(), (scratch / "data").read_text()

    spread = Spread(store, "dedup")
    found = spread.map(meet, [0, 1], [scratch])
    assert {node for node, _ in found} == set(machines())
    assert {text for _, text in found} == {"what was written"}
    assert [p for p in store.files() if p.startswith("scratch/spread/")]
    spread.close()
    assert not [p for p in store.files() if p.startswith("scratch/spread/")]


def test_work_gets_the_share_of_a_gpu_that_it_asks_for(tmp_path: Path, two_nodes: None) -> None:
    spread = Spread(Store(str(tmp_path / "run")), "dedup")

    def lent(_: int) -> list[str]:
        return [str(gpu) for gpu in ray.get_gpu_ids()]

    assert spread.map(lent, [0, 1]) == [[], []]
    assert spread.map(lent, [0, 1], gpus=0.5) == [["0"], ["0"]]


def node(*_: object) -> str:
    return ray.get_runtime_context().get_node_id()  # type: ignore[no-any-return]


def test_what_outlives_workers_is_on_the_node_of_the_driver(two_nodes: None) -> None:
    for _ in range(2):  # Ray's own choice for actors without a CPU is random
        board = cluster._board(print)
        shared = ray.get(board.shared.remote("download", node))  # on the node of its board
        assert ray.get(shared.ask.remote()) == node()
        ray.kill(shared)
        ray.kill(board)


class Lent(EvaluateStage):
    """Writes down which GPUs it was given, instead of measuring."""

    def run(self, inputs: Mapping[str, Sequence[Path]], output_dir: Path, ctx: Context) -> None:
        (output_dir / "gpus").write_text(" ".join(map(str, ray.get_gpu_ids())))


@pytest.mark.parametrize(("gpus", "lent"), [(0.0, b""), (0.5, b"0")])
def test_an_evaluation_gets_the_gpu_that_its_config_asks_for(
    tmp_path: Path, two_nodes: None, gpus: float, lent: bytes
) -> None:
    config = EvaluateConfig(resources=Resources(gpus=gpus))
    task = dataset_task(Lent(config), config, 1, {})
    store, board = Store(str(tmp_path / "run")), Board.remote()  # type: ignore[attr-defined]
    (written,) = run_dataset(store, task, board).payloads
    assert store.read_bytes(written.path) == lent


class Placed(DatasetStage):
    """Writes down what its training worker holds, instead of training."""

    name, version = "pretrain", 1

    def run(self, inputs: Mapping[str, Sequence[Path]], output_dir: Path, ctx: Context) -> None:
        place = get_current_placement_group()
        assert place is not None
        (output_dir / "held").write_text(json.dumps(place.bundle_specs))


def test_training_gets_the_kind_of_node_and_the_memory_that_its_config_asks_for(
    tmp_path: Path, two_nodes: None
) -> None:
    config = EngineConfig(train_cpus=0.5, train_memory_gb=0.125, train_accelerator="H100")
    task = dataset_task(Placed(), None, 1, {})
    store, board = Store(str(tmp_path / "run")), Board.remote()  # type: ignore[attr-defined]
    run_training(store, [task], config, board)
    (written,) = store.read_record(task.record).payloads
    (held,) = json.loads(store.read_bytes(written.path))
    assert held == {"CPU": 0.5, "memory": 128 << 20, "accelerator_type:H100": 0.001}


def test_a_search_finds_the_same_on_two_nodes(tmp_path: Path, two_nodes: None) -> None:
    rng = np.random.default_rng(0)
    vectors = Vectors(tmp_path / "vectors.f16", 3_000, 32)
    rows = np.arange(3_000)
    values = rng.normal(size=(3_000, 32))
    values[1::5] = values[::5] + 0.05 * rng.normal(size=(600, 32))
    vectors.write(rows, values.astype(np.float16))
    fresh, config = (
        np.ones(3_000, dtype=np.bool_),
        SearchConfig(exhaustive_below=0, bits=5, tables=400),
    )
    found, spreaded = [], []
    spread = Spread(Store(str(tmp_path / "run")), "dedup")

    class Spreading(LocalContext):
        def map(self, function, items, reads=(), gpus=0.0):  # type: ignore[no-untyped-def]
            spreaded.append(len(items))
            return spread.map(function, items, reads, gpus)

    for context in (LocalContext(), Spreading()):
        scratch = tmp_path / type(context).__name__
        scratch.mkdir()
        ties, measured = search.close_pairs(vectors, rows, fresh, 0.95, config, context, scratch)
        found.append((ties.pairs, sorted(zip(ties.left, ties.right, strict=True)), measured))
    assert found[0] == found[1] and found[0][0] >= 600
    assert spreaded == [400]
    spread.close()


def test_a_machine_fetches_what_it_lacks_once_and_anew_when_it_changed(tmp_path: Path) -> None:
    store, path = Store(str(tmp_path / "run")), tmp_path / "scratch" / "data"
    path.parent.mkdir()
    first, second = (SharedFile(path, f"scratch/spread/x/{n}", mark) for n, mark in enumerate("ab"))
    path.write_text("first")
    first.share(store)
    assert first.here()
    # Another machine: nothing lies there.
    first.drop()
    assert not path.parent.exists()
    first.fetch(store)
    assert path.read_text() == "first" and first.here() and not second.here()
    store.remove(first.stored)
    first.fetch(store)  # it is here: the store is not asked again
    path.write_text("second")
    second.share(store)
    assert second.here() and not first.here()
    second.drop()
    assert not path.parent.exists()
