"""int8 linear layers for CPUs: weights rounded once, activations as they come."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

_LEVELS = 127
_ROWS = 256  # rows at a time: what lies between two steps then stays in the cache


class Int8Linear(nn.Module):
    """``nn.Linear`` in symmetric 8-bit integers, one scale a weight row and one an input row.

    y = (round(x / a) · round(W / b)ᵀ) · a · b + bias, with a and b the largest magnitude of the
    row over 127 (LLM.int8, Dettmers et al. 2022, section 2.1, vector-wise). The sum of products is
    exact in int32, so a row's result does not depend on the rows beside it.
    """

    weight: Tensor
    """(inputs, outputs) int8: the transposed view that `torch._int_mm` takes."""
    scale: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = _scale(weight)
        bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach().float()
        self.register_buffer("weight", (weight / scale).round_().to(torch.int8).t())
        self.register_buffer("scale", scale[:, 0].contiguous())
        self.register_buffer("bias", bias)

    def forward(self, states: Tensor) -> Tensor:
        """(…, inputs) float32 → (…, outputs) float32."""
        rows = states.reshape(-1, states.shape[-1])
        out = rows.new_empty(len(rows), len(self.scale))
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            scale = _scale(part)
            levels = (part / scale).round_().to(torch.int8)
            products = torch._int_mm(levels, self.weight)
            torch.addcmul(self.bias, products * scale, self.scale, out=out[start : start + _ROWS])
        return out.view(*states.shape[:-1], len(self.scale))


def _scale(rows: Tensor) -> Tensor:
    """(N, 1): what one level of each row stands for; a row of zeros takes any."""
    largest = torch.maximum(rows.amax(-1, keepdim=True), rows.amin(-1, keepdim=True).neg_())
    return largest.clamp_min_(1e-30).div_(_LEVELS)


def quantized(module: M) -> M:
    """``module`` with every linear layer inside replaced; embeddings and norms stay float32."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            quantized(child)
    return module
