"""How one model is trained by several workers: replicated (DDP) or sharded (FSDP2).

Checkpoints hold whole tensors either way, so a run may go on under the other strategy.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce, get_world_size
from torch.nn.parallel import DistributedDataParallel

from stages.models.med import Med
from stages.training.config import Parallel

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


class Alone:
    """One worker; what the others are built on."""

    def __init__(self, losses: nn.Module) -> None:
        self.model = losses

    def batch(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a batch; the ``last`` of a step brings the workers'
        gradients together."""
        return nullcontext()

    def gradient_norm(self, parameters: list[nn.Parameter], largest: float | None) -> Tensor:
        """The whole gradient's norm, a scalar; beyond ``largest`` the gradient is scaled down."""
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if largest is not None:
            nn.utils.clip_grads_with_norm_(parameters, largest, norm)
        return norm

    def whole(self, tensor: Tensor) -> Tensor:
        """``tensor`` with the parts of all workers; all must ask for it."""
        return tensor

    def parted(self, tensor: Tensor, like: Tensor) -> Tensor:
        """This worker's part of a whole ``tensor``, laid out as ``like``."""
        return tensor

    def finish(self) -> None:
        """Make the weights whole again, to be read; the model is not to be run any more."""


class Replicated(Alone):
    """DDP: each worker holds everything."""

    def __init__(self, losses: nn.Module) -> None:
        # Queues and momentum copies are made equal by gathered features, not by broadcast.
        with warnings.catch_warnings():
            # The name that takes this one's place is newer than the oldest torch that is allowed.
            warnings.simplefilter("ignore", FutureWarning)
            self._ddp = DistributedDataParallel(losses, broadcast_buffers=False)
        super().__init__(self._ddp)

    def batch(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else cast(AbstractContextManager[None], self._ddp.no_sync())


class Sharded(Alone):
    """FSDP2: weights, gradients and optimiser state are cut into a part for each worker.

    The vision layers are units of their own. The text stacks, which share modules and use them in
    three ways in a step, are one unit with the rest and whole while a step runs.
    """

    def __init__(self, losses: nn.Module, med: Med) -> None:
        # Imported where it is used: it costs each worker that does without most of a second.
        from torch.distributed.fsdp import fully_shard

        # FSDP2 takes no scalars: the temperature stays replicated.
        self._scalars = {p for p in losses.parameters() if not p.dim()}
        for tower in (med.vision_model, med.vision_model_m):
            for layer in tower.layers:
                fully_shard(layer)
        fully_shard(losses, ignored_params=self._scalars)
        super().__init__(losses)

    @contextmanager
    def batch(self, last: bool) -> Iterator[None]:
        root = cast("FSDPModule", self.model)
        root.set_requires_gradient_sync(last)
        root.set_is_last_backward(last)
        yield
        for scalar in self._scalars:
            if last and scalar.grad is not None:
                all_reduce(scalar.grad)
                scalar.grad /= get_world_size()

    def gradient_norm(self, parameters: list[nn.Parameter], largest: float | None) -> Tensor:
        parted = [p for p in parameters if p not in self._scalars]
        scalars = [p for p in parameters if p in self._scalars]
        norms = [
            self.whole(nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]))
            for part in (parted, scalars)
        ]
        norm = nn.utils.get_total_norm(norms)
        if largest is not None:
            for part in (parted, scalars):
                nn.utils.clip_grads_with_norm_(part, largest, norm)
        return norm

    def whole(self, tensor: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def parted(self, tensor: Tensor, like: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(like, DTensor) or tensor.shape != like.shape:
            return tensor
        # Every worker has read the whole: nothing is to be sent.
        placed = tensor.to(like.device)
        made: Tensor = distribute_tensor(
            placed, like.device_mesh, like.placements, src_data_rank=None
        )
        return made

    def finish(self) -> None:
        made: dict[int, nn.Parameter] = {}
        for module in self.model.modules():
            for name, value in module.named_parameters(recurse=False, remove_duplicate=False):
                if id(value) not in made:
                    whole = self.whole(value.detach())
                    made[id(value)] = nn.Parameter(whole, requires_grad=value.requires_grad)
                setattr(module, name, made[id(value)])


def parallel(losses: nn.Module, med: Med, kind: Parallel, world_size: int) -> Alone:
    """``losses``, whose model is ``med``, ready for so many workers."""
    if world_size == 1:
        return Alone(losses)
    return Replicated(losses) if kind == "ddp" else Sharded(losses, med)


def whole_state(module: nn.Module, strategy: Alone, keep: bool) -> dict[str, Tensor]:
    """The module's state with whole tensors on the CPU, tied ones still tied; empty unless
    ``keep``. One tensor at a time is whole on the device, which need not hold all of them."""
    tensors = module.state_dict(keep_vars=True)
    made: dict[int, Tensor | None] = {}
    for value in tensors.values():
        if id(value) not in made:
            whole = strategy.whole(value.detach())
            made[id(value)] = whole.cpu() if keep else None
    return {
        name: tensor for name, value in tensors.items() if (tensor := made[id(value)]) is not None
    }


def whole_optimizer(
    optimizer: torch.optim.Optimizer, strategy: Alone, keep: bool
) -> dict[str, Any]:
    """The optimiser's state with whole tensors on the CPU; empty unless ``keep``."""
    state = optimizer.state_dict()
    made: dict[int, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        made[index] = {}
        for name, value in entry.items():
            whole = strategy.whole(value) if isinstance(value, Tensor) else value
            if keep:
                made[index][name] = whole.cpu() if isinstance(whole, Tensor) else whole
    return {**state, "state": made} if keep else {}


def load_optimizer(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], strategy: Alone
) -> None:
    """Put `whole_optimizer`'s state into an optimiser of the same parameters in the same order."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parted = {
        index: {
            name: strategy.parted(value, parameters[index]) if isinstance(value, Tensor) else value
            for name, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parted})
