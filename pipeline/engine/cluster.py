"""Joining a Ray cluster, or starting a local one, without its chatter on the screen."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.util.annotations import RayDeprecationWarning

from pipeline.config import EngineConfig
from pipeline.engine.board import Board
from stages.errors import RunError

_GIB = 1 << 30

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Workers must not rebuild an environment of their own when the driver came from `uv run`.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Threads of torch that wait spin for some 10 us, then sleep. Spinning for long takes the cores
    # from the stages beside them; sleeping at once doubled the time of a small training step.
    "GOMP_SPINCOUNT": "10000",
    "NO_ALBUMENTATIONS_UPDATE": "1",
}


@contextmanager
def connected(config: EngineConfig, log_file: Path) -> Iterator[Any]:
    """Inside, Ray is there; yields the `Board` of this driver.

    A local Ray is started where no address is given, and stopped at the end.

    Raises:
        RunError: the cluster cannot be reached or started.
    """
    _quieten(log_file)
    with _stderr_to(log_file):
        try:
            _init(config)
        except (ConnectionError, TimeoutError, OSError, RuntimeError) as error:
            where = config.address or "a local Ray"
            raise RunError(f"engine.address: cannot use {where}: {_first_line(error)}") from error
        try:
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            context.print_on_execution_start = False
            board: Any = Board
            yield board.remote()
        finally:
            ray.shutdown()


@contextmanager
def _stderr_to(file: Path) -> Iterator[None]:
    """Inside, whatever writes to the process's stderr, Ray's native code above all, writes to
    ``file``; Python's own errors are told outside."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with file.open("ab") as target:
            os.dup2(target.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)


def _init(config: EngineConfig) -> None:
    address = config.address or os.environ.get("RAY_ADDRESS")
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        ray.init(address=address, **common)
        return
    ray.init(
        address="local",
        num_cpus=config.cpus,
        object_store_memory=int(config.object_store_gb * _GIB),
        include_dashboard=False,
        **common,
    )


def _quieten(log_file: Path) -> None:
    """Send what Ray's libraries log in the driver to a file; set what local workers inherit."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Both ways to bound an actor's restarts warn that a third may come.
    warnings.filterwarnings("ignore", category=RayDeprecationWarning)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(log_file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    for name in ("ray", "ray.data", "ray.train"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
