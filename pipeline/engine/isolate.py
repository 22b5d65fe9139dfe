"""A shard that kills or fails its worker: run alone, halved until the bad rows stand alone."""

from __future__ import annotations

import time

import pyarrow as pa
import ray
from ray.exceptions import RayError

from pipeline.dag import ShardJob, ShardTask, stage_input
from pipeline.engine import shard as shards
from pipeline.store import Store
from stages.schemas import check

_MAX_FAILURES = 64
"""After so many failed processes a shard's cause is not a row: what still fails is quarantined
as it stands, instead of trying every row."""


@ray.remote(max_retries=0)
def _rows_alone(task: ShardTask, store: Store, job: ShardJob, start: int, stop: int) -> pa.Table:
    """Rows ``start`` to ``stop`` of the shard's input, in a process that may die of them."""
    stage = shards.build(task, store)
    inputs = shards.load_inputs(task.name, job, store, {})
    stage.setup()
    rows = stage_input(task.name, inputs).slice(start, stop - start)
    return check(stage.process(rows), stage.output_schema, f"{task.name} output")


def run_alone(store: Store, task: ShardTask, job: ShardJob) -> None:
    """Process and publish one shard, its unprocessable rows quarantined.

    The output has the rows that an unbroken run would have written for all other rows, in the
    same order: each half is a slice of the input.
    """
    started = time.time()
    table = stage_input(task.name, shards.load_inputs(task.name, job, store, {}))
    alone = _Alone(store, task, job, table)
    pieces = alone.halve(0, table.num_rows) if table.num_rows else []
    empty = alone.stage.output_schema.empty_table()
    shards.publish(task, job, pa.concat_tables([empty, *pieces]), store, started)


class _Alone:
    """The halving of one shard, and how many times its process has failed."""

    def __init__(self, store: Store, task: ShardTask, job: ShardJob, table: pa.Table) -> None:
        self._store, self._task, self._job, self._table = store, task, job, table
        self.stage = task.build(None)
        self._failures = 0

    def halve(self, start: int, stop: int) -> list[pa.Table]:
        """Output pieces for input rows ``start`` to ``stop``."""
        needs = self.stage.resources
        work = _rows_alone.options(num_cpus=needs.cpus, num_gpus=needs.gpus or None)
        try:
            return [ray.get(work.remote(self._task, self._store, self._job, start, stop))]
        except RayError as error:
            self._failures += 1
            if stop - start == 1 or self._failures > _MAX_FAILURES:
                return [self._quarantine(start, stop, _cause(error))]
        middle = (start + stop) // 2
        return [*self.halve(start, middle), *self.halve(middle, stop)]

    def _quarantine(self, start: int, stop: int, cause: str) -> pa.Table:
        rows = self._table.slice(start, stop - start)
        failed = self.stage.failed(rows, "quarantined", cause)
        return check(failed, self.stage.output_schema, f"{self._task.name} output")


def _cause(error: RayError) -> str:
    """What happened in one line: the stage's own exception, or that the process died."""
    cause = getattr(error, "cause", None)
    told = cause if isinstance(cause, Exception) else f"the process died ({type(error).__name__})"
    return " ".join(str(told).split())[:300]
