"""Mapped work of a whole-round stage on every machine that has a CPU.

Functions and their arrays travel as Ray objects. Files that they read, too large for that, are
put into the store once and fetched by each machine that gets work, to the same path; a single
machine shares nothing. Work is handed out one item a CPU, so a worker holds one item's memory.
"""

from __future__ import annotations

import fcntl
import shutil
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.engine.attempts import gathered
from pipeline.store import Store

T = TypeVar("T")
R = TypeVar("R")

SPREAD = "scratch/spread"
"""Folder of the store for what is shared while a stage runs."""

_CLEANING = 30.0
"""Seconds after which a machine that does not answer keeps its copies."""


@dataclass(frozen=True)
class SharedFile:
    """A file that mapped work reads at ``path``, whatever machine it runs on."""

    path: Path
    stored: str
    """Where the store has it, relative to the run folder."""
    mark: str
    """Tells this content of the file from an earlier one."""

    @property
    def _marker(self) -> Path:
        return self.path.with_name(f"{self.path.name}.shared")

    def here(self) -> bool:
        """Whether this machine has it."""
        return self._marker.exists() and self._marker.read_text() == self.mark

    def share(self, store: Store) -> None:
        """From the machine that wrote it."""
        store.put_file(self.stored, self.path)
        self._marker.write_text(self.mark)

    def fetch(self, store: Store) -> None:
        """To the machine that this runs on; of several workers there, one does it."""
        if self.here():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f"{self.path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self.here():
                scratch = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
                with (
                    store.fs.open(store.path(self.stored), "rb") as stored,
                    scratch.open("wb") as target,
                ):
                    shutil.copyfileobj(stored, target)
                scratch.replace(self.path)
                self._marker.write_text(self.mark)

    def drop(self) -> None:
        """Remove it and what stands beside it, and its folder where that is empty then."""
        for ending in ("", ".shared", ".lock"):
            self.path.with_name(self.path.name + ending).unlink(missing_ok=True)
        with suppress(OSError):
            self.path.parent.rmdir()


class Spread:
    """What one stage maps; `close` when it has ended."""

    def __init__(self, store: Store, stage: str) -> None:
        self._store = store
        # Of this attempt alone: one that was taken for dead may still be reading its own.
        self._folder = f"{SPREAD}/{stage}-{uuid.uuid4().hex}"
        self._shared: dict[Path, SharedFile] = {}

    def map(
        self,
        function: Callable[[T], R],
        items: Sequence[T],
        reads: Sequence[Path] = (),
        gpus: float = 0.0,
    ) -> list[R]:
        """`stages.base.Context.map`."""
        # A head without CPUs counts: where one is, others may join while this goes on.
        alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        files = self._share(reads) if len(alive) > 1 else ()
        work = ray.put(function)
        call: Any = _call.options(scheduling_strategy="SPREAD", num_gpus=gpus or None)
        given = [partial(call.remote, work, item, self._store, files) for item in items]
        return gathered(given)

    def _share(self, reads: Sequence[Path]) -> tuple[SharedFile, ...]:
        """All files of ``reads`` and of the folders among them; each is stored once."""
        found = []
        for path in (file for place in reads for file in _files(place.resolve())):
            state = path.stat()
            mark = f"{state.st_size}-{state.st_mtime_ns}"
            known = self._shared.get(path)
            if known is None or known.mark != mark:
                known = SharedFile(path, f"{self._folder}/{uuid.uuid4().hex}", mark)
                known.share(self._store)
                self._shared[path] = known
            found.append(known)
        return tuple(found)

    def close(self) -> None:
        """Remove what was shared, from the store and from other machines."""
        if not self._shared:
            return
        here = ray.get_runtime_context().get_node_id()
        files = tuple(self._shared.values())
        others = [
            _drop.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(machine, soft=False)
            ).remote(files)
            for machine in machines()
            if machine != here
        ]
        ray.wait(others, num_returns=len(others), timeout=_CLEANING)
        self._store.remove(self._folder)


def machines() -> list[str]:
    """Ids of the nodes that can work."""
    return [
        node["NodeID"]
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
    ]


def _files(place: Path) -> list[Path]:
    """``place`` itself, or the files of the folder."""
    if not place.is_dir():
        return [place]
    return sorted(p for p in place.rglob("*") if p.is_file() and p.suffix not in _OURS)


_OURS = frozenset({".shared", ".lock"})


@ray.remote(num_cpus=1, max_retries=0)
def _call(function: Callable[[T], R], item: T, store: Store, files: Sequence[SharedFile]) -> R:
    for file in files:
        file.fetch(store)
    return function(item)


@ray.remote(num_cpus=0)
def _drop(files: Sequence[SharedFile]) -> Any:
    for file in files:
        file.drop()
