"""Decoding over buffers that serve one batch after the other, without the capture of graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.models.captioner import Captioner
from stages.models.config import GenerationConfig
from stages.models.decoding import compacted
from tests import tiny_models
from tests.unit.test_captioner import random_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_models.captioner_model()
    with torch.no_grad():  # captions end at different lengths
        model.text_decoder.cls.predictions.bias[tiny_models.tokenizer().sep_token_id] += 3.0
    return tiny_models.save_blip(model, tmp_path_factory.mktemp("models") / "captioner")


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(),
        GenerationConfig(captions_per_image=3),
        GenerationConfig(method="beam", num_beams=3, captions_per_image=2),
        GenerationConfig(method="greedy", max_tokens=30),
    ],
)
def test_buffers_that_are_used_again_give_the_same_captions(
    folder: Path, config: GenerationConfig
) -> None:
    images = random_images(27, seed=7)
    expected = Captioner(folder, batch_size=10)(images, config=config)
    captioner = Captioner(folder, batch_size=10)
    captioner.graphed = True
    assert captioner(images, config=config) == expected  # batches of 10, 10 and 7
    assert captioner(images[::-1], config=config) == expected[::-1]


def test_steps_are_captured_once_for_each_size_and_length(folder: Path) -> None:
    captioner = Captioner(folder, batch_size=10)
    captioner.graphed = True
    images = random_images(10, seed=7)
    captioner(images)
    graphs = captioner._graphs
    assert graphs is not None
    steps = dict(graphs._steps)
    assert {images for images, _ in steps} <= {10, 5, 3, 2, 1}
    assert len({images for images, _ in steps}) > 2
    assert {length for _, length in steps} == set(range(4, max(n for _, n in steps) + 1))
    captioner(images)
    assert captioner._graphs is graphs and graphs._steps == steps
    captioner(images, config=GenerationConfig(captions_per_image=2))
    assert captioner._graphs is not graphs  # of another shape


def test_compaction_moves_only_what_must() -> None:
    going = torch.tensor([True, False, True, False, True, True])
    assert compacted(going).tolist() == [0, 4, 2, 5]
    assert compacted(torch.tensor([False, False])).tolist() == []
