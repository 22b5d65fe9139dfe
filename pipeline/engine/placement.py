"""How operators share a machine: their first replicas must all fit, or Ray waits without a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor

import ray

from pipeline.config import EngineConfig
from pipeline.dag import ShardTask
from stages.base import Resources
from stages.errors import ConfigError


@dataclass(frozen=True)
class Share:
    """What one operator gets."""

    cpus: float
    gpus: float
    min_replicas: int
    max_replicas: int


def resources() -> dict[str, float]:
    """What the whole Ray cluster has."""
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


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


def fit(tasks: Sequence[ShardTask], cluster: Mapping[str, float]) -> list[Share]:
    """A share for each task such that all their minimum replicas can run at once.

    Where CPUs are too few, every task's CPUs shrink by the same factor (a fraction is a
    reservation, not a limit). GPUs are not shrunk: memory does not stretch.

    Raises:
        ConfigError: the GPUs are too few, or there are no CPUs at all.
    """
    wanted: list[Resources] = [task.build(None).resources for task in tasks]
    cpus, gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    need_cpus = sum(r.cpus * r.min_replicas for r in wanted)
    need_gpus = sum(r.gpus * r.min_replicas for r in wanted)
    if need_gpus > gpus:
        names = ", ".join(f"{t.name} {r.gpus:g}" for t, r in zip(tasks, wanted, strict=True))
        raise ConfigError(
            f"resources: stages need {need_gpus:g} GPUs at once ({names}), Ray has {gpus:g}; "
            "lower <stage>.resources.gpus or add GPUs"
        )
    if cpus <= 0:
        raise ConfigError("resources: Ray has no CPUs; start it with at least one")
    scale = min(1.0, cpus / need_cpus) if need_cpus else 1.0
    return [
        Share(
            # Rounded down to Ray's resolution, so that the sum still fits.
            cpus=max(0.001, floor(r.cpus * scale * 1000) / 1000),
            gpus=r.gpus,
            min_replicas=r.min_replicas,
            max_replicas=max(r.min_replicas, r.max_replicas),
        )
        for r in wanted
    ]
