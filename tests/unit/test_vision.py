"""The vision transformer against transformers' eager one, same weights, in double precision."""

import pytest
import torch
from pydantic import ValidationError
from transformers import BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel

from stages.models.config import VisionConfig
from stages.models.vision import VisionTransformer

CONFIG = VisionConfig(image_size=32, patch_size=8, width=48, layers=2, heads=4, mlp_width=96)


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_equals_transformers(eps: float) -> None:
    torch.manual_seed(0)
    theirs = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            layer_norm_eps=eps,
        )
    ).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    ours = VisionTransformer(CONFIG.model_copy(update={"eps": eps})).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    # Small contrasts, so that the eps of the LayerNorm shows.
    pixels = 0.01 * torch.randn(3, 3, 32, 32, dtype=torch.float64)
    expected = theirs(pixels).last_hidden_state
    assert (ours(pixels) - expected).abs().max() < 1e-10
    assert (ours(pixels, first_only=True) - expected[:, :1]).abs().max() < 1e-10


def test_gradients_equal_those_of_the_whole_when_only_the_first_is_read() -> None:
    ours = VisionTransformer(CONFIG).double()
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    names, weights = zip(*ours.named_parameters(), strict=True)
    whole = torch.autograd.grad(ours(pixels)[:, 0].square().sum(), weights)
    first = torch.autograd.grad(ours(pixels, first_only=True).square().sum(), weights)
    for name, expected, found in zip(names, whole, first, strict=True):
        assert (expected - found).abs().max() < 1e-10, name


def test_weights_start_large_enough_to_learn() -> None:
    # transformers' BlipVisionConfig starts at 1e-10, and a model that starts there does not learn.
    vision = VisionTransformer(CONFIG)
    for weight in (
        vision.embeddings.patch_embedding.weight,
        vision.embeddings.position_embedding,
        vision.encoder.layers[0].self_attn.qkv.weight,
    ):
        assert 0.015 < weight.std().item() < 0.025


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match="width 50 is not a multiple of heads 12"):
        VisionConfig(width=50)
    with pytest.raises(ValidationError, match="image_size 30 is not a multiple of patch_size 8"):
        VisionConfig(image_size=30, patch_size=8)


DROPPING = CONFIG.model_copy(update={"layers": 3, "drop_path": 0.5})


def test_stochastic_depth_grows_from_layer_to_layer() -> None:
    """torch.linspace(0, rate, depth) in models/vit.py of the original."""
    large = CONFIG.model_copy(update={"layers": 24, "drop_path": 0.1})
    rates = [layer.drop_path for layer in VisionTransformer(large).layers]
    assert rates == pytest.approx(torch.linspace(0, 0.1, 24).tolist())
    assert [layer.drop_path for layer in VisionTransformer(CONFIG).layers] == [0.0, 0.0]
    alone = CONFIG.model_copy(update={"layers": 1, "drop_path": 0.1})
    assert [layer.drop_path for layer in VisionTransformer(alone).layers] == [0.0]


def test_a_sample_skips_a_half_of_a_layer_or_has_more_of_it() -> None:
    layer = VisionTransformer(DROPPING).double().layers[-1].train()
    states = torch.randn(64, 5, 48, dtype=torch.float64)
    torch.manual_seed(0)
    found = layer(states)
    torch.manual_seed(0)
    kept = [torch.nn.functional.dropout(torch.ones(64, 1, 1).double(), 0.5) for _ in range(2)]
    half = states + kept[0] * layer.self_attn(layer.layer_norm1(states), False)
    torch.testing.assert_close(found, half + kept[1] * layer.mlp(layer.layer_norm2(half)))
    as_it_was = (found == states).all(dim=(1, 2))
    assert 4 <= as_it_was.sum() <= 32, "a quarter of the samples skip both halves"


def test_stochastic_depth_follows_from_the_seed_and_ends_with_training() -> None:
    torch.manual_seed(0)
    ours, plain = VisionTransformer(DROPPING), VisionTransformer(DROPPING)
    ours.load_state_dict(plain.state_dict())
    for layer in plain.layers:
        layer.drop_path = 0.0
    pixels = torch.randn(6, 3, 32, 32)

    def run(seed: int, first_only: bool = False) -> torch.Tensor:
        torch.manual_seed(seed)
        made: torch.Tensor = ours.train()(pixels, first_only=first_only)
        return made

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    torch.testing.assert_close(run(1)[:, :1], run(1, first_only=True))
    assert torch.equal(ours.eval()(pixels), plain.train()(pixels))


def test_without_stochastic_depth_no_random_number_is_drawn() -> None:
    ours = VisionTransformer(CONFIG).train()
    before = torch.get_rng_state()
    ours(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), before)
