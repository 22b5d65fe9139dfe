"""Linear layers in 8-bit integers."""

from __future__ import annotations

import torch
from torch import nn

from stages.models.int8 import Int8Linear, quantized


def test_products_are_those_of_the_rounded_factors() -> None:
    torch.manual_seed(0)
    linear, states = nn.Linear(40, 24), torch.randn(3, 200, 40)
    a = states.abs().amax(-1, keepdim=True) / 127
    b = linear.weight.abs().amax(-1, keepdim=True) / 127
    rounded = (states / a).round().double() @ (linear.weight / b).round().double().T
    expected = rounded * a * b.T + linear.bias
    with torch.inference_mode():
        found = Int8Linear(linear)(states)
        assert found.dtype == torch.float32
        assert (found - expected).abs().max() < 1e-5
        # Rounding by half a level of 127: some 1 % of the result's size.
        assert (found - linear(states)).norm() < 0.02 * linear(states).norm()


@torch.inference_mode()
def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    torch.manual_seed(0)
    layer, states = Int8Linear(nn.Linear(64, 32)), torch.randn(700, 64) * 3
    states[5] *= 1000
    whole = layer(states)
    for row in (0, 4, 255, 256, 699):
        assert torch.equal(layer(states[row : row + 1])[0], whole[row])


@torch.inference_mode()
def test_zeros_and_no_rows() -> None:
    linear = nn.Linear(16, 8)
    layer = Int8Linear(linear)
    assert torch.equal(layer(torch.zeros(2, 16)), linear.bias.expand(2, 8))
    assert layer(torch.zeros(0, 16)).shape == (0, 8)
    bare = nn.Linear(16, 8, bias=False)
    assert not Int8Linear(bare)(torch.zeros(1, 16)).any()


def test_only_linear_layers_are_replaced() -> None:
    module = nn.Sequential(nn.Embedding(5, 8), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
    kinds = [type(part) for part in quantized(module).modules()]
    expected = [nn.Sequential, nn.Embedding, nn.Sequential, Int8Linear, nn.LayerNorm]
    assert kinds == expected
