"""AdamW, the paper's optimiser; beside it Muon for the matrices of hidden layers, where asked for.

Muon makes the update of a matrix orthogonal (K. Jordan et al., 2024; `torch.optim.Muon`), so that
no direction in it starves. Small models that start from nothing learn in a third of the steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stages.models.med import Med
from stages.training.parallel import Alone, load_optimizer, whole_optimizer


def hidden_matrices(med: Med) -> list[Tensor]:
    """Weights of the linear layers, each once, but for those that give the logits of a loss."""
    outputs = {id(med.itm_head), id(med.text_decoder.cls.predictions.decoder)}
    return [
        module.weight
        for module in med.modules()
        if isinstance(module, nn.Linear) and id(module) not in outputs
    ]


class Optimizers:
    """AdamW over ``parameters``; with ``muon_lr``, Muon takes over those of ``med`` that are
    `hidden_matrices`. Both follow one schedule, each with its own peak."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        med: Med,
        *,
        lr: float,
        weight_decay: float,
        muon_lr: float | None = None,
    ) -> None:
        parameters = list(parameters)
        hidden = {id(p) for p in hidden_matrices(med)} if muon_lr is not None else set()
        matrices = [p for p in parameters if id(p) in hidden]
        # The temperature, a scalar, is never sharded, and no fused call takes both kinds.
        tensors = [p for p in parameters if p.dim() and id(p) not in hidden]
        scalars = [p for p in parameters if not p.dim()]
        groups = [{"params": group} for group in (tensors, scalars) if group]
        self._all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)
        ]
        if muon_lr is not None:
            muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay)
            self._all.append(muon)
        self._peaks = (lr, muon_lr or lr)

    def step(self, lr: float) -> None:
        """Move the parameters at AdamW's learning rate ``lr``, and forget their gradients."""
        for optimizer, peak in zip(self._all, self._peaks, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = lr * (peak / self._peaks[0])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self, strategy: Alone, keep: bool) -> list[dict[str, Any]]:
        """The state of each optimiser with whole tensors, empty ones unless ``keep``."""
        return [whole_optimizer(optimizer, strategy, keep) for optimizer in self._all]

    def load(self, states: Iterable[Mapping[str, Any]], strategy: Alone) -> None:
        """Go on from what `state` gave for the same parameters."""
        for optimizer, state in zip(self._all, states, strict=True):
            load_optimizer(optimizer, state, strategy)
