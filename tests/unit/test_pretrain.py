"""Pretraining as a stage: its folder, its log, and going on where it was killed."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertModel,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    ViTConfig,
    ViTModel,
)

from stages.base import LocalContext
from stages.errors import CheckpointError, SourceError
from stages.models.text import load_tokenizer
from stages.pretrain import PretrainStage
from stages.schemas import TRAINING_LOG
from stages.training.config import PretrainConfig
from tests.toy_pairs import DyingContext, Killed, toy_med, toy_tar, toy_tokenizer, write_tar


def stage(tmp_path: Path, **changes: Any) -> PretrainStage:
    settings: dict[str, Any] = {
        "tokenizer": str(tmp_path / "tokenizer"),
        "model": toy_med(dropout=0.1),
        "batch_size": 6,
        "steps": 20,
        "lr": 1e-3,
        "warmup_steps": 2,
        "decay": "cosine",
        "augmentation": "none",
        "log_every": 3,
        "checkpoint_every_steps": 4,
    }
    return PretrainStage(PretrainConfig(**(settings | changes)))


def tars(tmp_path: Path) -> list[Path]:
    toy_tokenizer(tmp_path / "tokenizer")
    return [
        toy_tar(tmp_path / "human-000000.tar", images=5, source="human"),
        toy_tar(tmp_path / "web-000000.tar", images=20),
    ]


def run(stage: PretrainStage, out: Path, inputs: dict[str, list[Path]], ctx: Any = None) -> Path:
    out.mkdir()
    stage.run(inputs, out, ctx or LocalContext())
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    files = ("model.safetensors", "momentum.safetensors")
    return {k: v for file in files for k, v in load_file(out / "med" / file).items()}


def same(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_folder_that_transformers_opens_and_a_log(tmp_path: Path) -> None:
    out = run(stage(tmp_path), tmp_path / "out", {"train": tars(tmp_path)})
    assert BlipForConditionalGeneration.from_pretrained(out / "med").config.vision_config.image_size
    assert BlipForImageTextRetrieval.from_pretrained(out / "med").itm_head.out_features == 2
    log = pq.read_table(out / "log.parquet")
    assert log.schema.equals(TRAINING_LOG)
    assert log["step"].to_pylist() == [3, 6, 9, 12, 15, 18, 20]
    assert set(log["stage"].to_pylist()) == {"pretrain"}
    for row in log.to_pylist():
        parts = row["loss_itc"] + row["loss_itm"] + row["loss_lm"]
        assert row["loss"] == pytest.approx(parts, rel=1e-4)
    facts = json.loads((out / "data.json").read_text())
    assert facts == {"pairs": 25, "images": 25, "skipped": {}}
    assert len(list((out / "tensorboard").iterdir())) == 1


def test_the_result_hangs_on_config_and_data_alone(tmp_path: Path) -> None:
    inputs = {"train": tars(tmp_path)}
    first = run(stage(tmp_path), tmp_path / "a", inputs)
    torch.manual_seed(99)
    torch.rand(5)
    operational = {"data_threads": 0, "cache_mb": 0, "checkpoint_every_steps": 7, "log_every": 4}
    assert same(first, run(stage(tmp_path, **operational), tmp_path / "b", inputs))
    assert not same(first, run(stage(tmp_path, seed=1), tmp_path / "c", inputs))
    assert not same(first, run(stage(tmp_path, human_repeat=2), tmp_path / "d", inputs))


@pytest.mark.parametrize("at", [3, 8, 13, 20])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, at: int) -> None:
    inputs = {"train": tars(tmp_path)}
    # One image is broken, so that a run that forgot it would differ.
    broken = {"b.png": b"no image", "b.json": b'{"sample_id": "b", "texts": [{"text": "red"}]}'}
    inputs["train"].append(write_tar(tmp_path / "web-000001.tar", [broken]))
    every = {"log_every": 1}
    whole = run(stage(tmp_path, **every), tmp_path / "whole", inputs)
    checkpoints = tmp_path / "checkpoints"
    with pytest.raises(Killed):
        run(stage(tmp_path, **every), tmp_path / "cut", inputs, DyingContext(checkpoints, at))
    resumed = LocalContext(checkpoints)
    saved = resumed.resume_from()
    assert (saved is None) == (at < 5)
    again = run(stage(tmp_path, **every), tmp_path / "again", inputs, resumed)
    assert same(whole, again)
    logs = [pq.read_table(out / "log.parquet") for out in (whole, again)]
    one, other = (log.drop_columns(["images_per_second"]) for log in logs)
    assert one.equals(other)
    for out in (whole, again):
        assert json.loads((out / "data.json").read_text())["skipped"] == {"image": 1}


def test_it_goes_on_from_another_med(tmp_path: Path) -> None:
    inputs = {"train": tars(tmp_path)}
    first = run(stage(tmp_path), tmp_path / "first", inputs)
    gone_on = {**inputs, "init": [first / "med"]}
    second = run(stage(tmp_path, steps=1, lr=1e-9), tmp_path / "second", gone_on)
    one, other = weights(first), weights(second)
    for name in ("text_encoder.embeddings.word_embeddings.weight", "itm_head.weight"):
        assert torch.allclose(one[name], other[name], atol=1e-6)
    named = stage(tmp_path, steps=1, lr=1e-9, init=str(first / "med"))
    assert same(second, run(named, tmp_path / "third", inputs))


def test_it_starts_from_a_vit_and_a_bert(tmp_path: Path) -> None:
    inputs = {"train": tars(tmp_path)}
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = ViTModel(ViTConfig(image_size=32, patch_size=8, intermediate_size=64, **sizes))
    vit.save_pretrained(tmp_path / "vit")
    words = len(load_tokenizer(tmp_path / "tokenizer"))
    bert = BertModel(
        BertConfig(vocab_size=words, max_position_embeddings=40, intermediate_size=64, **sizes)
    )
    bert.save_pretrained(tmp_path / "bert")
    started = {"init_vision": str(tmp_path / "vit"), "init_text": str(tmp_path / "bert")}
    first = run(stage(tmp_path, steps=1, lr=1e-9, **started), tmp_path / "first", inputs)
    found = weights(first)
    for name, expected in (
        ("vision_model.encoder.layers.0.mlp.fc1.weight", vit.layers[0].mlp.fc1.weight),
        ("vision_model_m.post_layernorm.weight", vit.layernorm.weight),
        ("text_decoder.bert.embeddings.word_embeddings.weight", bert.get_input_embeddings().weight),
    ):
        assert torch.allclose(found[name], expected, atol=1e-6)
    brought = {name: [Path(folder)] for name, folder in started.items()}
    again = run(stage(tmp_path, steps=1, lr=1e-9), tmp_path / "again", {**inputs, **brought})
    assert same(first, again)


def test_one_start_only() -> None:
    with pytest.raises(ValidationError, match="init is a whole MED; give it alone"):
        PretrainConfig(tokenizer="t", init="med", init_text="bert")


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    inputs = {"train": tars(tmp_path)}
    with pytest.raises(CheckpointError):
        run(stage(tmp_path, tokenizer=str(tmp_path / "nowhere")), tmp_path / "a", inputs)
    with pytest.raises(CheckpointError):
        run(stage(tmp_path, init=str(tmp_path / "tokenizer")), tmp_path / "b", inputs)
    with pytest.raises(SourceError, match="no image with a text"):
        run(stage(tmp_path), tmp_path / "c", {"train": []})
