"""The benchmark of captioning and filtering runs, and counts as it says; no figure is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.bench import blip, capfilt, floor


@pytest.fixture(autouse=True)
def _threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows(tmp_path: Path, *options: str) -> list[dict[str, object]]:
    file = tmp_path / "rows.json"
    common = ["--quick", "--threads", "1", "--images", "3", "--batch", "2", "--json", str(file)]
    capfilt.main([*common, *options])
    return json.loads(file.read_text())


def test_every_contender_is_measured(tmp_path: Path) -> None:
    found = rows(tmp_path)
    labels = ["transformers, one at a time", "transformers, batched", "ours", "ours, int8"]
    expected = {f"{kind}: {label}" for kind in ("captions", "scores") for label in labels}
    assert expected <= {row["metric"] for row in found}
    for row in found:
        assert row["value"] > 0 and row["memory_gib"] > 0 and row["share_of_floor"] > 0


def test_graphs_and_batch_shapes_are_compared(tmp_path: Path) -> None:
    found = rows(tmp_path, "--exact")
    assert [row["against"] for row in found] == ["eager", "batch 1"] * 3
    assert {row["value"] for row in found if row["against"] == "eager"} == {0.0}


def test_memory_is_watched(tmp_path: Path) -> None:
    [row] = rows(tmp_path, "--memory", "250")
    assert row["value"] > 0


def test_the_count_of_flops_is_torchs_own() -> None:
    """The floor's formulas against the FLOPs that torch counts while the real modules run."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import BlipForConditionalGeneration

    config = blip.config(tiny=True)
    model = BlipForConditionalGeneration(config).eval()
    images, tokens = torch.zeros(1, 3, 32, 32), torch.ones(1, 7, dtype=torch.int64)
    with torch.inference_mode(), FlopCounterMode(display=False) as counted:
        seen = model.vision_model(images).last_hidden_state
    work = floor.vision_work(config)
    assert counted.get_total_flops() == work.linear + work.attention
    with torch.inference_mode(), FlopCounterMode(display=False) as counted:
        model.text_decoder.bert(tokens, encoder_hidden_states=seen)
    work = floor.text_work(config, 7, grounded=True) + floor.image_keys_work(config)
    assert counted.get_total_flops() == work.linear + work.attention
