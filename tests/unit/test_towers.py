"""A fresh MED whose towers compute what transformers' ViT and BERT compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    BertTokenizer,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from stages.errors import CheckpointError
from stages.models.checkpoints import save_med
from stages.models.config import MedConfig, TextConfig, VisionConfig
from stages.models.med import Med
from stages.models.text import encode_texts, fitted_to, load_tokenizer
from stages.models.towers import start_towers, text_start

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red"]
WORDS += ["blue", "dog", "cat", "on", "the", "grass"]
TEXTS = ["a red dog on the grass", "the cat"]
VISION = VisionConfig(image_size=32, patch_size=8, width=48, layers=2, heads=4, mlp_width=96)
TEXT = TextConfig(
    width=32, layers=2, heads=2, mlp_width=64, max_positions=40, vision_width=48, dropout=0.0
)
VIT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
}
BERT = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
}


def words() -> BertTokenizer:
    return BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizer:
    folder = tmp_path_factory.mktemp("words")
    words().save_pretrained(str(folder))
    return load_tokenizer(folder)


def saved(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """``model`` with random weights everywhere, biases and norms included, in ``folder``."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model.eval()


def fresh(tokenizer: BertTokenizer, image_size: int = 32) -> Med:
    torch.manual_seed(1)
    vision = VISION.model_copy(update={"image_size": image_size})
    config = MedConfig(
        vision=vision, text=fitted_to(TEXT, tokenizer), projection_dim=8, queue_size=4
    )
    return Med(config).eval()


@pytest.mark.parametrize("kind", [ViTModel, ViTForImageClassification])
@pytest.mark.parametrize("image_size", [32, 48])
@torch.no_grad()
def test_the_image_encoder_is_vits(
    kind: Callable[..., Any], image_size: int, tokenizer: BertTokenizer, tmp_path: Path
) -> None:
    model = saved(kind(ViTConfig(**VIT)), tmp_path)
    med = fresh(tokenizer, image_size)
    start_towers(med, tokenizer, vision=tmp_path)
    pixels = torch.randn(2, 3, image_size, image_size)
    vit = model if kind is ViTModel else model.vit
    expected = vit(pixels, interpolate_pos_encoding=image_size != 32).last_hidden_state
    torch.testing.assert_close(med.vision_model(pixels), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(med.vision_model_m(pixels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [DeiTModel, DeiTForImageClassificationWithTeacher])
@torch.no_grad()
def test_a_distilled_vit_comes_without_its_distillation_token(
    kind: Callable[..., Any], tokenizer: BertTokenizer, tmp_path: Path
) -> None:
    model = saved(kind(DeiTConfig(**VIT)), tmp_path / "deit")
    positions = (model if kind is DeiTModel else model.deit).embeddings.position_embeddings
    # Without that token DeiT is a ViT; transformers opens these tensors as one.
    weights = load_file(tmp_path / "deit" / "model.safetensors")
    plain = {name.removeprefix("deit."): tensor for name, tensor in weights.items()}
    plain["embeddings.position_embeddings"] = torch.cat([positions[:, :1], positions[:, 2:]], 1)
    ViTConfig(**VIT).save_pretrained(tmp_path / "vit")
    save_file(plain, tmp_path / "vit" / "model.safetensors", metadata={"format": "pt"})
    vit = ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False).eval()
    med = fresh(tokenizer)
    start_towers(med, tokenizer, vision=tmp_path / "deit")
    pixels = torch.randn(2, 3, 32, 32)
    expected = vit(pixels).last_hidden_state
    torch.testing.assert_close(med.vision_model(pixels), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertForPreTraining])
@torch.no_grad()
def test_the_text_stack_is_berts(
    kind: Callable[..., Any], tokenizer: BertTokenizer, tmp_path: Path
) -> None:
    model = saved(kind(BertConfig(**BERT)), tmp_path)
    words().save_pretrained(str(tmp_path))
    med, untouched = fresh(tokenizer), fresh(tokenizer).state_dict()
    start_towers(med, tokenizer, text=tmp_path)
    ids, mask = encode_texts(tokenizer, TEXTS, 30)
    valid = mask.bool()
    bert = model if kind is BertModel else model.bert
    expected = bert(ids, attention_mask=mask).last_hidden_state[valid]
    for stack in (med.text_encoder, med.text_encoder_m, med.text_decoder.bert):
        torch.testing.assert_close(stack(ids, mask)[valid], expected, rtol=1e-5, atol=1e-5)
    if kind is not BertModel:
        given = model(ids, attention_mask=mask)
        scores = given.logits if kind is BertForMaskedLM else given.prediction_logits
        ours = med.text_decoder.cls.predictions(med.text_encoder(ids, mask))
        ours, scores = ours[valid][:, : len(WORDS)], scores[valid]
        torch.testing.assert_close(ours, scores, rtol=1e-5, atol=1e-5)
    # What BERT has not stays as it was drawn.
    state = med.state_dict()
    for name in ("itm_head.weight", "text_encoder.encoder.layer.0.crossattention.self.key.weight"):
        assert torch.equal(state[name], untouched[name])
    name = "text_encoder.embeddings.word_embeddings.weight"
    assert torch.equal(state[name][-2:], untouched[name][-2:]) and state[name][-2:].any()
    head = med.text_decoder.cls.predictions
    assert head.decoder.weight is med.text_encoder.embeddings.word_embeddings.weight
    assert not head.bias[-2:].any()


def test_the_oldest_files_name_their_norms_otherwise(
    tokenizer: BertTokenizer, tmp_path: Path
) -> None:
    """As bert-base-uncased's on the hub."""
    saved(BertForPreTraining(BertConfig(**BERT)), tmp_path)
    today = text_start(tmp_path, fitted_to(TEXT, tokenizer), tokenizer)
    weights = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in weights.items()
    }
    assert old.keys() != weights.keys()
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = text_start(tmp_path, fitted_to(TEXT, tokenizer), tokenizer)
    for one, other in zip(today, found, strict=True):
        assert one.keys() == other.keys() and one
        assert all(torch.equal(one[name], other[name]) for name in one)


def refusal(folder: Path, tokenizer: BertTokenizer, tower: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        start_towers(fresh(tokenizer), tokenizer, **{tower: folder})
    said = str(caught.value)
    assert said.startswith(f"{folder}: ") and "\n" not in said
    return said


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"hidden_size": 64}, ["width 64, model.vision.width is 48"]),
        ({"num_hidden_layers": 1}, ["layers 1, model.vision.layers is 2"]),
        (
            {"num_attention_heads": 6, "patch_size": 16},
            ["patch_size 16", "heads 6, model.vision.heads is 4"],
        ),
        ({"intermediate_size": 32}, ["mlp_width 32"]),
        ({"hidden_act": "relu"}, ["hidden_act 'relu', only 'gelu'"]),
        ({"qkv_bias": False}, ["no tensor encoder.layer.0.attention.attention.query.bias"]),
        ({"num_channels": 1}, ["misshapen tensor embeddings.patch_embedding.weight (48, 1, 8, 8)"]),
        ({"image_size": (32, 24)}, ["of no square grid"]),
    ],
)
def test_a_vit_that_does_not_fit(
    change: dict[str, Any], parts: list[str], tokenizer: BertTokenizer, tmp_path: Path
) -> None:
    saved(ViTModel(ViTConfig(**(VIT | change))), tmp_path)
    said = refusal(tmp_path, tokenizer, "vision")
    assert all(part in said for part in parts), said


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"hidden_size": 64}, "width 64, model.text.width is 32"),
        ({"num_attention_heads": 4}, "heads 4, model.text.heads is 2"),
        ({"max_position_embeddings": 30}, "max_positions 30"),
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new'"),
        ({"vocab_size": len(WORDS) + 3}, "other words (16) than the tokenizer has (15"),
        ({"vocab_size": 5}, "set tokenizer to this model's own"),
    ],
)
def test_a_bert_that_does_not_fit(
    change: dict[str, Any], part: str, tokenizer: BertTokenizer, tmp_path: Path
) -> None:
    saved(BertModel(BertConfig(**(BERT | change))), tmp_path)
    assert part in refusal(tmp_path, tokenizer, "text")


def test_a_bert_of_as_many_but_other_words(tokenizer: BertTokenizer, tmp_path: Path) -> None:
    saved(BertModel(BertConfig(**BERT)), tmp_path)
    others = {word: number for number, word in enumerate([*WORDS[:5], *WORDS[:4:-1]])}
    BertTokenizer(vocab=others).save_pretrained(str(tmp_path))
    assert "set tokenizer to this model's own" in refusal(tmp_path, tokenizer, "text")


def test_other_models(tokenizer: BertTokenizer, tmp_path: Path) -> None:
    save_med(fresh(tokenizer), tokenizer, tmp_path / "med", momentum=False)
    said = refusal(tmp_path / "med", tokenizer, "vision")
    assert "found model_type 'blip', need an image transformer (model_type 'vit' or 'deit')" in said
    assert "need a BERT (model_type 'bert')" in refusal(tmp_path / "med", tokenizer, "text")
    assert "no such folder" in refusal(tmp_path / "nowhere", tokenizer, "text")
    BertConfig(**BERT).save_pretrained(tmp_path / "empty")
    assert "no model.safetensors" in refusal(tmp_path / "empty", tokenizer, "text")


def test_tensors_that_are_missing(tokenizer: BertTokenizer, tmp_path: Path) -> None:
    saved(BertForMaskedLM(BertConfig(**BERT)), tmp_path / "bert")
    file = tmp_path / "bert" / "model.safetensors"
    whole = load_file(file)
    for name in (
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.1.output.dense.bias",
        "bert.embeddings.token_type_embeddings.weight",
        "cls.predictions.transform.dense.bias",
    ):
        rest = {other: tensor for other, tensor in whole.items() if other != name}
        save_file(rest, file, metadata={"format": "pt"})
        said = refusal(tmp_path / "bert", tokenizer, "text")
        assert f"no tensor {name.removeprefix('bert.')}" in said
