"""Training on Ray Train: one worker group a round, for all models that are still to be trained."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray import PlacementGroupID
from ray.exceptions import RayActorError
from ray.train import ControllerError, FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)

from pipeline.config import EngineConfig
from pipeline.dag import DatasetTask
from pipeline.engine import metrics
from pipeline.engine.dataset import (
    Checkpoints,
    StageContext,
    drop_images,
    open_inputs,
    publish_folder,
    translate,
)
from pipeline.engine.placement import GIB, check_workers_placed, nodes, training_workers
from pipeline.store import Store
from stages import errors
from stages.errors import CapfiltError, StoreError, TrainingError, UserError

_RESTARTS = 2
_FITS = 3
"""A fit that ends because a worker died at its start is begun again; one that ran has restarted
its workers by itself."""
_WHOLE = "all"
_PATIENCE = timedelta(days=7)
"""How long a worker waits for the others before a task: one on a new node fetches all images first.
Of those that die Ray finds out by itself."""


class TrainContext(StageContext):
    """`stages.base.Context` of one rank of a worker group."""

    def __init__(self, task: DatasetTask, store: Store, board: Any) -> None:
        checkpoints = Checkpoints(store, f"{task.name}-{task.fingerprint}", task.reads)
        super().__init__(task.name, store, board, checkpoints)
        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()


def run_training(
    store: Store, tasks: Sequence[DatasetTask], config: EngineConfig, board: Any
) -> None:
    """Train what has no record yet, in order, in one ``fit`` (starting one takes 15 to 20 s).

    A later task may read what an earlier one publishes. Workers that die are restarted; each
    task goes on from its last checkpoint. An error that would only come again is not tried again.

    Raises:
        CapfiltError: what a stage itself raised.
        ConfigError: the nodes that are up have no place for the workers.
        RunError: the workers keep dying.
    """
    todo = [task for task in tasks if not store.exists(task.record)]
    if not todo:
        return
    ray.get(board.forget.remote())
    for starts_left in reversed(range(_FITS)):
        _clear_places()
        try:
            _fit(todo, store, config, board)
            break
        except ControllerError as error:
            # Ray Train starts dead workers again, but not those that die while it is still
            # speaking to them to start them: that ends the whole fit.
            died = isinstance(error.controller_failure, RayActorError)
            if not died or not starts_left:
                raise translate(error, "training") from error
        except Exception as error:
            raise translate(error, "training") from error
    final = _final_error(todo, board)
    if final is not None:
        raise final


def _fit(todo: Sequence[DatasetTask], store: Store, config: EngineConfig, board: Any) -> None:
    if config.grows_to is None:  # a node may have left, for whose return Ray would wait
        check_workers_placed(config, nodes())
    worker = training_workers(config)
    with tempfile.TemporaryDirectory() as scratch:
        TorchTrainer(
            _worker,
            train_loop_config={"store": store, "tasks": todo, "board": board},
            scaling_config=ScalingConfig(
                num_workers=config.train_workers,
                use_gpu=worker.gpus > 0,
                resources_per_worker={
                    "CPU": worker.cpus,
                    **({"GPU": worker.gpus} if worker.gpus else {}),
                    **({"memory": int(worker.memory_gb * GIB)} if worker.memory_gb else {}),
                },
                accelerator_type=worker.accelerator,
            ),
            run_config=ray.train.RunConfig(
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=_RESTARTS),
            ),
        ).fit()


def _clear_places() -> None:
    """Give up the places of an earlier fit of this driver: where its controller failed they can
    outlive it, and the next fit would wait for ever for the CPUs that they hold."""
    job = ray.get_runtime_context().get_job_id()
    for name, group in placement_group_table().items():
        if name.endswith(job) and group["state"] != "REMOVED":  # an id ends with its job's
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(name))))


def _worker(config: dict[str, Any]) -> None:
    store: Store = config["store"]
    if _final_error(config["tasks"], config["board"]) is not None:
        return  # restarted by Ray, which cannot tell one error from another
    meet = _meeting()
    for task in config["tasks"]:
        if store.exists(task.record):
            continue  # restarted by Ray, after this one was published
        started = time.time()
        ctx = TrainContext(task, store, config["board"])
        with tempfile.TemporaryDirectory() as output:
            # Every rank resolves its inputs here, after the task before has published.
            try:
                inputs = open_inputs(task, store)
                meet()
                task.stage.run(inputs, Path(output), ctx)
            except (TrainingError, UserError) as error:
                if not isinstance(error, StoreError):
                    told = type(error).__name__, str(error)
                    ray.get(config["board"].error.remote(task.name, _WHOLE, *told))
                raise
            if ctx.rank == 0:
                record = publish_folder(task, store, Path(output), started)
                work = metrics.of_record(store, record, metrics.gpu_bytes())
                config["board"].measured.remote(work)
                Checkpoints(store, f"{task.name}-{task.fingerprint}").remove()
        meet()  # no rank reads the next task's inputs before rank 0 has published them
    for task in config["tasks"]:  # all ranks have passed the last barrier
        drop_images(task, store)


def _final_error(tasks: Sequence[DatasetTask], board: Any) -> CapfiltError | None:
    """What a worker has told of a task that it is no use to start again."""
    found = ray.get(board.read.remote()).errors
    for task in tasks:
        if (task.name, _WHOLE) in found:
            kind, message = found[task.name, _WHOLE]
            made: CapfiltError = getattr(errors, kind)(message)
            return made
    return None


def _meeting() -> Callable[[], None]:
    """A barrier of all ranks that waits for longer than those of training, where a rank that does
    not come hangs."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return lambda: None
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return lambda: dist.barrier(group=group)
