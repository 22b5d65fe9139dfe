"""Fine-tuning as stages: what changes, what does not, and near misses."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

from stages.base import LocalContext
from stages.errors import CheckpointError
from stages.finetune import (
    CaptionerFinetune,
    CaptionerLosses,
    FilterFinetune,
    FilterLosses,
    train_only,
)
from stages.models.captioner import Captioner
from stages.models.checkpoints import load_med
from stages.models.config import GenerationConfig
from stages.models.matcher import Matcher
from stages.models.med import Med
from stages.models.text import load_tokenizer
from stages.pretrain import PretrainStage
from stages.training.config import CaptionerFinetuneConfig, FilterFinetuneConfig, PretrainConfig
from stages.training.data import Batch, Images, Loader, Pairs
from stages.training.loop import Losses
from stages.training.swaps import WordSwaps
from tests.toy_pairs import COLOURS, SIZE, DyingContext, Killed, toy_med, toy_tar, toy_tokenizer

COMMON: dict[str, Any] = {
    "batch_size": 12,
    "augmentation": "none",
    "image_size": SIZE,
    "dropout": 0.0,
    "steps": 60,
    "lr": 3e-3,
    "decay": "cosine",
    "log_every": 20,
    "data_threads": 0,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A briefly pretrained MED and human pairs."""
    folder = tmp_path_factory.mktemp("world")
    toy_tokenizer(folder / "tokenizer")
    tar = toy_tar(folder / "human-000000.tar", images=24, source="human")
    config = PretrainConfig(
        tokenizer=str(folder / "tokenizer"),
        model=toy_med(),
        batch_size=12,
        steps=150,
        lr=3e-3,
        warmup_steps=10,
        decay="cosine",
        augmentation="none",
        data_threads=0,
    )
    PretrainStage(config).run({"train": [tar]}, folder, LocalContext())
    return folder


def inputs(world: Path) -> dict[str, list[Path]]:
    return {"med": [world / "med"], "train": [world / "human-000000.tar"]}


def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (SIZE, SIZE), colour) for colour in COLOURS.values()]


def test_the_captioner_learns_to_say_what_it_sees(world: Path, tmp_path: Path) -> None:
    CaptionerFinetune(CaptionerFinetuneConfig(**COMMON)).run(
        inputs(world), tmp_path, LocalContext()
    )
    BlipForConditionalGeneration.from_pretrained(tmp_path / "captioner")
    beam = GenerationConfig(method="beam", min_tokens=5, max_tokens=12)
    texts = [found[0] for found in Captioner(tmp_path / "captioner")(pictures(), config=beam)]
    assert texts == [f"a {colour} square" for colour in COLOURS]
    log = pq.read_table(tmp_path / "log.parquet")
    assert log["loss_lm"].null_count == 0
    assert log["loss_itc"].null_count == log["loss_itm"].null_count == len(log)


def test_the_filter_learns_to_match(world: Path, tmp_path: Path) -> None:
    config = FilterFinetuneConfig(**COMMON, queue_size=24, text_negatives=2)
    FilterFinetune(config).run(inputs(world), tmp_path, LocalContext())
    BlipForImageTextRetrieval.from_pretrained(tmp_path / "filter")
    texts = [f"a {colour} square" for colour in COLOURS]
    found = Matcher(tmp_path / "filter")(pictures(), [texts] * len(texts))
    scores = np.array([[match for match, _ in row] for row in found])
    assert (scores.argmax(axis=1) == np.arange(len(texts))).all()
    assert np.diag(scores).mean() > 10 * scores[~np.eye(6, dtype=bool)].mean()
    log = pq.read_table(tmp_path / "log.parquet")
    assert log["loss_lm"].null_count == len(log)


def med_and_batch(world: Path, prompt: str = "") -> tuple[Med, Batch, Pairs]:
    tokenizer = load_tokenizer(world / "med")
    tar = [world / "human-000000.tar"]
    pairs = Pairs(tar, tokenizer, max_tokens=20, max_words=30, prompt=prompt)
    images = Images(pairs.shards, SIZE, "none", 1 << 20)
    batch = Loader(pairs, images, batch_size=8, seed=0).batch(0)
    config = FilterFinetuneConfig(**COMMON, queue_size=24)
    return load_med(world / "med", config.med_config()), batch, pairs


def test_the_prompt_carries_no_loss(world: Path) -> None:
    med, batch, _ = med_and_batch(world, "a picture of ")
    prompted = CaptionerLosses(med, prompt_length=4)(batch, 0.0, None)
    assert prompted.itc == prompted.itm == 0
    ids = batch.input_ids.clone()
    states = med.text_decoder.bert(
        torch.cat([torch.full_like(ids[:, :1], med.config.text.dec_token_id), ids[:, 1:]], 1),
        causal=True,
        image_kv=med.text_encoder.cross_kv(med.vision_model(batch.pixel_values())),
    )
    logits = med.text_decoder.cls.predictions(states[:, :-1])
    targets = ids[:, 1:].masked_fill(ids[:, 1:] == med.config.text.pad_token_id, -100)
    targets[:, :3] = -100  # "a picture of" behind [DEC]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), label_smoothing=0.1
    )
    assert torch.allclose(prompted.lm, expected, atol=1e-5)


def test_near_misses_join_the_mean_of_itm(world: Path) -> None:
    med, batch, pairs = med_and_batch(world)
    captions = [ids.astype(np.int64) for ids in pairs.tokens]
    swaps = WordSwaps(captions, pairs.image_of.tolist(), frozenset((0, 1, 2, 3, 4)))

    def itm(swaps: WordSwaps | None, count: int) -> tuple[float, FilterLosses]:
        torch.manual_seed(0)
        fresh, _, _ = med_and_batch(world)
        losses = FilterLosses(fresh.eval(), swaps, count, seed=0, rank=0)
        torch.manual_seed(0)
        return losses(batch, 0.0, None).itm.item(), losses

    plain, _ = itm(None, 0)
    with_misses, losses = itm(swaps, 2)
    drawn = losses._drawn(batch.input_ids, batch.step, 0, swaps)
    assert len(drawn) == 16
    assert all((text != batch.input_ids[row].numpy()).sum() == 1 for row, text in drawn)
    kv = med.eval().text_encoder.cross_kv(med.vision_model(batch.pixel_values()))
    wrong = losses._rejected(batch, kv, drawn).mean().item()
    assert with_misses == pytest.approx((plain * 24 + wrong * 16) / 40, rel=1e-5)


@pytest.mark.parametrize("target", ["captioner", "filter"])
def test_exactly_the_parts_with_a_loss_are_trained(world: Path, target: str) -> None:
    med, batch, _ = med_and_batch(world)
    stage = CaptionerFinetune if target == "captioner" else FilterFinetune
    train_only(med, stage.parts)
    losses: Losses = (
        CaptionerLosses(med, 4) if target == "captioner" else FilterLosses(med, None, 0, 0, 0)
    )
    losses(batch, 0.4, None).total.backward()
    trained = {name for name, p in med.named_parameters() if p.requires_grad}
    # Several workers wait for a gradient of every parameter that asks for one.
    assert {name for name, p in med.named_parameters() if p.grad is not None} == trained
    decoder_only = "text_decoder.bert.encoder.layer.0.attention.self.query.weight"
    assert (decoder_only in trained) == (target == "captioner")
    assert ("itm_head.weight" in trained) == ("temp" in trained) == (target == "filter")
    assert "vision_model.post_layernorm.weight" in trained


@pytest.mark.parametrize("target", ["captioner", "filter"])
def test_a_killed_run_goes_on_bit_for_bit(world: Path, tmp_path: Path, target: str) -> None:
    settings = {**COMMON, "steps": 12, "dropout": 0.1, "log_every": 1, "checkpoint_every_steps": 5}
    stage: CaptionerFinetune | FilterFinetune
    if target == "captioner":
        stage = CaptionerFinetune(CaptionerFinetuneConfig(**settings))
    else:
        stage = FilterFinetune(FilterFinetuneConfig(**settings, queue_size=24, text_negatives=1))
    whole, cut, again = (tmp_path / name for name in ("whole", "cut", "again"))
    for folder in (whole, cut, again):
        folder.mkdir()
    stage.run(inputs(world), whole, LocalContext())
    with pytest.raises(Killed):
        stage.run(inputs(world), cut, DyingContext(tmp_path / "checkpoints", 8))
    stage.run(inputs(world), again, LocalContext(tmp_path / "checkpoints"))
    one, other = (load_file(f / target / "model.safetensors") for f in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_image_size_is_taken(world: Path, tmp_path: Path) -> None:
    settings = {**COMMON, "steps": 1, "image_size": 2 * SIZE}
    CaptionerFinetune(CaptionerFinetuneConfig(**settings)).run(
        inputs(world), tmp_path, LocalContext()
    )
    config = BlipForConditionalGeneration.from_pretrained(tmp_path / "captioner").config
    assert config.vision_config.image_size == 2 * SIZE


def test_a_folder_that_is_no_med_is_named(world: Path, tmp_path: Path) -> None:
    stage = CaptionerFinetune(CaptionerFinetuneConfig(**COMMON))
    with pytest.raises(CheckpointError):
        stage.run({**inputs(world), "med": [world / "tokenizer"]}, tmp_path, LocalContext())


def test_the_defaults_are_the_papers() -> None:
    captioner, matcher = CaptionerFinetuneConfig(), FilterFinetuneConfig()
    assert (captioner.lr, captioner.epochs, captioner.batch_size) == (1e-5, 5, 256)
    assert (matcher.lr, matcher.epochs, matcher.queue_size) == (1e-5, 6, 57_600)
    assert captioner.image_size == matcher.image_size == 384
    assert captioner.prompt == "a picture of " and matcher.alpha == 0.4
    assert matcher.text_negatives == 0
