"""Captioner and matcher on a MED that has begun to learn the sample world, instead of on noise."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BlipForConditionalGeneration

from stages.base import LocalContext
from stages.models.captioner import Captioner
from stages.models.config import GenerationConfig, MedConfig, TextConfig, VisionConfig
from stages.models.matcher import Matcher
from stages.pretrain import PretrainStage
from stages.scenes.config import SceneConfig, WorldConfig
from stages.scenes.language import captions, near_miss
from stages.scenes.plan import annotated_scenes
from stages.scenes.render import encode, render
from stages.scenes.scene import Scene
from stages.scenes.world import write_tokenizer
from stages.training.config import PretrainConfig
from tests.toy_pairs import sample, write_tar

SCENES = SceneConfig(shapes=6, two_shapes=0.0, shape_size=0.42)
TRAINED, HELD_OUT = 400, 200
THRESHOLDS = (0.35, 0.5)
STEPS = 300


def world() -> list[Scene]:
    return annotated_scenes(WorldConfig(scenes=SCENES, human_images=TRAINED, test_images=HELD_OUT))


def pictures() -> tuple[list[Image.Image], list[list[str]]]:
    """Scenes that training never saw; for each a right text, a near miss and another's text."""
    scenes, rng = world()[:HELD_OUT], random.Random(0)
    texts = []
    for scene, other in zip(scenes, scenes[1:] + scenes[:1], strict=True):
        right = rng.choice(captions(scene))
        texts.append([right, near_miss(scene, right, rng), rng.choice(captions(other))])
    return [render(scene, SCENES, str(i)) for i, scene in enumerate(scenes)], texts


@pytest.fixture(scope="module")
def med(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    write_tokenizer(folder / "tokenizer")
    samples = [
        sample(f"scene/{i}", encode(render(scene, SCENES, f"t{i}"), "png"), captions(scene)[:2])
        for i, scene in enumerate(world()[-TRAINED:])
    ]
    tar = write_tar(folder / "train-000000.tar", samples)
    sizes = {"width": 64, "layers": 2, "heads": 2, "mlp_width": 256, "initializer_std": 0.06}
    vision = VisionConfig(image_size=32, patch_size=8, position_std=0.5, **sizes)
    text = TextConfig(vision_width=64, dropout=0.0, **sizes)
    config = PretrainConfig(
        tokenizer=str(folder / "tokenizer"),
        model=MedConfig(
            vision=vision, text=text, projection_dim=32, queue_size=256, max_text_tokens=16
        ),
        batch_size=32,
        steps=STEPS,
        lr=4e-3,
        warmup_steps=20,
        decay="cosine",
        alpha=0.0,
        augmentation="none",
        data_threads=0,
    )
    PretrainStage(config).run({"train": [tar]}, folder, LocalContext())
    return folder / "med"


def test_int8_keeps_and_drops_what_float32_does(med: Path) -> None:
    images, texts = pictures()
    whole, rounded = (
        np.array(Matcher(med, int8=int8).match(images, texts))[..., 0] for int8 in (False, True)
    )
    assert (whole != rounded).any()
    for threshold in THRESHOLDS:
        kept = whole >= threshold
        assert 0.05 < kept.mean() < 0.5
        agree = (kept == (rounded >= threshold)).mean()
        assert agree >= 0.99, f"at {threshold}: {agree:.2%} of {kept.size} decisions agree"
    # The filter has learned something, so that these are decisions and no noise.
    assert whole[:, 0].mean() > whole[:, 2].mean() + 0.1


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_equal_transformers(med: Path, beams: int) -> None:
    images, _ = pictures()
    captioner = Captioner(med, batch_size=64)
    config = GenerationConfig(method="greedy" if beams == 1 else "beam", num_beams=beams)
    pixels = captioner.preprocessing(images)
    ours = captioner.generate(pixels, [b""] * len(images), config)[:, 0]
    prompt = [*captioner.prompt_ids(config), captioner.tokenizer.sep_token_id]
    theirs = BlipForConditionalGeneration.from_pretrained(med).generate(
        pixels,
        input_ids=torch.tensor(prompt).repeat(len(images), 1),
        num_beams=beams,
        max_length=20,
        min_length=5,
        do_sample=False,
    )
    assert len({tuple(row) for row in ours.tolist()}) > 8
    ended = (ours == captioner.tokenizer.sep_token_id).int()
    assert ended.any(dim=1).all()
    inside = (ended.cumsum(dim=1) - ended) == 0
    theirs = torch.nn.functional.pad(theirs, (0, 20 - theirs.shape[1]))
    assert torch.equal(ours[inside], theirs[inside])
