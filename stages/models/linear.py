"""Linear layers for inference on a CPU: weights laid out once for its matrix products, or rounded
to 8-bit integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

_LEVELS = 127
_ROWS = 256  # rows at a time: what lies between two steps then stays in the cache
_EXACT = 1024  # inputs: so many products of two levels sum to less than 2^24, exact in float32


class PackedLinear(nn.Module):
    """``nn.Linear`` over float32 weights in the layout that oneDNN reads fastest.

    The same products, summed in another order: in two to four times less time on the few rows of a
    decoding step, which goes into reading weights, and in a tenth to a fifth less on many rows. A
    weight that something else holds too is kept twice.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # oneDNN reads layouts that no Tensor method knows: not a buffer, so that nothing moves it.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        bias = None if linear.bias is None else linear.bias.detach()
        self.register_buffer("bias", bias)

    def forward(self, states: Tensor, activation: str = "none") -> Tensor:
        """(…, inputs) float32 → (…, outputs) float32; ``activation`` "gelu" is the exact one."""
        rows = states.reshape(-1, states.shape[-1])
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self._packed, self.bias, activation, [], "none" if activation == "gelu" else ""
        )
        return out.view(*states.shape[:-1], out.shape[-1])


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `PackedLinear` runs here on such weights."""
    has_op: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    is_built = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return device.type == "cpu" and dtype == torch.float32 and is_built and has_op is not None


def gelu_of(layer: nn.Module, states: Tensor) -> Tensor:
    """gelu(``layer(states)``), in one go where ``layer`` is one of ours."""
    if isinstance(layer, PackedLinear | Int8Linear):
        return layer(states, "gelu")  # type: ignore[no-any-return]
    return F.gelu(cast(Tensor, layer(states)))


class Int8Linear(nn.Module):
    """``nn.Linear`` in symmetric 8-bit integers, one scale a weight row and one an input row.

    y = (round(x / a) · round(W / b)ᵀ) · a · b + bias, with a and b the largest magnitude of the
    row over 127 (LLM.int8, Dettmers et al. 2022, section 2.1, vector-wise). The sum of products is
    exact up to 2^24, so a row's result depends neither on the rows beside it nor on the CPU. One
    without instructions for such products multiplies in float32, which is as exact, as large as
    float32 layers and a little slower. With `dtype` bfloat16 the result is rounded once more.
    """

    scale: Tensor
    bias: Tensor
    dtype = torch.float32
    """Of the result."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = _scale(weight)
        bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach().float()
        levels = (weight / scale).round_()
        self.products = _IntProducts(levels) if multiplies_int8() else _FloatProducts(levels)
        self.register_buffer("scale", scale[:, 0].contiguous())
        self.register_buffer("bias", bias)

    def forward(self, states: Tensor, activation: str = "none") -> Tensor:
        """(…, inputs) floats → (…, outputs) `dtype`; ``activation`` "gelu" is the exact one."""
        rows = states.reshape(-1, states.shape[-1])
        out = rows.new_empty(len(rows), len(self.scale), dtype=self.dtype)
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS].float()
            scale = _scale(part)
            sums = self.products((part / scale).round_()).mul_(scale)
            done = out[start : start + _ROWS]
            torch.addcmul(self.bias, sums, self.scale, out=done)
            if activation == "gelu":
                torch.ops.aten.gelu_(done)
        return out.view(*states.shape[:-1], len(self.scale))


def multiplies_int8() -> bool:
    """Whether this CPU multiplies 8-bit integers fast, and never through 16-bit sums that overflow,
    as AVX-512 alone does."""
    return torch.cpu._is_vnni_supported()


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


class _IntProducts(nn.Module):
    """(N, inputs) levels in float32 → their products with the weight's, (N, outputs) float32: sums
    of integers, rounded once.

    oneDNN multiplies unsigned by signed: levels are given to it as 1 to 255 around a zero of 128,
    which it takes off again. Signed ones it multiplies fast with AMX only.
    """

    def __init__(self, levels: Tensor) -> None:
        super().__init__()
        # As `PackedLinear`'s: one layout for many rows and for few.
        self._packed = torch.ops.onednn.qlinear_prepack(levels.to(torch.int8), None)
        self._ones, self._zeros = (
            torch.ones(len(levels)),
            torch.zeros(len(levels), dtype=torch.int64),
        )

    def forward(self, levels: Tensor) -> Tensor:
        sums: Tensor = torch.ops.onednn.qlinear_pointwise(
            (levels + 128).to(torch.uint8), 1.0, 128, self._packed, self._ones, self._zeros, None,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        return sums


class _FloatProducts(nn.Module):
    """The same, by float32 products of few enough inputs at a time to be exact."""

    def __init__(self, levels: Tensor) -> None:
        super().__init__()
        starts = range(0, levels.shape[1], _EXACT)
        self.parts = nn.ModuleList(_product(levels[:, at : at + _EXACT]) for at in starts)

    def forward(self, levels: Tensor) -> Tensor:
        total = levels.new_zeros((), dtype=torch.int32)
        for number, part in enumerate(self.parts):
            start = number * _EXACT
            total = total + part(levels[:, start : start + _EXACT]).int()
        return total.float()


def _product(levels: Tensor) -> nn.Module:
    outputs, inputs = levels.shape
    linear = nn.Linear(inputs, outputs, bias=False)
    linear.weight = nn.Parameter(levels.contiguous(), requires_grad=False)
    return PackedLinear(linear) if can_pack(levels.device, levels.dtype) else linear


def _scale(rows: Tensor) -> Tensor:
    """(N, 1): what one level of each row stands for; a row of zeros takes any."""
    largest = torch.maximum(rows.amax(-1, keepdim=True), rows.amin(-1, keepdim=True).neg_())
    return largest.clamp_min_(1e-30).div_(_LEVELS)


_OVER_IMAGES = ("self_attn.qkv", *(f"crossattention.self.{x}" for x in ("query", "key", "value")))
"""Ends of the names of layers whose results meet in attention over an image's tokens."""


def in_int8(module: M) -> M:
    """``module`` with `Int8Linear` in the place of every linear layer. Where the CPU is fast at it,
    attention over images, which is then most of the work that is left, is in bfloat16; so what the
    model gives depends on the CPU, as that of floats does."""
    rounded = with_linears(module, Int8Linear)
    for name, layer in rounded.named_modules():
        if isinstance(layer, Int8Linear) and name.endswith(_OVER_IMAGES) and multiplies_bfloat16():
            layer.dtype = torch.bfloat16
    return rounded


def with_linears(module: M, make: Callable[[nn.Linear], nn.Module]) -> M:
    """``module`` with every linear layer inside replaced by what ``make`` makes of it."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, make(child))
        else:
            with_linears(child, make)
    return module
