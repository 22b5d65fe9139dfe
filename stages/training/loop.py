"""The training loop that pretraining and both fine-tunings share.

Everything random in a step follows from (seed, step, rank): the pairs and their order, dropout,
hard negatives. So a checkpoint needs weights, optimiser and step alone, and a resumed run does
what the unbroken one does, on a CPU bit for bit.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed import all_gather_into_tensor, all_reduce
from torch.nn.parallel import DistributedDataParallel

from stages.base import Config, Context, operational
from stages.errors import ConfigError, TrainingError
from stages.models.losses import MedLosses
from stages.models.med import Gather, Med
from stages.schemas import TRAINING_LOG
from stages.training.data import Augmentation, Batch, Images, Loader, Pairs
from stages.training.device import default_device, torch_threads
from stages.training.schedule import Decay, Schedule

CHECKPOINT = "training.pt"
DIVERGED = 3.0
"""Training stops where the mean loss of a log line exceeds the first line's by this factor."""


class TrainingConfig(Config):
    """Optimiser, schedule and data order; subclasses set the paper's values of their stage."""

    batch_size: int = Field(2880, ge=1)
    """Pairs a step, over all workers; must be divisible by their number."""
    epochs: float = Field(20, gt=0)
    steps: int | None = Field(None, ge=1)
    """Optimiser steps; takes the place of ``epochs``."""
    lr: float = Field(3e-4, gt=0)
    min_lr: float = Field(1e-6, ge=0)
    warmup_lr: float = Field(1e-6, ge=0)
    warmup_steps: int = Field(0, ge=0)
    decay: Decay = "cosine"
    """See `stages.training.schedule.Schedule`."""
    decay_rate: float = Field(0.9, gt=0, le=1)
    weight_decay: float = Field(0.05, ge=0)
    alpha: float = Field(0.4, ge=0, le=1)
    """Weight of the momentum model's soft targets in ITC, after the ramp."""
    alpha_epochs: float = Field(2, ge=0)
    """Length of alpha's ramp from 0."""
    clip_grad_norm: float | None = Field(None, gt=0)
    """Largest gradient norm; None, as the original, does not clip."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast. The original trains in fp32."""
    augmentation: Augmentation = "blip"
    """blip: random crop, flip, RandAugment. none: for texts that a flip would make wrong."""
    min_scale: float = Field(0.2, gt=0, le=1)
    """Smallest part of an image's area that a random crop keeps."""
    max_words: int = Field(30, ge=1)
    """Words of a text that are read."""
    seed: int = Field(0, ge=0)
    checkpoint_every_steps: int = operational(500, ge=1)
    log_every: int = operational(50, ge=1)
    """Steps a line of the training log."""
    threads: int | None = operational(None, ge=1)
    """Threads of torch; None leaves them as they are. Other numbers may round differently."""
    data_threads: int = operational(2, ge=0)
    """Threads that prepare batches ahead; 0 prepares each when it is needed."""
    cache_mb: int = operational(1024, ge=0)
    """Memory for decoded images, MB a worker."""


class Losses(nn.Module, ABC):
    """What one stage minimises: MED's losses on a batch. Subclasses define ``forward``."""

    def __init__(self, med: Med) -> None:
        super().__init__()
        self.med = med

    @abstractmethod
    def forward(self, batch: Batch, alpha: float, gather: Gather | None) -> MedLosses: ...


def train(
    name: str,
    trained: tuple[str, ...],
    losses: Losses,
    pairs: Pairs,
    config: TrainingConfig,
    ctx: Context,
    human_repeat: int = 1,
) -> pa.Table:
    """Train ``losses.med`` in place; returns its log (TRAINING_LOG), a line being the means since
    the last one. Resumes from ``ctx.resume_from()``.

    Args:
        name: of the stage, in the log.
        trained: which losses the stage has, of itc, itm and lm; the others are null in the log.

    Raises:
        TrainingError: the loss is not finite or diverges; the last checkpoint stays.
        ConfigError: the batch cannot be shared out evenly among the workers, or texts are longer
            than the model reads.
    """
    if config.batch_size % ctx.world_size:
        raise ConfigError(
            f"{name}.batch_size: {config.batch_size} pairs cannot be shared out evenly among "
            f"{ctx.world_size} workers; give a multiple of {ctx.world_size}"
        )
    longest, positions = int(pairs.lengths.max()), losses.med.config.text.max_positions
    if longest > positions:
        raise ConfigError(
            f"{name}: texts of {longest} tokens do not fit the model's {positions} positions; "
            f"lower max_tokens (pretrain: model.max_text_tokens) to {positions}"
        )
    with torch_threads(config.threads), torch.random.fork_rng():
        return _Training(name, trained, losses, pairs, config, ctx, human_repeat).run()


class _Training:
    def __init__(
        self,
        name: str,
        trained: tuple[str, ...],
        losses: Losses,
        pairs: Pairs,
        config: TrainingConfig,
        ctx: Context,
        human_repeat: int,
    ) -> None:
        self.name, self.trained, self.config, self.ctx = name, trained, config, ctx
        self.device = default_device()
        self.losses = losses.to(self.device).train()
        self.med = losses.med
        shape = self.med.config.vision.image_size
        images = Images(pairs.shards, shape, config.augmentation, config.cache_mb << 20)
        self.images = images
        self.loader = Loader(
            pairs,
            images,
            batch_size=config.batch_size,
            seed=config.seed,
            rank=ctx.rank,
            world_size=ctx.world_size,
            human_repeat=human_repeat,
            min_scale=config.min_scale,
        )
        self.schedule = _schedule(config, self.loader.epoch_length)
        self.parameters = [p for p in self.losses.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.log: list[dict[str, object]] = []
        self.window: list[Tensor] = []
        self.first_loss: float | None = None

    def run(self) -> pa.Table:
        start = self._resume()
        model, gather = self._distributed()
        total = self.schedule.steps
        since, logged = time.perf_counter(), start
        for batch in self.loader.batches(start, total, self.config.data_threads):
            self._step(model, batch.to(self.device), gather)
            done = batch.step + 1
            last = done == total
            if done % self.config.log_every == 0 or last:
                now = time.perf_counter()
                images = (done - logged) * self.config.batch_size
                self._write_line(done, images / max(now - since, 1e-9))
                since, logged = now, done
            if done % self.config.checkpoint_every_steps == 0 and not last:
                self._save(done)
        return pa.Table.from_pylist(self.log, schema=TRAINING_LOG)

    def _step(self, model: nn.Module, batch: Batch, gather: Gather | None) -> None:
        torch.manual_seed(_step_seed(self.config.seed, batch.step, self.ctx.rank))
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.lr_at(batch.step)
        half = self.config.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            losses: MedLosses = model(batch, self.schedule.alpha_at(batch.step), gather)
        total = losses.total
        total.backward()  # type: ignore[no-untyped-call]
        self._check_step(batch.step, total.item(), self._gradient_norm())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.window.append(torch.stack([total.detach(), *(loss.detach() for loss in losses)]))

    def _gradient_norm(self) -> float:
        """Norm of the whole gradient, before it is clipped."""
        if self.config.clip_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_grad_norm)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        return norm.item()

    def _check_step(self, step: int, loss: float, gradient: float) -> None:
        # Before the optimiser moves: so weights stay finite, and with them every checkpoint.
        if not math.isfinite(loss):
            self._fail(step + 1, f"the loss is {loss}")
        if not math.isfinite(gradient):
            self._fail(step + 1, f"the gradient's norm is {gradient} at a loss of {loss:.3g}")

    def _distributed(self) -> tuple[nn.Module, Gather | None]:
        if self.ctx.world_size == 1:
            return self.losses, None
        world = self.ctx.world_size

        def gather(tensor: Tensor) -> Tensor:
            whole = tensor.new_empty((world * len(tensor), *tensor.shape[1:]))
            all_gather_into_tensor(whole, tensor.contiguous())
            return whole

        # Queues and momentum copies are made equal on every worker by `gather`, not by broadcast.
        return DistributedDataParallel(self.losses, broadcast_buffers=False), gather

    # ---- log ---------------------------------------------------------------------------------

    def _check(self, done: int) -> list[float]:
        """Means of the window's losses.

        Raises:
            TrainingError: they are far above the first line's.
        """
        rows = torch.stack(self.window)
        if self.ctx.world_size > 1:
            # So that all workers see the same means, and all stop where one of them must.
            all_reduce(rows)
            rows /= self.ctx.world_size
        means: list[float] = rows.double().mean(0).tolist()
        if self.first_loss is not None and means[0] > DIVERGED * self.first_loss:
            self._fail(done, f"the loss rose to {means[0]:.3g} from {self.first_loss:.3g} at first")
        return means

    def _fail(self, step: int, what: str) -> None:
        raise TrainingError(
            f"{self.name}: step {step} of {self.schedule.steps}: {what}; lower "
            f"lr ({self.config.lr:g}), lengthen warmup_steps ({self.config.warmup_steps}) or set "
            f"clip_grad_norm; the last good checkpoint is kept"
        )

    def _write_line(self, done: int, images_per_second: float) -> None:
        means = self._check(done)
        self.window = []
        if self.first_loss is None:
            self.first_loss = means[0]
        parts = dict(zip(MedLosses._fields, means[1:], strict=True))
        self.log.append(
            {
                "stage": self.name,
                "step": done,
                "loss": means[0],
                **{f"loss_{k}": v if k in self.trained else None for k, v in parts.items()},
                "lr": self.schedule.lr_at(done - 1),
                "images_per_second": images_per_second,
            }
        )
        if self.ctx.rank == 0:
            message = f"loss {means[0]:.3f}, {images_per_second:,.0f} pairs/s"
            self.ctx.progress(message, done, self.schedule.steps)

    # ---- checkpoints ---------------------------------------------------------------------------

    def _save(self, done: int) -> None:
        if self.window:
            self._check(done)
        if self.ctx.rank:
            return
        state = {
            "step": done,
            "model": self.med.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "log": self.log,
            "window": self.window,
            "first_loss": self.first_loss,
            "broken": sorted(self.images.broken),
        }
        self.ctx.save(lambda folder: torch.save(state, folder / CHECKPOINT))

    def _resume(self) -> int:
        folder = self.ctx.resume_from()
        if folder is None:
            return 0
        state: Mapping[str, Any] = torch.load(
            folder / CHECKPOINT, map_location="cpu", weights_only=True
        )
        self.med.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.log, self.first_loss = list(state["log"]), state["first_loss"]
        self.window = [row.to(self.device) for row in state["window"]]
        self.images.broken.update(state["broken"])
        return cast(int, state["step"])


def _schedule(config: TrainingConfig, epoch_length: int) -> Schedule:
    per_epoch = epoch_length / config.batch_size
    return Schedule(
        steps=config.steps or max(1, math.ceil(config.epochs * per_epoch)),
        steps_per_epoch=per_epoch,
        lr=config.lr,
        min_lr=config.min_lr,
        warmup_lr=config.warmup_lr,
        warmup_steps=config.warmup_steps,
        decay=config.decay,
        decay_rate=config.decay_rate,
        alpha=config.alpha,
        alpha_epochs=config.alpha_epochs,
    )


def _step_seed(seed: int, step: int, rank: int) -> int:
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)
