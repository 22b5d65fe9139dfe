"""The notice board: workers say what they begin and end, the driver reads it.

It outlives a crashed worker, so what was begun and never ended names the suspects.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.engine.metrics import Meters, Work
from pipeline.progress import Notices


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Shared:
    """Actor that holds what `ShardStage.shared` has made; one that is killed begins anew."""

    def __init__(self, made: Callable[..., Any]) -> None:
        self._made = made

    def ask(self, *args: object) -> Any:
        return self._made(*args)


@ray.remote(num_cpus=0, max_restarts=0)
class Board:
    """Actor that holds `Notices`; every call is short."""

    def __init__(self) -> None:
        self._shared: dict[str, Any] = {}
        self._notices = Notices()
        self._meters = Meters()
        self._begun: Counter[tuple[str, str]] = Counter()
        """(stage, shard) → how often this pass has begun it."""
        self._ended: set[tuple[str, str]] = set()
        """What this pass has ended."""
        self._untold: dict[tuple[str, str], tuple[str, str]] = {}

    def begin(self, stage: str, shard: str) -> bool:
        """Note that it is begun. Returns whether this pass has begun it before: Ray works again on
        what was lost with a worker or a node, and its record may be there already."""
        self._begun[stage, shard] += 1
        self._notices.running[stage, shard] = time.time()
        return self._begun[stage, shard] > 1

    def end(self, shard: str, work: Work) -> None:
        """A shard's ``work`` is published. One call says all, for there are many; what has ended
        already is not counted again."""
        stage, counts = work.stage, work.counts
        self._notices.running.pop((stage, shard), None)
        if (stage, shard) in self._ended:
            return
        self._ended.add((stage, shard))
        self._notices.errors.pop((stage, shard), None)
        self._notices.done[stage] = self._notices.done.get(stage, 0) + 1
        self._notices.ended.append((stage, shard, dict(counts)))
        known = self._notices.counts.setdefault(stage, {})
        for status, count in counts.items():
            known[status] = known.get(status, 0) + count
        self.measured(work)

    def measured(self, work: Work) -> None:
        self._meters.emit(work)

    def error(self, stage: str, shard: str, kind: str, message: str) -> None:
        self._notices.running.pop((stage, shard), None)
        self._notices.errors[stage, shard] = self._untold[stage, shard] = kind, message

    def progress(self, stage: str, message: str, done: int, total: int) -> None:
        self._notices.progress[stage] = message, done, total

    def shared(self, stage: str, made: Callable[..., Any]) -> Any:
        """The actor that answers what the workers of ``stage`` ask: one for the board's life, and
        on its node, which is the driver's."""
        if stage not in self._shared:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), False)
            actor: Any = Shared
            self._shared[stage] = actor.options(scheduling_strategy=here).remote(made)
        return self._shared[stage]

    def forget(self) -> None:
        """Start a new pass: what is running or failed is no longer of interest."""
        self._begun.clear()
        self._ended.clear()
        self._notices.running.clear()
        self._notices.errors.clear()

    def reset(self) -> None:
        """Start a new round."""
        self._notices = Notices()

    def begun_again(self) -> set[tuple[str, str]]:
        """What this pass began more than once and has not ended."""
        return {work for work in self._notices.running if self._begun[work] > 1}

    def read(self) -> Notices:
        return self._notices

    def take(self) -> Notices:
        """`read`, after which what has ended or failed is told, so that it does not pile up. Who
        waits for a run calls it every moment, which keeps the gauges alive."""
        self._meters.stand()
        taken = replace(self._notices, errors=self._untold)
        self._notices.ended, self._untold = [], {}
        return taken


@contextmanager
def watched(board: Any, show: Callable[[Notices], None], seconds: float = 0.5) -> Iterator[None]:
    """Inside, ``show`` gets the board's notices every ``seconds``, and once at the end."""
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(seconds):
            with suppress(RayError):  # if it does not pass by itself, the last call raises it
                show(ray.get(board.take.remote()))

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        show(ray.get(board.take.remote()))
