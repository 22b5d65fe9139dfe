"""A shard that kills or fails its worker: run alone, halved until the bad rows stand alone."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import pyarrow as pa
import ray
from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from pipeline.dag import ShardJob, ShardTask, stage_input
from pipeline.engine import shard as shards
from pipeline.engine.dataset import translate
from pipeline.engine.placement import fit
from pipeline.store import Store
from pipeline.tombstones import read_removed
from stages.errors import UserError, out_of_memory
from stages.schemas import check

_MAX_FAILURES = 64
"""After so many failed processes a shard's cause is not a row: what still fails is quarantined
as it stands, instead of trying every row."""
_MAX_LOSSES = 5
"""So often a piece is begun again because a node left; then something else takes the nodes down."""


@ray.remote(max_retries=0)
def _rows_alone(
    task: ShardTask, store: Store, job: ShardJob, start: int, stop: int
) -> tuple[pa.Table, dict[str, str]]:
    """Output for rows ``start`` to ``stop`` of the shard's input, and the facts of the work, in a
    process that may die of them."""
    stage = shards.build(task, store)
    inputs = shards.load_inputs(task.name, job, store, {})
    stage.setup()
    shards.settle(stage, task, job, store)
    rows = stage_input(task.name, inputs).slice(start, stop - start)
    output = read_removed(store).process(stage, rows)
    return check(output, stage.output_schema, f"{task.name} output"), stage.facts()


def run_alone(
    store: Store, task: ShardTask, job: ShardJob, grows_to: Mapping[str, float] | None = None
) -> None:
    """Process and publish one shard, its unprocessable rows quarantined.

    The other rows are all there, in order: each half is a slice of the input. Its batches have
    other shapes than an unbroken shard's, so their last bits can differ.

    Raises:
        CapfiltError: the cause is not a row: the store, a model, or nodes that are lost again and
            again.
    """
    started = time.time()
    table = stage_input(task.name, shards.load_inputs(task.name, job, store, {}))
    alone = _Alone(store, task, job, table, grows_to)
    pieces = alone.halve(0, table.num_rows) if table.num_rows else []
    empty = alone.stage.output_schema.empty_table()
    output = pa.concat_tables([empty, *pieces])
    shards.publish(task, job, output, store, started, merged(alone.facts))


class _Alone:
    """The halving of one shard, and how many times its process has failed."""

    def __init__(
        self,
        store: Store,
        task: ShardTask,
        job: ShardJob,
        table: pa.Table,
        grows_to: Mapping[str, float] | None,
    ) -> None:
        self._store, self._task, self._job, self._table = store, task, job, table
        self._grows_to = grows_to
        self.stage = task.build(None)
        self.facts: list[dict[str, str]] = []
        """Of every piece that was processed."""
        self._failures = 0

    def halve(self, start: int, stop: int) -> list[pa.Table]:
        """Output pieces for input rows ``start`` to ``stop``."""
        try:
            piece, facts = self._attempt(start, stop)
            self.facts.append(facts)
            return [piece]
        except RayError as error:
            raised = translate(error, self._task.name)
            if isinstance(raised, UserError) or not _is_rows_fault(error):
                raise raised from error
            self._failures += 1
            if stop - start == 1 or self._failures > _MAX_FAILURES:
                return [self._quarantine(start, stop, _cause(error))]
        middle = (start + stop) // 2
        return [*self.halve(start, middle), *self.halve(middle, stop)]

    def _attempt(self, start: int, stop: int) -> tuple[pa.Table, dict[str, str]]:
        """What `_rows_alone` returns, begun again where its node was lost."""
        one = self.stage.resources.model_copy(update={"min_replicas": 1})
        losses = 0
        while True:
            share = fit({self._task.name: one}, self._grows_to)[self._task.name]
            work = _rows_alone.options(**share.options())
            try:
                done: tuple[pa.Table, dict[str, str]] = ray.get(
                    work.remote(self._task, self._store, self._job, start, stop)
                )
                return done
            except _LOST:
                losses += 1
                if losses > _MAX_LOSSES:
                    raise

    def _quarantine(self, start: int, stop: int, cause: str) -> pa.Table:
        rows = self._table.slice(start, stop - start)
        failed = self.stage.failed(rows, "quarantined", cause)
        return check(failed, self.stage.output_schema, f"{self._task.name} output")


def merged(pieces: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """`ShardStage.facts` of a shard from those of its pieces: counts add up, other facts are told
    once each."""
    found: dict[str, dict[str, None]] = {}
    for facts in pieces:
        for name, told in facts.items():
            found.setdefault(name, {}).update(dict.fromkeys(told.split(", ")))
    if "tokens" in found:
        found["tokens"] = {str(sum(int(facts.get("tokens", 0)) for facts in pieces)): None}
    return {name: ", ".join(told) for name, told in found.items()}


_LOST = (NodeDiedError, LocalRayletDiedError, ObjectLostError)
"""The node left, while it worked or with the output that it held."""


def _is_rows_fault(error: RayError) -> bool:
    """Whether the rows may have done it: raised in the stage, or killed its process. Nodes that are
    lost, or a machine's or GPU's memory that is full, even for one image, is not theirs; it ends
    the run, and the next one tries the shard again."""
    if isinstance(error, RayTaskError):
        return not out_of_memory(error.cause)
    return isinstance(error, WorkerCrashedError)


def _cause(error: RayError) -> str:
    """What happened in one line: the stage's own exception, or that the process died."""
    cause = getattr(error, "cause", None)
    told = cause if isinstance(cause, Exception) else f"the process died ({type(error).__name__})"
    return " ".join(str(told).split())[:300]
