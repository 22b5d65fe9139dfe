"""The training loop that pretraining and both fine-tunings share.

Everything random in a step follows from (seed, step, rank): the pairs and their order, dropout,
hard negatives. So a checkpoint needs weights, optimiser and step alone, and a resumed run does
what the unbroken one does, on a CPU bit for bit.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, ClassVar, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.distributed import all_reduce

from stages.base import Context
from stages.errors import ConfigError, TrainingError
from stages.models.losses import MedLosses
from stages.models.med import Med
from stages.models.workers import Workers
from stages.schemas import TRAINING_LOG
from stages.training.config import TrainingConfig
from stages.training.data import Batch, Images, Loader, Pairs
from stages.training.device import default_device, torch_threads
from stages.training.optimizer import Optimizers
from stages.training.parallel import parallel, whole_state
from stages.training.schedule import Schedule

CHECKPOINT = "training.pt"
DIVERGED = 3.0
"""Training stops where the mean loss of a log line exceeds the first line's by this factor."""


class Losses(nn.Module, ABC):
    """What one stage minimises: MED's losses on a batch. Subclasses define ``forward``."""

    matching: ClassVar[bool] = True
    """Whether ITC and ITM are among them, and with them momentum copies and temperature."""

    def __init__(self, med: Med) -> None:
        super().__init__()
        self.med = med

    @abstractmethod
    def forward(self, batch: Batch, alpha: float, workers: Workers | None) -> MedLosses: ...


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
    the last one. Resumes from ``ctx.resume_from()``. Images that turned out to be broken are
    counted in ``pairs.skipped``.

    Args:
        name: of the stage, in the log.
        trained: which losses the stage has, of itc, itm and lm; the others are null in the log.

    Raises:
        TrainingError: the loss is not finite or diverges, the last checkpoint stays; or workers
            have not read the same pairs.
        ConfigError: the batch cannot be shared out evenly among the workers, or texts are longer
            than the model reads.
    """
    uneven = config.uneven(ctx.world_size)
    if uneven is not None:
        raise ConfigError(f"{name}.{uneven}")
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
        self.pairs = pairs
        self.device = default_device()
        self.losses = losses.to(self.device).train()
        self.med = losses.med
        size = self.med.config.vision.image_size
        self.images = Images(pairs.shards, size, config.augmentation, config.cache_mb << 20)
        self.loader = Loader(
            pairs,
            self.images,
            batch_size=config.batch_size // config.accumulate,
            seed=config.seed,
            rank=ctx.rank,
            world_size=ctx.world_size,
            human_repeat=human_repeat,
            min_scale=config.min_scale,
        )
        self.schedule = _schedule(config, self.loader.epoch_length)
        self.log: list[dict[str, object]] = []
        self.window: list[Tensor] = []
        self.first_loss: float | None = None
        self.workers: Workers | None = None
        if ctx.world_size > 1:
            share = config.global_negatives
            self.workers = Workers(ctx.rank, ctx.world_size, self.device, share)
            self._check_pairs(self.workers)
        resumed = self._resume()
        self.start = 0 if resumed is None else cast(int, resumed["step"])
        self._prepare_layers()
        self.parallel = parallel(losses, self.med, config.parallel, ctx.world_size)
        self.parameters = [p for p in losses.parameters() if p.requires_grad]
        self.optimizers = Optimizers(
            self.parameters,
            self.med,
            lr=config.lr,
            weight_decay=config.weight_decay,
            muon_lr=config.muon_lr,
        )
        if resumed is not None:
            self.optimizers.load(resumed["optimizers"], self.parallel)

    def _check_pairs(self, workers: Workers) -> None:
        # Else one would take other steps than the others, or more, and wait for them for ever.
        found = workers.union({len(self.pairs)})
        if len(found) > 1:
            raise TrainingError(
                f"{self.name}: the workers read from {min(found):,} to {max(found):,} pairs of the "
                "same tars; look for a damaged tar or disk on one of their machines and run again"
            )

    def _prepare_layers(self) -> None:
        stacks = (self.med.vision_model, self.med.text_encoder, self.med.text_decoder.bert)
        for stack in stacks:
            stack.checkpointing = self.config.gradient_checkpointing
        if self.config.compile:
            for stack in (*stacks, self.med.vision_model_m, self.med.text_encoder_m):
                for layer in stack.layers:
                    layer.compile()

    def run(self) -> pa.Table:
        total, parts = self.schedule.steps, self.config.accumulate
        since, logged = time.perf_counter(), self.start
        batches = self.loader.batches(self.start * parts, total * parts, self.config.data_threads)
        for step in range(self.start, total):
            self._step(step, batches)
            done = step + 1
            last = done == total
            if done % self.config.log_every == 0 or last:
                now = time.perf_counter()
                images = (done - logged) * self.config.batch_size
                self._write_line(done, images / max(now - since, 1e-9))
                since, logged = now, done
            if done % self.config.checkpoint_every_steps == 0 and not last:
                self._save(done)
        self.parallel.finish()
        self.pairs.skipped["image"] = len(self._broken())
        return pa.Table.from_pylist(self.log, schema=TRAINING_LOG)

    def _step(self, step: int, batches: Iterator[Batch]) -> None:
        torch.manual_seed(_step_seed(self.config.seed, step, self.ctx.rank))
        if self.workers is not None:
            self.workers.generator.manual_seed(_step_seed(self.config.seed, step, 0))
        if self.losses.matching:
            self.med.begin_step()
        parts = self.config.accumulate
        rows = [
            self._backward(step, batch.to(self.device), part == parts - 1)
            for part, batch in enumerate(islice(batches, parts))
        ]
        row = rows[0] if parts == 1 else torch.stack(rows).mean(0)
        norm = self.parallel.gradient_norm(self.parameters, self.config.clip_grad_norm)
        self._check_step(step, row[0].item(), norm.item())
        self.optimizers.step(self.schedule.lr_at(step))
        self.window.append(row)

    def _backward(self, step: int, batch: Batch, last: bool) -> Tensor:
        """Add to the gradients; returns total, ITC, ITM and LM."""
        half = self.config.precision == "bfloat16"
        with self.parallel.batch(last):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                losses: MedLosses = self.parallel.model(
                    batch, self.schedule.alpha_at(step), self.workers
                )
            total = losses.total
            (total / self.config.accumulate).backward()  # type: ignore[no-untyped-call]
        return torch.stack([total.detach(), *(loss.detach() for loss in losses)])

    def _check_step(self, step: int, loss: float, gradient: float) -> None:
        # Before the optimiser moves: so weights stay finite, and with them every checkpoint.
        if not math.isfinite(loss):
            self._fail(step + 1, f"the loss is {loss}")
        if not math.isfinite(gradient):
            self._fail(step + 1, f"the gradient's norm is {gradient} at a loss of {loss:.3g}")

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
            self.window = list(rows)  # what a checkpoint keeps holds for every worker
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
        first = self.ctx.rank == 0
        broken = self._broken()
        model = whole_state(self.med, self.parallel, keep=first)
        optimizers = self.optimizers.state(self.parallel, keep=first)
        if not first:
            return
        state = {
            "step": done,
            "model": model,
            "optimizers": optimizers,
            "log": self.log,
            "window": self.window,
            "first_loss": self.first_loss,
            "broken": sorted(broken),
        }
        self.ctx.save(lambda folder: torch.save(state, folder / CHECKPOINT))

    def _broken(self) -> set[int]:
        """Images that some worker could not decode so far."""
        broken = self.images.broken
        return broken if self.workers is None else self.workers.union(broken)

    def _resume(self) -> Mapping[str, Any] | None:
        """Take up the last checkpoint, all but its optimiser; None where there is none."""
        folder = self.ctx.resume_from()
        if folder is None:
            return None
        state: Mapping[str, Any] = torch.load(
            folder / CHECKPOINT, map_location="cpu", weights_only=True
        )
        self.med.load_state_dict(state["model"])
        self.log, self.first_loss = list(state["log"]), state["first_loss"]
        self.window = [row.to(self.device) for row in state["window"]]
        self.images.broken.update(state["broken"])
        return state


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
