"""Decoding over buffers that serve one batch after the other, without the capture of graphs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch

from stages.models.blocks import LMHead, TextStack
from stages.models.captioner import Captioner
from stages.models.config import GenerationConfig, TextConfig
from stages.models.decoding import GraphedDecoding, compacted
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


class Stream:
    def wait_stream(self, other: object) -> None: ...


class Graph:
    def pool(self) -> str:
        return "pool"

    def replay(self) -> None: ...


def test_all_captures_share_one_stream_and_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool's blocks are used again within one stream only."""
    captured, warmed = [], []

    def capture(graph: Graph, pool: object, stream: Stream) -> AbstractContextManager[None]:
        captured.append((pool, stream))
        return nullcontext()

    def warm_up(stream: Stream) -> AbstractContextManager[None]:
        warmed.append(stream)
        return nullcontext()

    for name, instead in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": warm_up,
        "CUDAGraph": Graph,
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, instead)
    decoder = TextStack(TextConfig(vocab_size=20, width=8, layers=1, heads=2, mlp_width=8))
    head = LMHead(decoder.config, decoder.embeddings.word_embeddings)
    graphs = GraphedDecoding(decoder, head, slots=2, width=1, capacity=4)
    for _ in range(3):
        graphs._captured_here(lambda: None)
    assert [pool for pool, _ in captured] == [None, "pool", "pool"]
    streams = [stream for _, stream in captured]
    assert streams == warmed and len({id(stream) for stream in streams}) == 1


def test_compaction_moves_only_what_must() -> None:
    going = torch.tensor([True, False, True, False, True, True])
    assert compacted(going).tolist() == [0, 4, 2, 5]
    assert compacted(torch.tensor([False, False])).tolist() == []
