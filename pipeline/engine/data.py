"""Shard stages on Ray Data: one row and one block a shard, one operator a stage.

Stages stream into each other: while the captioner works on one shard, the next is downloaded.
What a later operator of the same pass reads is carried in the row; images only that far. Every
worker publishes its own shards, so the driver carries nothing but names.

A shard that raises, or whose worker dies twice, is run alone afterwards (`isolate`), from the
driver: the rows that cannot be processed are quarantined, the others go on. What is wrong with the
config, the weights or the lease ends the pass at once; a store that fails, the next pass tries
again.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayError

from pipeline.dag import SHARD_READS, ShardJob, ShardTask
from pipeline.engine import metrics
from pipeline.engine import shard as shards
from pipeline.engine.cluster import log_file
from pipeline.engine.isolate import run_alone
from pipeline.engine.placement import Share, fit
from pipeline.store import Store
from pipeline.tombstones import read_removed
from stages import errors
from stages.base import ShardStage
from stages.removed import Removed

_ROW = pa.schema([("job", pa.string()), ("carried", pa.map_(pa.string(), pa.large_binary()))])
_SHARDS_A_PASS = 50_000
"""A driver grew by some 15 kB a shard within one pass (tests/bench/RESULTS.md)."""
_PAUSES = (0.0,)
"""Seconds before the next pass where one got nothing done; after the last, the run ends."""
_STORE_PAUSES = (5.0, 20.0, 60.0)
"""The same where the store failed."""


@dataclass(frozen=True)
class Pass:
    """What every worker of one pass is told, however many shards it has: a row brings its job."""

    store: Store
    active: tuple[str, ...]
    """The stages that have an operator, in order."""
    board: Any
    removed: Removed
    """What must not be used."""


class StageWorker:
    """One operator's worker: the stage, loaded at the first shard that needs it."""

    def __init__(self, task: ShardTask, plan: Pass, shared: Any = None) -> None:
        self._task = task
        self._plan = plan
        self._shared = shared
        self._stage: ShardStage | None = None

    def __call__(self, row: pa.Table) -> pa.Table:
        job = _job(row)
        carried = _unpack(row)
        name = self._task.name
        if carried is None:
            return row
        if name in job.todo:
            output = self._try(job, carried)
            if output is None:
                return _pack(job, None)
            carried[name] = output
        later = self._plan.active[self._plan.active.index(name) + 1 :]
        wanted = {read for stage in later if stage in job.todo for read in SHARD_READS[stage]}
        return _pack(job, {k: v for k, v in carried.items() if k in wanted})

    def _try(self, job: ShardJob, carried: dict[str, pa.Table]) -> pa.Table | None:
        """The published output, or None after noting on the board what was raised.

        Raises:
            CapfiltError: no other shard could do better, so that Ray gives the pass up.
        """
        name, board = self._task.name, self._plan.board
        # Waiting for the answer makes sure that the board knows before anything can crash.
        again = ray.get(board.begin.remote(name, job.shard))
        try:
            found = self._published(job) if again else None
            output, work = found or self._work(job, carried)
        except Exception as error:
            told = type(error).__name__, _one_line(error)
            ray.get(board.error.remote(name, job.shard, *told))
            if _ends_a_run(type(error)):
                raise
            return None
        board.end.remote(job.shard, work)
        return output

    def _published(self, job: ShardJob) -> tuple[pa.Table, metrics.Work] | None:
        """What a lost worker or node has published before."""
        store, name = self._plan.store, job.records[self._task.name]
        if not store.exists(name):
            return None
        record = store.read_record(name)
        work = metrics.of_record(store, record, metrics.gpu_bytes())
        return shards.output_of(record, store), work

    def _work(self, job: ShardJob, carried: dict[str, pa.Table]) -> tuple[pa.Table, metrics.Work]:
        name, plan, started = self._task.name, self._plan, time.time()
        inputs = shards.load_inputs(name, job, plan.store, carried)
        carried.update(inputs)
        if self._stage is None:
            stage = shards.build(self._task, plan.store)
            if self._shared is not None:
                stage.share(self._ask, str(ray.get_runtime_context().get_actor_id()))
            stage.setup()  # may run out of memory; the next shard then tries again
            self._stage = stage
        shards.settle(self._stage, self._task, job, plan.store)
        output = shards.run_stage(self._stage, inputs, plan.removed)
        facts = self._stage.facts()
        output = shards.publish(self._task, job, output, plan.store, started, facts)
        counts, seconds = shards.count_by(output, "status"), time.time() - started
        work = metrics.Work(plan.store.root, name, seconds, counts, facts, metrics.gpu_bytes())
        return output, work

    def _ask(self, *args: object) -> Any:
        return ray.get(self._shared.ask.remote(*args))


def _ends_a_run(kind: type) -> bool:
    """Whether an error is of no shard, and no retry can help. A store may come back."""
    return issubclass(kind, errors.UserError | errors.RunError) and kind is not errors.StoreError


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _pack(job: ShardJob, carried: Mapping[str, pa.Table] | None) -> pa.Table:
    """One row: the job and the tables it carries as Arrow IPC; None says that it failed."""
    packed = None if carried is None else [(k, _to_ipc(v)) for k, v in carried.items()]
    return pa.table({"job": [_told(job)], "carried": pa.array([packed], _ROW.field(1).type)}, _ROW)


def _told(job: ShardJob) -> str:
    return json.dumps(asdict(job))


def _job(row: pa.Table) -> ShardJob:
    told = json.loads(row["job"][0].as_py())
    return ShardJob(told["shard"], told["records"], tuple(told["todo"]))


def _unpack(row: pa.Table) -> dict[str, pa.Table] | None:
    if "carried" not in row.column_names:  # the pass begins
        return {}
    packed = row["carried"][0]
    if not packed.is_valid:
        return None
    return {
        key.as_py(): pa.ipc.open_stream(value.as_buffer()).read_all()
        for key, value in zip(packed.values.field(0), packed.values.field(1), strict=True)
    }


def _to_ipc(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def run_shards(
    store: Store,
    tasks: Sequence[ShardTask],
    plan: Callable[[], Sequence[ShardJob]],
    board: Any,
    grows_to: Mapping[str, float] | None = None,
) -> None:
    """Bring every shard through every stage.

    Args:
        plan: what every shard still needs; asked again after each pass, since records decide.
        grows_to: as `EngineConfig.grows_to`.

    Raises:
        UserError: a stage says that its config, weights or source cannot be used, or the store
            fails pass after pass.
        RunError: workers keep dying and nothing gets done.
    """
    stuck = 0
    while True:
        try:
            jobs = _unfinished(plan)[:_SHARDS_A_PASS]
            if not jobs:
                return
            why = _work_on(store, tasks, jobs, plan, board, grows_to)
        except errors.StoreError as error:
            why = error
        pauses = _STORE_PAUSES if isinstance(why, errors.StoreError) else _PAUSES
        if why is None:
            stuck = 0
        elif stuck >= len(pauses):
            raise why
        else:
            time.sleep(pauses[stuck])
            stuck += 1


def _work_on(
    store: Store,
    tasks: Sequence[ShardTask],
    jobs: Sequence[ShardJob],
    plan: Callable[[], Sequence[ShardJob]],
    board: Any,
    grows_to: Mapping[str, float] | None,
) -> errors.CapfiltError | None:
    """One pass, and what must be run alone after it. Returns why nothing got done, or None."""
    ray.get(board.forget.remote())
    failure = _one_pass(store, tasks, jobs, board, grows_to)
    suspects = _suspects(board)
    given = {job.shard for job in jobs}
    left = [job for job in _unfinished(plan) if job.shard in given]
    alone = [job for job in left if (job.todo[0], job.shard) in suspects]
    ended = [job for job in alone if _ends_alone(store, tasks, job, board, grows_to)]
    if ended or sum(len(job.todo) for job in left) < sum(len(job.todo) for job in jobs):
        return None
    return _nothing_done(board, failure, log_file(store))


def _unfinished(plan: Callable[[], Sequence[ShardJob]]) -> list[ShardJob]:
    return [job for job in plan() if job.todo]


def _ends_alone(
    store: Store,
    tasks: Sequence[ShardTask],
    job: ShardJob,
    board: Any,
    grows_to: Mapping[str, float] | None,
) -> bool:
    """Run one shard's next stage alone. False if the store failed meanwhile."""
    (task,) = (task for task in tasks if task.name == job.todo[0])
    board.begin.remote(task.name, job.shard)
    try:
        run_alone(store, task, job, grows_to)
    except errors.StoreError as error:
        ray.get(board.error.remote(task.name, job.shard, "StoreError", _one_line(error)))
        return False
    record = store.read_record(job.records[task.name])
    board.end.remote(record.shard, metrics.of_record(store, record))
    return True


def _nothing_done(board: Any, failure: str | None, log: Path) -> errors.CapfiltError:
    """Why pass after pass brings nothing."""
    for kind, message in ray.get(board.read.remote()).errors.values():
        if kind == errors.StoreError.__name__:
            return errors.StoreError(message)
    return errors.RunError(f"workers die before they begin: {failure}; see {log}")


def _suspects(board: Any) -> set[tuple[str, str]]:
    """(stage, shard) that raised, or that was begun twice and finished neither time. What had
    only begun when another worker ended the pass, or a node left, is innocent.

    Raises:
        UserError, RunError: if that is what a stage raised.
    """
    suspects: set[tuple[str, str]] = ray.get(board.begun_again.remote())
    for work, (kind, message) in ray.get(board.read.remote()).errors.items():
        raised = getattr(errors, kind, Exception)
        if _ends_a_run(raised):
            raise raised(message)
        if raised is not errors.StoreError:
            suspects.add(work)
    return suspects


def _one_pass(
    store: Store,
    tasks: Sequence[ShardTask],
    jobs: Sequence[ShardJob],
    board: Any,
    grows_to: Mapping[str, float] | None,
) -> str | None:
    """Run one dataset over the shards. Returns what Ray says if it gave up, else None."""
    needed = {stage for job in jobs for stage in job.todo}
    active = [task for task in tasks if task.name in needed]
    plan = Pass(store, tuple(t.name for t in active), board, read_removed(store))
    shares = fit({task.name: task.build(None).resources for task in active}, grows_to)
    # Items are made into blocks here; `from_arrow` would start a task a shard to look at each.
    rows = [{"job": _told(job)} for job in jobs]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    for task in active:
        shards_of = sum(task.name in job.todo for job in jobs)
        dataset = _operator(dataset, task, shares[task.name].of_at_most(shards_of), plan)
    try:
        # Nothing is fetched. `iter_batches` would, and it sends what Ray knows of every block to an
        # actor every five seconds, which takes the driver's time with many thousands of shards.
        for _ in dataset.iter_internal_ref_bundles():
            pass
    except RayError as error:
        return _one_line(error)[:300]
    return None


def _operator(dataset: Any, task: ShardTask, share: Share, plan: Pass) -> Any:
    """Append the stage's operator.

    Both retries are bounded: unbounded, Ray restarts a crashing shard's actor for ever.
    """
    made = task.build(None).shared() if share.max_replicas > 1 else None
    shared = None if made is None else ray.get(plan.board.shared.remote(task.name, made))
    return dataset.map_batches(
        StageWorker,
        fn_constructor_args=(task, plan, shared),
        batch_size=1,  # a row; with GPUs Ray refuses None
        batch_format="pyarrow",
        zero_copy_batch=True,
        compute=ray.data.ActorPoolStrategy(
            min_size=share.min_replicas,
            max_size=share.max_replicas,
            max_tasks_in_flight_per_actor=2,
        ),
        num_cpus=share.cpus,
        num_gpus=share.gpus or None,
        memory=share.memory or None,
        ray_remote_args_fn=_bounded_retries,
        **({"accelerator_type": share.accelerator} if share.accelerator else {}),
    )


def _bounded_retries() -> dict[str, int]:
    return {"max_restarts": 1, "max_task_retries": 1}
