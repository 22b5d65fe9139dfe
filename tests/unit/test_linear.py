"""Linear layers for inference: packed, and in 8-bit integers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stages.models.captioner import Captioner
from stages.models.linear import (
    Int8Linear,
    PackedLinear,
    can_pack,
    gelu_of,
    multiplies_int8,
    with_linears,
)
from tests import tiny_models
from tests.unit.test_captioner import random_images


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
@pytest.mark.parametrize("inputs", [40, 1024, 3072])
def test_a_cpu_without_products_of_integers_gives_the_same(
    inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    linear, levels = nn.Linear(inputs, 24), torch.randint(-127, 128, (30, inputs)).float()
    linear.weight.data = torch.randint(-127, 128, (24, inputs)).float()
    linear.weight.data[:, 0] = 127
    # Sums as large as they can become, and odd ones, which float32 has not from 2^24 on.
    levels[0], linear.weight.data[0] = 127.0, 127.0
    levels[0, 1] = 126.0
    exact = levels.double() @ linear.weight.double().T
    for capable in {multiplies_int8(), False}:
        monkeypatch.setattr("stages.models.linear.multiplies_int8", lambda known=capable: known)
        found = Int8Linear(linear).products(levels)
        assert found.dtype == torch.float32
        assert torch.equal(found[:, 1:].double(), exact[:, 1:])
        # Shifted by the zero of 128, such sums are below 2^27, so rounded to 4 at most.
        assert (found[:, 0] - exact[:, 0]).abs().max() <= 4


@torch.inference_mode()
def test_int8_layers_end_in_gelu_and_in_the_numbers_that_are_asked_for() -> None:
    torch.manual_seed(0)
    layer, states = Int8Linear(nn.Linear(40, 24)), torch.randn(2, 300, 40)
    torch.testing.assert_close(gelu_of(layer, states), F.gelu(layer(states)))
    whole = layer(states)
    layer.dtype = torch.bfloat16
    assert torch.equal(layer(states), whole.bfloat16())
    assert torch.equal(layer(states.bfloat16()), layer(states.bfloat16().float()))


@pytest.mark.parametrize("capable", [True, False])
def test_attention_over_images_is_in_bfloat16_where_that_is_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capable: bool
) -> None:
    monkeypatch.setattr("stages.models.linear.multiplies_bfloat16", lambda: capable)
    folder = tiny_models.save_blip(tiny_models.captioner_model(), tmp_path / "captioner")
    captioner = Captioner(folder, int8=True, batch_size=8)
    rounded = {
        re.sub(r".*layers?\.\d+\.", "", name)
        for stack in (captioner.vision, captioner.decoder)
        for name, layer in stack.named_modules()
        if isinstance(layer, Int8Linear) and layer.dtype == torch.bfloat16
    }
    over = {f"crossattention.self.{part}" for part in ("query", "key", "value")}
    assert rounded == ({"self_attn.qkv", *over} if capable else set())
    pixels = captioner.preprocessing(random_images(8))
    with torch.inference_mode():
        exact = Captioner(folder).vision(pixels)
        found = captioner.vision(pixels)
    assert found.dtype == torch.float32
    assert (found - exact).norm() < 0.03 * exact.norm()
    assert all(text for (text,) in captioner(random_images(8)))


_ON_AN_OLDER_CPU = """
import torch
from torch import nn
from stages.models.linear import Int8Linear
torch.manual_seed(0)
levels, linear = torch.randint(-127, 128, (300, 768)).float(), nn.Linear(768, 64)
linear.weight.data = torch.randint(-127, 128, (64, 768)).float()
linear.weight.data[:, 0] = 127
with torch.inference_mode():
    found = Int8Linear(linear).products(levels)
assert torch.equal(found.double(), levels.double() @ linear.weight.double().T)
"""


@pytest.mark.skipif(not multiplies_int8(), reason="this CPU has no VNNI")
@pytest.mark.parametrize("isa", ["AVX512_CORE_VNNI", "AVX512_CORE_BF16"])
def test_no_cpu_with_vnni_falls_back_to_slow_products(isa: str) -> None:
    """oneDNN's reference code takes a thousand times as long."""
    known = {"ONEDNN_MAX_CPU_ISA": isa, "ONEDNN_VERBOSE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _ON_AN_OLDER_CPU],
        env=os.environ | known,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    products = [line for line in done.stdout.splitlines() if ",exec,cpu," in line and "s8" in line]
    multiplied = [line for line in products if ",reorder," not in line]
    assert multiplied and not [line for line in multiplied if "ref" in line.split(",")[6]], (
        multiplied
    )


def test_a_cpu_that_could_overflow_multiplies_in_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX-512 without VNNI adds up pairs of products in 16 bits."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    assert not multiplies_int8()
    parts = list(Int8Linear(nn.Linear(8, 8)).products.children())
    assert parts, "no float layers"


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
    replaced = with_linears(module, Int8Linear)
    assert [type(part) for part in replaced] == [nn.Embedding, nn.Sequential]
    assert [type(part) for part in replaced[1]] == [Int8Linear, nn.LayerNorm]


needs_onednn = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.float32), reason="torch is built without oneDNN"
)


@needs_onednn
@torch.inference_mode()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (8,), (3, 77), (0,)])
def test_packed_weights_give_the_same_products(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    linear, states = nn.Linear(40, 24, bias=bias), torch.randn(*shape, 40)
    packed = PackedLinear(linear)
    torch.testing.assert_close(packed(states), linear(states), atol=1e-6, rtol=1e-5)
    # Exact GELU, not the one with a hyperbolic tangent, which is off by up to 5e-4.
    expected = F.gelu(linear(states))
    torch.testing.assert_close(gelu_of(packed, states), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(gelu_of(linear, states), expected)


@needs_onednn
@torch.inference_mode()
def test_packed_layers_take_views() -> None:
    torch.manual_seed(0)
    linear, states = nn.Linear(16, 8), torch.randn(5, 16, 7).transpose(1, 2)
    torch.testing.assert_close(PackedLinear(linear)(states), linear(states))
    states = torch.randn(5, 3, 16)[:, -1]
    torch.testing.assert_close(PackedLinear(linear)(states), linear(states))


def test_only_float32_on_a_cpu_is_packed() -> None:
    assert not can_pack(torch.device("cpu"), torch.bfloat16)
    assert not can_pack(torch.device("cuda"), torch.float32)
