"""Training tasks on a real Ray Train: what is started again, and what is left behind."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train

from pipeline.config import EngineConfig
from pipeline.dag import DatasetTask, Published
from pipeline.engine import train
from pipeline.engine.cluster import connected
from pipeline.engine.dataset import publish_folder
from pipeline.engine.train import run_training
from pipeline.store import Store
from stages.base import Context, DatasetStage
from stages.errors import TrainingError
from tests.run_folder import publish_files
from tests.s3 import s3_bucket

CONFIG = EngineConfig(cpus=2)


class Doomed(DatasetStage):
    """Leaves a mark for every start, then does what it is told."""

    name, version = "pretrain", 1

    def __init__(self, marks: Path, fate: str) -> None:
        self.marks, self.fate = marks, fate

    def run(self, inputs: Mapping[str, Sequence[Path]], output_dir: Path, ctx: Context) -> None:
        first = not list(self.marks.iterdir())
        (self.marks / str(time.time_ns())).touch()
        if self.fate == "diverges":
            ctx.save(lambda folder: (folder / "step").touch())
            raise TrainingError("pretrain: step 3 of 9: the loss is nan")
        if first and self.fate == "dies":
            os._exit(7)
        (output_dir / "done").write_text("done")


class Reads(Doomed):
    """Wants its images here."""

    def run(self, inputs: Mapping[str, Sequence[Path]], output_dir: Path, ctx: Context) -> None:
        assert {path.suffix for path in inputs["train"] if path.exists()} == {".tar", ".parquet"}
        super().run(inputs, output_dir, ctx)


class Second(Doomed):
    name = "finetune_captioner"


class Stillborn(Doomed):
    """Its first worker dies while Ray Train hands it the training function."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if in_a_training_worker() and not list(self.marks.iterdir()):
            (self.marks / "stillborn").touch()
            os._exit(7)


def in_a_training_worker() -> bool:
    try:
        return ray.train.get_context().get_world_size() > 0
    except RuntimeError:
        return False


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_bucket(patch) as url:
        yield url


@pytest.fixture(scope="module")
def board(tmp_path_factory, bucket: str):  # Ray's workers inherit the way to the bucket
    with connected(CONFIG, tmp_path_factory.mktemp("log") / "ray.log") as board:
        yield board


def left_unfinished(store: Store) -> list[dict[str, Any]]:
    """What the pointers to checkpoints say."""
    found = [path for path in store.files("scratch/checkpoints") if path.endswith("/last.json")]
    return [store.read_json(path) for path in found]


def task_of(
    tmp_path: Path,
    fate: str,
    kind: type[Doomed] = Doomed,
    inputs: Mapping[str, Published | str] | None = None,
) -> DatasetTask:
    marks = tmp_path / "marks"
    marks.mkdir(parents=True)
    return DatasetTask(kind(marks, fate), 0, "0" * 16, "round=00/models", dict(inputs or {}))


def test_an_error_that_would_come_again_is_told_once(tmp_path: Path, board) -> None:
    store = Store(str(tmp_path / "run"))
    before = task_of(tmp_path / "before", "works", Second)
    record = publish_folder(before, store, tmp_path / "before", 0.0)
    task = replace(task_of(tmp_path, "diverges"), inputs={"train": Published((record.name,), "*")})
    with pytest.raises(TrainingError, match="step 3 of 9: the loss is nan"):
        run_training(store, [task], CONFIG, board)
    assert len(list((tmp_path / "marks").iterdir())) == 1
    assert [pointer["reads"] for pointer in left_unfinished(store)] == [[record.name]]


def test_a_worker_that_dies_is_started_again_and_trains_only_what_is_not_published(
    tmp_path: Path, bucket: str, board
) -> None:
    store = Store(f"{bucket}/run")
    record = publish_files(store, ("dataset/0.tar", "dataset/index.parquet"))
    reads = {"train": Published((record.name,), "*")}
    tasks = [
        task_of(tmp_path / "1", "works", Reads, reads),
        task_of(tmp_path / "2", "dies", Second, reads),
    ]
    run_training(store, tasks, CONFIG, board)
    assert all(store.exists(task.record) for task in tasks)
    starts = [len(list((tmp_path / part / "marks").iterdir())) for part in ("1", "2")]
    assert starts == [1, 2]
    # What the workers had fetched of the images is given back; tables stay.
    copies = [path.name for path in (store.cache / "dataset").iterdir()]
    assert copies == ["index.parquet"]


def test_a_worker_that_dies_while_it_is_started_is_started_again(
    tmp_path: Path, board, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits = []
    fit = train._fit
    monkeypatch.setattr(train, "_fit", lambda *given: fits.append(given) or fit(*given))
    task, store = task_of(tmp_path, "works", Stillborn), Store(str(tmp_path / "run"))
    run_training(store, [task], CONFIG, board)
    assert len(fits) == 2  # Ray Train itself gives up
    assert store.exists(task.record)
    assert len(list((tmp_path / "marks").iterdir())) == 2


def test_places_that_a_failed_fit_has_left_do_not_keep_the_next_one_waiting(
    tmp_path: Path, board
) -> None:
    left = [ray.util.placement_group([{"CPU": 1}]) for _ in range(2)]  # all that this Ray has
    assert all(place.wait(30) for place in left)
    task, store = task_of(tmp_path, "works"), Store(str(tmp_path / "run"))
    run_training(store, [task], CONFIG, board)
    assert store.exists(task.record)
