"""What the workers of one training run tell each other in a step; no gradient passes through it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ReduceOp, all_gather, all_gather_object, all_reduce

from stages.models.losses import IGNORED


class Workers:
    """The workers that train one model; each holds as many rows of the global batch, by rank.

    ``share``: whether the losses are those of the global batch, whatever the number of workers.
    Else each worker takes its candidates, negatives and means from its own rows, as the
    original's pretraining does, and only the queue is filled together.
    """

    def __init__(self, rank: int, size: int, device: torch.device, share: bool = True) -> None:
        self.rank, self.size, self.share = rank, size, share
        self.generator = torch.Generator(device)
        """Draws what every worker must draw alike; seeded alike before each step."""

    def gather(self, tensor: Tensor) -> Tensor:
        """(B, …) of this worker → (size · B, …) of all, the same on each."""
        whole = tensor.new_empty((self.size * len(tensor), *tensor.shape[1:]))
        all_gather(list(whole.chunk(self.size)), tensor.contiguous())
        return whole

    def gather_padded(self, tensor: Tensor) -> Tensor:
        """As `gather`, of (B, L) with another L on each worker: zeros on the right fill it up."""
        longest = torch.tensor(tensor.shape[1], device=tensor.device)
        all_reduce(longest, ReduceOp.MAX)
        return self.gather(F.pad(tensor, (0, int(longest) - tensor.shape[1])))

    def union(self, numbers: set[int]) -> set[int]:
        """Every worker's ``numbers`` together."""
        found: list[set[int]] = [set()] * self.size
        all_gather_object(found, numbers)
        return set().union(*found)

    def total(self, count: Tensor) -> Tensor:
        """The sum of every worker's ``count``."""
        whole = count.clone()
        all_reduce(whole)
        return whole

    def own(self, rows: int) -> slice:
        """Where this worker's ``rows`` rows lie in what `gather` returns."""
        return slice(self.rank * rows, (self.rank + 1) * rows)


def cross_entropy(
    logits: Tensor, labels: Tensor, workers: Workers | None, label_smoothing: float = 0.0
) -> Tensor:
    """Mean cross-entropy over the rows whose label is not `IGNORED`.

    With ``workers``, a part of it: the mean of all workers' parts is the mean over all their rows,
    of which one may hold more than another.
    """
    if workers is None:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    total = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum")
    return total * workers.size / workers.total((labels != IGNORED).sum()).clamp(min=1)
