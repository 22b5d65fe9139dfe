"""Whole-round stages: each in a worker process of its own, its record published last."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.dag import DatasetTask, Published
from pipeline.engine import metrics
from pipeline.engine.attempts import gathered
from pipeline.engine.placement import fit
from pipeline.engine.shard import open_model
from pipeline.engine.spread import Spread
from pipeline.in_turn import InTurn
from pipeline.records import CHECKPOINTS, Record
from pipeline.store import Store
from pipeline.version import code_version
from stages.errors import CapfiltError, RunError

T = TypeVar("T")
R = TypeVar("R")


class StageContext:
    """`stages.base.Context` of a stage that runs in one process under Ray."""

    rank = 0
    world_size = 1

    def __init__(
        self, stage: str, store: Store, board: Any, checkpoints: Checkpoints | None = None
    ) -> None:
        self._stage = stage
        self._board = board
        self._checkpoints = checkpoints
        self._spread = Spread(store, stage)

    def map(
        self,
        function: Callable[[T], R],
        items: Sequence[T],
        reads: Sequence[Path] = (),
        gpus: float = 0.0,
    ) -> list[R]:
        return self._spread.map(function, items, reads, gpus)

    def close(self) -> None:
        """The stage has ended: nothing that it mapped is read any more."""
        self._spread.close()

    def progress(self, message: str, done: int, total: int) -> None:
        self._board.progress.remote(self._stage, message, done, total)

    def save(self, write: Callable[[Path], None]) -> None:
        if self._checkpoints is not None:
            self._checkpoints.save(write)

    def resume_from(self) -> Path | None:
        return self._checkpoints.last() if self._checkpoints is not None else None


class Checkpoints:
    """Resumable state of one unfinished work, below the run's scratch folder.

    A pointer file, replaced as a whole, says which upload is complete; so a kill at any moment
    leaves the previous checkpoint or the new one.
    """

    def __init__(self, store: Store, name: str, reads: Sequence[str] = ()) -> None:
        """``reads``: records that the work reads, written down for `pipeline.forget`."""
        self._store, self._reads = store, list(reads)
        self._folder = f"{CHECKPOINTS}/{name}"
        self._pointer = f"{self._folder}/last.json"

    def save(self, write: Callable[[Path], None]) -> None:
        before = self._store.read_json(self._pointer)
        with tempfile.TemporaryDirectory() as scratch:
            write(Path(scratch))
            payloads = self._store.put_folder(self._folder, Path(scratch))
        folder = "/".join(payloads[0].path.split("/")[:4])
        self._store.write_json(self._pointer, {"folder": folder, "reads": self._reads})
        if before is not None:
            self._store.remove(before["folder"])

    def last(self) -> Path | None:
        pointer = self._store.read_json(self._pointer)
        return None if pointer is None else self._store.local_folder(pointer["folder"])

    def remove(self) -> None:
        """Forget all of it: the work is published."""
        self._store.remove(self._folder)


def open_inputs(task: DatasetTask, store: Store) -> dict[str, Sequence[Path]]:
    """The task's inputs as local paths; records are read now, not when the task was planned."""
    return {name: open_input(source, store) for name, source in task.inputs.items()}


def open_input(source: Published | str, store: Store) -> Sequence[Path]:
    """Local paths of published files, or the one folder that ``source`` names."""
    if isinstance(source, str):
        return [Path(open_model(source, store))]
    files = _files(source, store)
    return InTurn(store, files) if source.in_turn else store.local_copies(files)


def drop_images(task: DatasetTask, store: Store) -> None:
    """Give back the disk that copies of the task's tars take on this machine; nobody else reads
    them, and they are most of what a round brings here."""
    for source in task.inputs.values():
        if isinstance(source, Published):
            for file in _files(source, store):
                if file.endswith(".tar"):
                    store.drop_copy(file)


def _files(source: Published, store: Store) -> list[str]:
    return [
        payload.path
        for record in store.read_records(source.records)
        for payload in record.payloads
        if fnmatchcase(payload.path, source.pattern)
    ]


def publish_folder(task: DatasetTask, store: Store, output: Path, started: float) -> Record:
    """Copy what a stage wrote into the store and publish it; returns the published record."""
    record = Record(
        stage=task.name,
        stage_version=task.stage.version,
        round=task.round,
        shard="all",
        fingerprint=task.fingerprint,
        payloads=store.put_folder(task.folder, output),
        details={"reads": json.dumps(task.reads)},
        code_version=code_version(),
        started=started,
        finished=time.time(),
    )
    return record if store.publish(record) else store.read_record(record.name)


@ray.remote(max_retries=0)
def _work(task: DatasetTask, store: Store, board: Any) -> Record:
    started = time.time()
    with tempfile.TemporaryDirectory() as output:
        with closing(StageContext(task.name, store, board)) as context:
            task.stage.run(open_inputs(task, store), Path(output), context)
        return publish_folder(task, store, Path(output), started)


def run_dataset(
    store: Store, task: DatasetTask, board: Any, grows_to: Mapping[str, float] | None = None
) -> Record:
    """Run a whole-round stage unless it is published already. Returns its record.

    Args:
        grows_to: as `EngineConfig.grows_to`.

    Raises:
        CapfiltError: what the stage itself raised, or there is no place for its worker.
        RunError: the worker died again and again, or the stage has a bug.
    """
    if store.exists(task.record):
        return store.read_record(task.record)
    share = fit({task.name: task.resources}, grows_to)[task.name]
    try:
        work = _work.options(**share.options())
        record: Record
        (record,) = gathered([lambda: work.remote(task, store, board)])
    except RayError as error:
        raise translate(error, task.name) from error
    board.measured.remote(metrics.of_record(store, record))
    return record


def translate(error: BaseException, stage: str) -> CapfiltError:
    """The stage's own error out of Ray's wrapping, else a `RunError` in one line."""
    pending: list[BaseException | None] = [error]
    seen: list[BaseException] = []
    while pending:
        one = pending.pop()
        if one is None or one in seen:
            continue
        seen.append(one)
        if isinstance(one, CapfiltError) and not isinstance(one, RayError):
            return one
        pending += [getattr(one, "cause", None), one.__cause__, one.__context__]
    cause = error.cause if isinstance(error, RayTaskError) else error
    line = " ".join(str(cause).split())[:300] or type(cause).__name__
    return RunError(f"stage {stage}: {type(cause).__name__}: {line}")
