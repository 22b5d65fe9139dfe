"""Joining a Ray cluster, or starting a local one, without its chatter on the screen."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray._private.resource_and_label_spec import ResourceAndLabelSpec
from ray.exceptions import GetTimeoutError, RayError
from ray.util.annotations import RayDeprecationWarning
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config import EngineConfig
from pipeline.engine.board import Board
from pipeline.engine.placement import Node
from pipeline.store import Store
from stages.errors import CapfiltError, ConfigError, RunError

_GIB = 1 << 30
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 18.0
"""Together below half a minute. Ray itself tries for two minutes, and cannot be interrupted."""
_NOTICE_SECONDS = 10.0
_WORKER_SECONDS = 900.0
"""Ray gives a runtime environment 600 s to be built, and one with many packages takes minutes."""
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray's job server: what the driver of a job takes over."""

_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Workers must not rebuild an environment of their own when the driver came from `uv run`.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Threads of torch that wait spin for some 10 us, then sleep. Spinning for long takes the cores
    # from the stages beside them; sleeping at once doubled the time of a small training step.
    "GOMP_SPINCOUNT": "10000",
    "NO_ALBUMENTATIONS_UPDATE": "1",
}
_LOCAL_ENVIRONMENT = {
    # The only node is not taken away with a warning; the watcher would be one more process that
    # imports Ray Train while the training worker wants to.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how long the end of a fit may go unnoticed
}


@contextmanager
def connected(
    config: EngineConfig, log_file: Path, tell: Callable[[str], None] = print
) -> Iterator[Any]:
    """Inside, Ray is there; yields the `Board` of this driver.

    A local Ray is started where no address is given, and stopped at the end. `look` first: it
    knows within half a minute whether this can be. A runtime environment that cannot be built is
    refused as soon as Ray says so; ``tell`` gets a line where it is built for long.

    Raises:
        ConfigError: there is no such cluster, it is of another version or wants a token, or its
            workers cannot have the runtime environment of this driver; or a local Ray is to grow.
        RunError: a local Ray cannot be started.
    """
    _quieten(log_file)
    with _stderr_to(log_file):
        with _sigterm_kept():
            _init(config)
        try:
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            context.print_on_execution_start = False
            yield _board(tell)
        finally:
            ray.shutdown()


@contextmanager
def _sigterm_kept() -> Iterator[None]:
    """SIGTERM does afterwards what it did before: Ray's way to end, which it sets when it joins a
    cluster, lets nothing be told or released."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _board(tell: Callable[[str], None]) -> Any:
    """The driver's board, on the driver's node: others may leave. The first worker that must start,
    it tells whether any can."""
    board_class: Any = Board
    here = ray.get_runtime_context().get_node_id()
    placed = NodeAffinitySchedulingStrategy(here, soft=False)
    board = board_class.options(scheduling_strategy=placed).remote()
    answer = board.read.remote()
    try:
        if not ray.wait([answer], timeout=_NOTICE_SECONDS)[0]:
            tell("Ray is still starting its first worker: the runtime environment is being built")
        ray.get(answer, timeout=_WORKER_SECONDS)
    except RayError as error:
        slow = isinstance(error, GetTimeoutError)
        why = f"none within {_WORKER_SECONDS:g} s" if slow else _line(error)
        raise ConfigError(
            f"runtime_env: Ray cannot start a worker for this driver: {why}; mend the "
            "runtime environment that the job was submitted with, or the nodes' image"
        ) from error
    return board


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


def log_file(store: Store) -> Path:
    """Where Ray's own log lines go: the run folder, or this machine for a remote one."""
    return Path(store.path("logs/ray.log")) if store.is_local else store.cache / "ray.log"


def _init(config: EngineConfig) -> None:
    address = _address(config)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            _check_listens(address)
            ray.init(address=address, **common)
            return
        _set_defaults(_LOCAL_ENVIRONMENT)
        ray.init(
            address="local",
            num_cpus=config.cpus,
            object_store_memory=int(config.object_store_gb * _GIB),
            include_dashboard=False,
            **common,
        )
    except CapfiltError:
        raise
    except Exception as error:  # Ray raises plain ones, as where a raylet takes too long to start
        if address:
            raise _unusable(address, _line(error)) from error
        raise RunError(f"cannot start a local Ray: {_line(error)}") from error


def look(config: EngineConfig) -> list[Node]:
    """The nodes of the cluster that `connected` would join, or this machine where it would start a
    local Ray; refuses within half a minute what ``ray.init`` would wait minutes for.

    Raises:
        ConfigError: there is no such cluster, it is of another version or wants a token; or a local
            Ray is to grow.
        RunError: a local Ray could not be started.
    """
    address = _address(config)
    if address is None:
        return [_this_machine(config)]
    _check_listens(address)
    # In a process of its own, since Ray's native client waits on with no way to stop it; and as a
    # driver of its own, not as the job that this one may be.
    environment = {name: value for name, value in os.environ.items() if name != _JOB}
    command = [sys.executable, "-c", _LOOK, address]
    try:
        done = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=_ANSWER_SECONDS,
            env=environment,
        )
    except subprocess.TimeoutExpired as error:
        seconds = f"{_ANSWER_SECONDS:g} s"
        raise _unusable(address, f"no Ray answers there within {seconds}") from error
    if done.returncode != 0:
        told = [line for line in done.stderr.splitlines() if line.strip()]
        raise _unusable(address, told[-1].strip() if told else "Ray gives no reason")
    found: list[Node] = json.loads(done.stdout.splitlines()[-1])
    return found


def _this_machine(config: EngineConfig) -> Node:
    """What a local Ray would have, as Ray itself counts it when it starts."""
    logging.getLogger("ray").setLevel(logging.ERROR)  # as `ray.init` will
    store = int(config.object_store_gb * _GIB)
    try:
        spec = ResourceAndLabelSpec(num_cpus=config.cpus, object_store_memory=store)
        found: Node = spec.resolve(is_head=True).to_resource_dict()  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(f"cannot start a local Ray: {_line(error)}") from error
    return found


_LOOK = """
import json, logging, sys
import ray
from ray._raylet import GcsClient
try:
    if ":" in sys.argv[1]:  # "auto" is for ray.init to resolve
        GcsClient(sys.argv[1]).internal_kv_keys(b"", b"")  # says at once that it wants a token
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
    print(json.dumps([node["Resources"] for node in ray.nodes() if node["Alive"]]))
except Exception as error:
    sys.exit(" ".join(str(error).split())[:400] or type(error).__name__)
"""


def _address(config: EngineConfig) -> str | None:
    """Of the cluster to join; None stands for a local Ray."""
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        return address
    if config.grows_to is not None:
        raise ConfigError(
            "engine.grows_to: a local Ray does not grow, and would wait for what it lacks; give "
            "engine.address or RAY_ADDRESS, or engine.grows_to=null to use this machine alone"
        )
    return None


def _check_listens(address: str) -> None:
    """Raises ConfigError where nothing listens at the address, or no Ray that a driver joins."""
    if address.startswith("ray://"):
        raise _unusable(address, "Ray Client runs no pipelines; submit the run with `ray job`")
    if "://" in address:
        raise _unusable(address, "that is where `ray job` submits to, and no driver joins a URL")
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto" and the like, which Ray resolves at once
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except OSError as error:
        raise _unusable(address, f"nothing answers there ({error})") from error


def _unusable(address: str, why: str) -> ConfigError:
    given = "RAY_ADDRESS" if address == os.environ.get("RAY_ADDRESS") else "engine.address"
    return ConfigError(
        f"{given}: cannot use the Ray cluster at {address}: {why}; give HOST:PORT of a "
        "head of the same Ray and Python, with its token in RAY_AUTH_TOKEN if it wants one"
    )


def _quieten(log_file: Path) -> None:
    """Send what Ray's libraries log in the driver to a file; set what local workers inherit."""
    _set_defaults(_ENVIRONMENT)
    # Both ways to bound an actor's restarts warn that a third may come.
    warnings.filterwarnings("ignore", category=RayDeprecationWarning)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(log_file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    for name in ("ray", "ray.data", "ray.train"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False


def _set_defaults(environment: Mapping[str, str]) -> None:
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def _line(error: Exception) -> str:
    """What an error says, which Ray spreads over lines, in one; of a traceback its last line."""
    told = str(error).strip()
    if "Traceback (" in told:
        told = told.splitlines()[-1]
    return " ".join(told.split())[:400] or type(error).__name__
