"""The blocks against transformers' eager BLIP modules, same weights, in double precision."""

from collections.abc import Iterator

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import BlipTextConfig
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel

from stages.models.blocks import LMHead, TextStack, take_rows
from stages.models.config import TextConfig

TOLERANCE = 1e-10
TEXT = TextConfig(
    vocab_size=50,
    width=32,
    layers=3,
    heads=4,
    mlp_width=64,
    max_positions=64,
    vision_width=48,
    dropout=0.0,
)


@pytest.fixture(scope="module", autouse=True)
def double_precision() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Case:
    """transformers' module, ours with its weights, two images' tokens and three texts for each."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.their_text = BlipTextLMHeadModel(
            BlipTextConfig(
                vocab_size=50,
                hidden_size=32,
                encoder_hidden_size=48,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=64,
                bos_token_id=48,
                sep_token_id=3,
            )
        ).eval()
        for parameter in self.their_text.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.stack = TextStack(TEXT).eval()
        self.stack.load_state_dict(self.their_text.bert.state_dict(), strict=True)
        self.stack.absorb()
        self.head = LMHead(TEXT, self.stack.embeddings.word_embeddings).eval()
        # Files leave the tied matrix out; both names of the bias are there or one of them.
        head = self.their_text.cls.predictions.state_dict()
        self.head.load_state_dict(
            {name: value for name, value in head.items() if name != "decoder.weight"}, strict=True
        )
        self.ids = torch.randint(1, 50, (6, 7))
        self.mask = torch.ones(6, 7, dtype=torch.int64)
        self.mask[1, 4:] = 0
        self.mask[3, 2:] = 0
        self.tokens = torch.randn(2, 17, 48)
        self.repeated = self.tokens.repeat_interleave(3, dim=0)

    def theirs(self, ids: Tensor, mask: Tensor, *, decoder: bool) -> Tensor:
        output = self.their_text.bert(
            ids,
            attention_mask=mask,
            encoder_hidden_states=self.repeated,
            encoder_attention_mask=torch.ones(self.repeated.shape[:2]),
            is_decoder=decoder,
        )
        return output.last_hidden_state


@pytest.fixture(scope="module")
def case() -> Iterator[Case]:
    with torch.no_grad():
        yield Case()


def distance(ours: Tensor, theirs: Tensor, mask: Tensor | None = None) -> float:
    """The largest difference, on tokens only: what stands on padding means nothing."""
    assert ours.shape == theirs.shape
    gap = (ours - theirs).abs()
    return (gap if mask is None else gap * mask[..., None]).max().item()


def test_text_encoder_equals_transformers(case: Case) -> None:
    expected = case.their_text.bert(case.ids, attention_mask=case.mask).last_hidden_state
    assert distance(case.stack(case.ids, case.mask), expected, case.mask) < TOLERANCE
    first = case.stack(case.ids, case.mask, first_only=True)
    assert distance(first, expected[:, :1]) < TOLERANCE


@pytest.mark.parametrize("causal", [False, True])
def test_grounded_stack_equals_transformers(case: Case, causal: bool) -> None:
    expected = case.theirs(case.ids, case.mask, decoder=causal)
    images = case.tokens, case.repeated
    for image_kv in (*map(case.stack.cross_kv, images), *images):
        ours = case.stack(case.ids, case.mask, causal=causal, image_kv=image_kv)
        assert distance(ours, expected, case.mask) < TOLERANCE


def test_causal_needs_no_mask_for_right_padded_texts(case: Case) -> None:
    expected = case.theirs(case.ids, case.mask, decoder=True)
    ours = case.stack(case.ids, causal=True, image_kv=case.stack.cross_kv(case.tokens))
    assert distance(ours, expected, case.mask) < TOLERANCE


def test_the_last_texts_may_use_other_images(case: Case) -> None:
    kv = case.stack.cross_kv(case.tokens)
    guests = take_rows(kv, torch.tensor([1, 0]))
    ids, mask = (torch.cat([part, part[[0, 5]]]) for part in (case.ids, case.mask))
    ours = case.stack(ids, mask, image_kv=kv, guests=guests)
    own = case.stack(case.ids, case.mask, image_kv=kv)
    assert distance(ours[:-2], own, case.mask) < TOLERANCE
    other = case.stack(ids[-2:], mask[-2:], image_kv=guests)
    assert distance(ours[-2:], other, mask[-2:]) < TOLERANCE


def test_rows_pick_texts_for_images(case: Case) -> None:
    rows, images = torch.tensor([0, 5, 1, 1, 3, 2]), torch.tensor([0, 0, 0, 1, 1, 1])
    ids, mask = case.ids[rows], case.mask[rows]
    expected = case.theirs(ids, mask, decoder=False)
    kv = take_rows(case.stack.cross_kv(case.tokens), images)
    ours = case.stack(case.ids, case.mask, image_kv=kv, rows=rows)
    assert distance(ours, expected, mask) < TOLERANCE
    first = case.stack(case.ids, case.mask, image_kv=kv, rows=rows, first_only=True)
    assert distance(first, expected[:, :1]) < TOLERANCE


def test_taken_rows_pass_their_gradients_back(case: Case) -> None:
    with torch.enable_grad():
        key = torch.randn(3, 4, 5, 6, requires_grad=True)
        (taken, _), *_ = take_rows([(key, key)], torch.tensor([2, 0, 2]))
        taken.sum().backward()
    assert torch.equal(taken, key[[2, 0, 2]])
    assert torch.equal(key.grad[:, 0, 0, 0], torch.tensor([1.0, 0.0, 2.0]))


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_decoding_in_steps_equals_one_forward(case: Case, masked: bool, absorbed: bool) -> None:
    expected = case.their_text(
        case.ids,
        attention_mask=case.mask if masked else None,
        encoder_hidden_states=case.repeated,
    ).logits
    kv = case.tokens if absorbed else case.stack.cross_kv(case.tokens)
    cache = case.stack.new_cache(6, 9)
    steps = []
    for start, end in ((0, 3), (3, 5), (5, 6), (6, 7)):
        mask = case.mask[:, :end] if masked else None
        ids = case.ids[:, start:end]
        steps.append(case.stack(ids, mask, causal=True, image_kv=kv, cache=cache))
    logits = case.head(torch.cat(steps, dim=1))
    assert distance(logits, expected, case.mask if masked else None) < TOLERANCE
    assert cache.length == 7
    assert not any(kept[:, :, 7:].any() for pair in cache.layers for kept in pair)


def test_head_is_tied_and_accepts_either_bias(case: Case) -> None:
    embedding = case.stack.embeddings.word_embeddings
    assert case.head.decoder.weight is embedding.weight
    assert case.head.decoder.bias is case.head.bias
    for only in ("bias", "decoder.bias"):
        head = LMHead(TEXT, embedding)
        state = case.head.state_dict()
        kept = {n: v for n, v in state.items() if "bias" not in n or "transform" in n or n == only}
        head.load_state_dict(kept, strict=True)
        assert torch.equal(head.bias, case.head.bias)


def test_dropout_acts_in_training_only(case: Case) -> None:
    stack = TextStack(TEXT.model_copy(update={"dropout": 0.5}))
    kv = stack.cross_kv(case.tokens)
    assert not torch.equal(stack(case.ids, image_kv=kv), stack(case.ids, image_kv=kv))
    stack.eval()
    assert torch.equal(stack(case.ids, image_kv=kv), stack(case.ids, image_kv=kv))


def test_weights_start_as_berts() -> None:
    stack = TextStack(TEXT)
    assert 0.015 < stack.encoder.layer[0].crossattention.self.key.weight.std().item() < 0.025
    assert not stack.encoder.layer[0].intermediate.dense.bias.any()
    assert not stack.embeddings.word_embeddings.weight[TEXT.pad_token_id].any()


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match="width 768 is not a multiple of heads 5"):
        TextConfig(heads=5)
