"""How stages share a cluster: their first replicas must all fit, or Ray waits without a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Any

import ray

from pipeline.config import EngineConfig, RunConfig
from stages.base import Resources
from stages.errors import ConfigError

GIB = 1 << 30
_LEAST = 0.001
"""Ray's resolution of CPUs."""

Node = Mapping[str, float]
"""What one node has, by Ray's names: CPU, GPU, memory (bytes), accelerator_type:X."""


@dataclass(frozen=True)
class Share:
    """What one operator gets."""

    cpus: float
    gpus: float
    memory: int
    """Bytes."""
    accelerator: str | None
    min_replicas: int
    max_replicas: int

    def of_at_most(self, count: int) -> Share:
        """No more replicas than there are shards."""
        return replace(
            self,
            min_replicas=min(self.min_replicas, count),
            max_replicas=min(self.max_replicas, count),
        )

    def options(self) -> dict[str, Any]:
        """What Ray is told of a task that takes one replica's place."""
        return {
            "num_cpus": self.cpus,
            "num_gpus": self.gpus or None,
            "memory": self.memory or None,
            "accelerator_type": self.accelerator,
        }


def nodes() -> list[Node]:
    """The nodes that are up."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def check(config: RunConfig, found: Sequence[Node]) -> None:
    """Refuse, before anything is done, what could never start on the nodes ``found``.

    Raises:
        ConfigError: a stage or the worker group needs more than Ray has or may grow to.
    """
    limit = config.engine.grows_to
    total = {kind: sum(node.get(kind, 0.0) for node in found) for kind in ("CPU", "GPU")}
    check_training(config.engine, total if limit is None else limit)
    _check_search(config.dedup.search.gpus, found, limit)
    if limit is None:
        check_workers_placed(config.engine, found)
    wanted = {name: getattr(config, name).resources for name in ("download", *_MODELS)}
    share_out(wanted, found, limit)
    for name in _WHOLE_ROUND:  # one after the other
        share_out({name: getattr(config, name).resources}, found, limit)


_MODELS = ("caption", "filter", "embed")
_WHOLE_ROUND = ("dedup", "select", "assemble", "evaluate")


def check_training(config: EngineConfig, cluster: Mapping[str, float]) -> None:
    """Refuse a worker group that could never start.

    Raises:
        ConfigError: it needs more CPUs or GPUs than Ray has.
    """
    for kind, each in (("CPU", config.train_cpus), ("GPU", config.train_gpus)):
        needed, found = config.train_workers * each, cluster.get(kind, 0.0)
        if needed > found:
            raise ConfigError(
                f"engine.train_{kind.lower()}s: {config.train_workers} workers need {needed:g} "
                f"{kind}s, Ray has {found:g}; lower engine.train_{kind.lower()}s or add {kind}s"
            )


def _check_search(gpus: float, found: Sequence[Node], limit: Node | None) -> None:
    """Raises ConfigError where a part of dedup's search, which takes a CPU too, has no place."""
    part = {"dedup": Resources(cpus=1.0, gpus=gpus)}
    if gpus and _unplaced(part, found if limit is None else [limit], 1.0) is not None:
        raise ConfigError(
            f"dedup.search.gpus: each part of the search needs a CPU and {gpus:g} GPUs of one "
            "node, and Ray has no such node; give 0 to search on CPUs, or add GPUs"
        )


def training_workers(config: EngineConfig) -> Resources:
    """What one training worker takes; all are replicas that start at once."""
    return Resources(
        cpus=config.train_cpus,
        gpus=config.train_gpus,
        memory_gb=config.train_memory_gb,
        accelerator=config.train_accelerator,
        min_replicas=config.train_workers,
    )


def check_workers_placed(config: EngineConfig, found: Sequence[Node]) -> None:
    """Raises ConfigError where the training workers do not all find a node, of the kind and with
    the memory that they want."""
    worker = training_workers(config)
    if _unplaced({"train": worker}, found, 1.0) is None:
        return
    more = f", {worker.memory_gb:g} GiB" if worker.memory_gb else ""
    kind = f" with accelerator {worker.accelerator}" if worker.accelerator else ""
    raise ConfigError(
        f"engine.train_workers: {worker.min_replicas} workers of {worker.cpus:g} CPUs and "
        f"{worker.gpus:g} GPUs{more}{kind} do not fit on the {len(found)} nodes that Ray has, "
        f"with {_had(found)}; change engine.train_* or add nodes"
    )


def fit(wanted: Mapping[str, Resources], limit: Node | None = None) -> dict[str, Share]:
    """`share_out` on the cluster as it is now."""
    return share_out(wanted, nodes(), limit)


def share_out(
    wanted: Mapping[str, Resources], found: Sequence[Node], limit: Node | None = None
) -> dict[str, Share]:
    """A share for each stage such that all their minimum replicas can run at once.

    Where CPUs are too few, every stage's CPUs shrink by the same factor (a fraction is a
    reservation, not a limit), until each replica finds a node. GPUs and memory are not shrunk:
    they do not stretch.

    Args:
        wanted: stage → what one replica needs.
        found: the nodes that are up.
        limit: what an autoscaler may bring all nodes together to; then only that sum of CPUs and
            GPUs is held. Memory, a kind of GPU and a node's size are not known before it is there:
            Ray waits for what the autoscaler cannot start.

    Raises:
        ConfigError: GPUs, their kind or memory are too few, or there are no CPUs at all.
    """
    cpus = sum(node.get("CPU", 0.0) for node in found) if limit is None else limit.get("CPU", 0.0)
    if cpus <= 0:
        raise ConfigError("resources: Ray has no CPUs; start it with at least one")
    need = sum(r.cpus * r.min_replicas for r in wanted.values())
    scale = min(1.0, cpus / need) if need else 1.0
    if limit is not None:
        _check_sum(wanted, limit)
    else:
        _check_placed(wanted, found)
        while scale > _LEAST and _unplaced(wanted, found, scale):
            scale /= 1.25
    return {
        name: Share(
            cpus=_scaled(r.cpus, scale),
            gpus=r.gpus,
            memory=int(r.memory_gb * GIB),
            accelerator=r.accelerator,
            min_replicas=r.min_replicas,
            max_replicas=max(r.min_replicas, r.max_replicas),
        )
        for name, r in wanted.items()
    }


def _scaled(cpus: float, scale: float) -> float:
    """Rounded down to Ray's resolution, so that the sum still fits."""
    return max(_LEAST, floor(cpus * scale / _LEAST) * _LEAST)


def _check_placed(wanted: Mapping[str, Resources], found: Sequence[Node]) -> None:
    """Raises ConfigError where a stage finds no place however few CPUs it takes."""
    stage = _unplaced(wanted, found, 0.0)
    if stage is None:
        return
    raise ConfigError(
        f"{stage}.resources: no place for {_told(wanted)} at once, Ray has {_had(found)} on "
        f"{len(found)} nodes; lower <stage>.resources or add nodes"
    )


def _had(found: Sequence[Node]) -> str:
    """``8 GPUs, accelerator_type:L4, 96.0 GiB``: of all nodes together."""
    kinds = sorted({k for node in found for k in node if k.startswith("accelerator_type:")})
    gpus, memory = (sum(node.get(kind, 0.0) for node in found) for kind in ("GPU", "memory"))
    return ", ".join([f"{gpus:g} GPUs", *kinds, f"{memory / GIB:.1f} GiB"])


def _check_sum(wanted: Mapping[str, Resources], limit: Node) -> None:
    need = sum(r.gpus * r.min_replicas for r in wanted.values())
    if need > limit.get("GPU", 0.0):
        raise ConfigError(
            f"resources: stages need {need:g} GPUs at once ({_told(wanted)}), Ray grows to "
            f"{limit.get('GPU', 0.0):g}; lower <stage>.resources.gpus or add GPUs"
        )


def _told(wanted: Mapping[str, Resources]) -> str:
    """``caption 2 x 0.5 GPU H100 8 GiB, filter …``: those that ask for more than CPUs."""
    return ", ".join(
        f"{name} {r.min_replicas} x {r.gpus:g} GPU"
        + (f" {r.accelerator}" if r.accelerator else "")
        + (f" {r.memory_gb:g} GiB" if r.memory_gb else "")
        for name, r in wanted.items()
        if r.gpus or r.accelerator or r.memory_gb
    )


class _Free:
    """What is left of one node while replicas are placed on it."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._cpus, self._memory = node.get("CPU", 0.0), node.get("memory", 0.0)
        self._gpus = [1.0] * int(node.get("GPU", 0.0))

    def take(self, needs: Resources, scale: float) -> bool:
        """Place one replica here, if it fits. A share comes from one GPU."""
        cpus = _scaled(needs.cpus, scale)
        kind = f"accelerator_type:{needs.accelerator}"
        if self._cpus < cpus or self._memory < needs.memory_gb * GIB:
            return False
        if needs.accelerator is not None and kind not in self._node:
            return False
        whole, share = divmod(needs.gpus, 1.0)
        least = max(1.0 * (whole > 0), share) - _LEAST  # tenths of a GPU do not sum to one
        free = [at for at, left in enumerate(self._gpus) if left >= least]
        count = int(whole) or int(share > 0)
        if len(free) < count:
            return False
        for at in free[:count]:
            self._gpus[at] -= share or 1.0
        self._cpus -= cpus
        self._memory -= needs.memory_gb * GIB
        return True


def _unplaced(wanted: Mapping[str, Resources], found: Sequence[Node], scale: float) -> str | None:
    """The first stage of which a replica finds no place; those that ask for a kind of GPU are
    placed first, then the largest."""
    free = [_Free(node) for node in found]

    def size(item: tuple[str, Resources]) -> tuple[bool, float, float]:
        return item[1].accelerator is not None, item[1].gpus, item[1].cpus

    order = sorted(wanted.items(), key=size, reverse=True)
    for name, needs in order:
        for _ in range(needs.min_replicas):
            if not any(node.take(needs, scale) for node in free):
                return name
    return None
