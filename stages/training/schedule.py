"""Learning rate and the weight of soft targets, as functions of the optimiser step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stages.training.config import Decay


@dataclass(frozen=True)
class Schedule:
    """BLIP's schedules (utils.py and pretrain.py of the release), over steps counted from 0.

    ``decay``: ``step`` multiplies by ``decay_rate`` after each epoch, never below ``min_lr``;
    ``epoch_cosine`` follows half a cosine towards ``min_lr``, one value for each epoch that a step
    begins in, as the original's fine-tuning does; ``cosine`` the same, moving at every step.
    """

    steps: int
    steps_per_epoch: float
    lr: float
    min_lr: float
    warmup_lr: float
    warmup_steps: int
    decay: Decay
    decay_rate: float
    alpha: float
    alpha_epochs: float

    def lr_at(self, step: int) -> float:
        """Learning rate of ``step``: linear from ``warmup_lr`` first, then the decay."""
        decayed = self._decayed(step)
        if step >= self.warmup_steps:
            return decayed
        warm = self.warmup_lr + (self.lr - self.warmup_lr) * step / self.warmup_steps
        return min(warm, decayed)

    def _decayed(self, step: int) -> float:
        epoch = int(step / self.steps_per_epoch)
        if self.decay == "step":
            return max(self.min_lr, self.lr * self.decay_rate**epoch)
        if self.decay == "epoch_cosine":
            # The last batch of a run mostly reaches into an epoch that nobody trains on.
            begun = int((self.steps - 1) / self.steps_per_epoch) + 1
            part = epoch / begun
        else:
            part = step / self.steps
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * part))

    def alpha_at(self, step: int) -> float:
        """Weight of the momentum model's targets: a linear ramp over ``alpha_epochs`` epochs."""
        ramp = self.alpha_epochs * self.steps_per_epoch
        return self.alpha * (min(1.0, step / ramp) if ramp else 1.0)
