"""The benchmark of captioning and filtering runs, and counts as it says; no figure is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from stages.filter import FilterStage
from stages.models.blocks import TextStack
from stages.models.config import TextConfig
from tests.bench import blip, capfilt, capfilt_engine, floor
from tests.bench.capfilt_contenders import Setting


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


def test_everyone_runs_at_the_batch_size_that_suits_it_for_each_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = {("captions", "ours"): 2, ("scores", "ours"): 8, ("captions", "transformers"): 4}

    def measured(
        kind: str, name: str, setting: Setting, count: int, quick: bool
    ) -> tuple[float, float]:
        return 1 / (1 + abs(setting.batch - best.get((kind, name), 2))), 1.0

    monkeypatch.setattr(capfilt, "measure", measured)
    file = tmp_path / "rows.json"
    capfilt.main(["--quick", "--threads", "1", "--rounds", "2", "--json", str(file)])
    found = {row["metric"]: row for row in json.loads(file.read_text())}
    for (kind, name), size in best.items():
        label = name if name == "ours" else f"{name}, batched"
        row = found[f"{kind}: {label}"]
        assert (row["batch"], row["value"]) == (str(size), 1.0)
    assert found["captions: transformers, one at a time"]["batch"] == "1"
    assert found["captions + scores: ours"]["batch"] == "2/8"


@pytest.mark.parametrize(
    ("given", "images", "batch"),
    [
        ([], 8, [2, 4, 8]),
        (["--device", "cuda"], 16, [8]),
        (["--exact"], 500, [8]),
        (["--store"], 16, [8]),
        (["--batch", "3"], 8, [3]),
    ],
)
def test_sizes_that_are_not_given(given: list[str], images: int, batch: list[int]) -> None:
    options = capfilt.arguments(given)
    assert (options.images, options.batch) == (images, batch)


def test_graphs_and_batch_shapes_are_compared(tmp_path: Path) -> None:
    """And on a CPU, captions of int8 layers."""
    found = rows(tmp_path, "--exact")
    assert [row["against"] for row in found] == ["eager", "batch 1", "int8"] * 3
    assert {row["value"] for row in found if row["against"] == "eager"} == {0.0}


def test_captioning_and_scoring_add_up(tmp_path: Path) -> None:
    found = {row["metric"]: row for row in rows(tmp_path)}
    for label in ("transformers, batched", "ours"):
        apart = [1 / found[f"{kind}: {label}"]["value"] for kind in ("captions", "scores")]
        assert found[f"captions + scores: {label}"]["value"] == pytest.approx(1 / sum(apart))


@pytest.fixture
def small_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capfilt_engine, "_TABLE", 5)


@pytest.mark.usefixtures("small_tables")
def test_memory_is_watched(tmp_path: Path) -> None:
    found = rows(tmp_path, "--memory", "40")
    assert [row["metric"].partition(":")[0] for row in found] == ["caption", "filter", "embed"]
    assert all(row["value"] > 0 and row["ratio"] < 1.1 for row in found)


@pytest.mark.usefixtures("small_tables")
def test_a_leak_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leaked, process = [], FilterStage.process

    def leaking(self: FilterStage, table: pa.Table) -> pa.Table:
        leaked.append(bytes(range(256)) * 2**18)
        return process(self, table)

    monkeypatch.setattr(FilterStage, "process", leaking)
    found = {row["metric"]: row["ratio"] for row in rows(tmp_path, "--memory", "40")}
    assert found["filter: memory"] > 1.1
    assert found["caption: memory"] < 1.1


def test_a_phase_takes_its_products_or_its_bytes_whichever_is_longer() -> None:
    machine = floor.Machine(rate=10, linear_rate=20, bandwidth=5)
    phases = floor.Work(40, 10, 5), floor.Work(20, 0, 50)
    assert machine.floor(phases) == max(2 + 1, 1) + max(1, 10)


def test_int8_reads_its_keys_in_floats() -> None:
    config = blip.config(tiny=True)
    t, tokens = config.text_config, 17
    bytes_of = [
        floor.caption_work(config, 3, 10, 2, size, keys)[1].bytes for size, keys in ((4, 4), (1, 4))
    ]
    keys = 10 * 4 * t.num_hidden_layers * 2 * tokens * t.hidden_size
    assert (bytes_of[0] - keys) == 4 * (bytes_of[1] - keys)


def test_the_count_of_flops_is_torchs_own() -> None:
    """The floor's formulas against the FLOPs that torch counts while the real modules run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
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

    text = TextConfig(vocab_size=200, width=48, layers=2, heads=4, mlp_width=96, vision_width=32)
    stack, seen = TextStack(text).eval(), torch.zeros(1, 17, 32)
    stack.absorb()
    # torch counts no fused attention on a CPU.
    plain = sdpa_kernel(SDPBackend.MATH)
    with torch.inference_mode(), plain, FlopCounterMode(display=False) as counted:
        stack(tokens, image_kv=seen)
    config.text_config.num_attention_heads = 4
    config.vision_config.hidden_size = 32
    work = floor.absorbed_work(config, 7)
    assert counted.get_total_flops() == work.linear + work.attention


def test_without_keys_a_step_reads_the_tokens_and_two_more_weights() -> None:
    config = blip.config(tiny=True)
    text, tokens = config.text_config, 17
    seen = config.vision_config.hidden_size = 32
    with_keys, without = (
        [floor.caption_work(config, 3, 10, batch, 4, 2, absorbed=way)[1].bytes for batch in (1, 2)]
        for way in (False, True)
    )
    shared = 2 * without[1] - without[0]  # what a larger batch does not spread
    assert shared == 10 * 2 * tokens * seen
    more = 10 * 4 * text.num_hidden_layers * 2 * text.hidden_size * seen
    assert without[0] - shared == 2 * (with_keys[0] - with_keys[1]) + more
