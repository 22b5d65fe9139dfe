"""What only a GPU can show: captured steps, copies that overlap, a batch size that grows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.models.captioner import Captioner
from stages.models.config import GenerationConfig
from stages.models.matcher import Matcher
from tests import tiny_models
from tests.unit.test_captioner import random_images

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Captioner:
    folder = tiny_models.save_blip(
        tiny_models.captioner_model(), tmp_path_factory.mktemp("models") / "captioner"
    )
    return Captioner(folder, "cuda", batch_size=8)


@pytest.mark.parametrize("method", ["nucleus", "beam", "greedy"])
def test_captured_steps_give_the_captions_of_eager_ones(captioner: Captioner, method: str) -> None:
    images, config = random_images(43), GenerationConfig(method=method)  # type: ignore[arg-type]
    graphed = captioner(images, config=config)
    captioner.graphed = False
    eager = captioner(images, config=config)
    captioner.graphed = True
    assert graphed == eager == captioner(images, config=config)


def test_scores_are_those_of_a_cpu(tmp_path: Path) -> None:
    folder = tiny_models.save_blip(tiny_models.matcher_model(), tmp_path / "matcher")
    images, texts = random_images(21), [["a red cat", "two dogs"][: n % 3] for n in range(21)]
    here, there = (Matcher(folder, device, batch_size=4) for device in ("cpu", "cuda"))
    expected, found = here.match(images, texts), there.match(images, texts)
    for own, other in zip(expected, found, strict=True):
        assert [a for pair in own for a in pair] == pytest.approx(
            [b for pair in other for b in pair], abs=1e-3
        )


def test_a_batch_size_grows_and_captions_stay(captioner: Captioner) -> None:
    images = random_images(43, seed=1)
    before = captioner(images)
    edge = captioner.preprocessing.size
    pixels = torch.zeros(1024, edge, edge, 3, dtype=torch.uint8)
    size = captioner.grow(lambda count: captioner(pixels[:count], [b""] * count))
    assert size == captioner.batch_size >= 1
    after = captioner(images)  # another batch size may move the border of a token
    assert sum(one != other for one, other in zip(before, after, strict=True)) <= 2
