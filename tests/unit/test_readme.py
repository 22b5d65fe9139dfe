"""What the README shows to type into a notebook or to write into a config works as it stands: tiny
folders take the place of weights and data, under the very names."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from transformers import BertConfig, BertForMaskedLM, DeiTConfig, DeiTModel

from pipeline.config import parse
from pipeline.preflight import check
from stages.models.checkpoints import save_med
from stages.models.config import MedConfig
from stages.models.med import Med
from stages.models.text import fitted_to
from tests.images import jpeg
from tests.tiny_models import (
    captioner_model,
    clip_model,
    matcher_model,
    save_blip,
    save_clip,
    tokenizer,
)

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
HUB_IDS = {
    "Salesforce/blip-image-captioning-base": "captioner",
    "Salesforce/blip-itm-base-coco": "matcher",
    "openai/clip-vit-base-patch32": "embedder",
}
SIZES: dict[str, Any] = {
    "vision": {
        "image_size": 32,
        "patch_size": 8,
        "width": 48,
        "layers": 2,
        "heads": 4,
        "mlp_width": 96,
    },
    "text": {
        "width": 32,
        "layers": 2,
        "heads": 2,
        "mlp_width": 64,
        "max_positions": 40,
        "vision_width": 48,
    },
    "queue_size": 8,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_blip(captioner_model(), folder / "captioner")
    save_blip(matcher_model(), folder / "matcher")
    save_clip(clip_model(), folder / "embedder")
    Image.new("RGB", (40, 30), "orange").save(folder / "cat.jpg")
    return folder


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[*HUB_IDS.values()])
def test_a_snippet_prints_something(
    snippet: str, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for hub_id, folder in HUB_IDS.items():
        snippet = snippet.replace(hub_id, str(models / folder))
    monkeypatch.chdir(models)
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[")


@pytest.fixture(scope="module")
def place(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything that the README and one-machine.yaml name is there."""
    folder = tmp_path_factory.mktemp("place")
    for hub_id, name in HUB_IDS.items():
        (folder / hub_id).parent.mkdir(exist_ok=True)
        (folder / hub_id).symlink_to(models / name)
    for name, model in (("base/captioner", "captioner"), ("coco/filter", "matcher")):
        (folder / "models" / name).parent.mkdir(parents=True)
        (folder / "models" / name).symlink_to(models / model)
    _save_starts(folder)
    _save_data(folder / "data")
    return folder


def _save_starts(folder: Path) -> None:
    """What pretraining may start from: a ViT, a BERT and a whole MED, of `SIZES`."""
    torch.manual_seed(0)
    sizes = MedConfig.model_validate(SIZES)
    words = tokenizer()
    med = sizes.model_copy(update={"text": fitted_to(sizes.text, words)})
    save_med(Med(med), words, folder / "models/base/med", momentum=False)
    vision = {"hidden_size": 48, "intermediate_size": 96, "image_size": 32, "patch_size": 8}
    text = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 40}
    DeiTModel(DeiTConfig(num_hidden_layers=2, num_attention_heads=4, **vision)).save_pretrained(
        folder / "facebook/deit-base-patch16-224"
    )
    BertForMaskedLM(
        BertConfig(vocab_size=len(words), num_hidden_layers=2, num_attention_heads=2, **text)
    ).save_pretrained(folder / "bert-base-uncased")
    words.save_pretrained(folder / "bert-base-uncased")


def _save_data(folder: Path) -> None:
    for name in ("laion", "coco/train2017", "probes/dev", "probes/test"):
        (folder / name).mkdir(parents=True)
        (folder / name / "0.jpg").write_bytes(jpeg(0))
    rows = {"URL": ["http://127.0.0.1:9/a.png"], "TEXT": ["a cat"]}
    pq.write_table(pa.table(rows), folder / "laion/part.parquet")
    coco = {"images": [{"id": 1, "file_name": "0.jpg"}]}
    coco["annotations"] = [{"image_id": 1, "caption": "a cat"}]
    (folder / "coco/captions_train2017.json").write_text(json.dumps(coco))
    for split in ("dev", "test"):
        (line,) = re.findall(r"`(\{\"image\": .*?\})`", README)
        (folder / "probes" / split / "annotations.jsonl").write_text(line)


def section(title: str) -> dict[str, Any]:
    """The YAML of one section."""
    (found,) = re.findall(rf"\n## {title}\n.*?```yaml\n(.*?)```", README, re.DOTALL)
    values: dict[str, Any] = yaml.safe_load(found)
    return values


def merged(values: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """``values`` with the fields of ``more`` in place of its own."""
    filled = dict(values)
    for key, value in more.items():
        old = filled.get(key)
        filled[key] = merged(old, value) if isinstance(old, dict) else value
    return filled


@pytest.mark.parametrize("sections", [[], ["Start from released weights"]])
def test_what_a_newcomer_writes_can_be_used(
    sections: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = yaml.safe_load((ROOT / "configs/one-machine.yaml").read_text("utf-8"))
    yours = section("Your own data")
    # What the file alone names and only its author could have.
    others = {key for key, value in values.items() if "data/" in str(value)}
    assert others == yours.keys() - {"run"}
    for part in (yours, *map(section, sections), {"pretrain": {"model": SIZES}}):
        values = merged(values, part)
    monkeypatch.chdir(place)
    config = parse(values, "my.yaml")
    check(config)
    assert config.first_round == 1 and (config.pretrain.init is not None) == bool(sections)


def test_every_file_has_its_place_in_the_tree() -> None:
    (tree,) = re.findall(r"\n## Where things are\n\n```\n(.*?)```", README, re.DOTALL)
    for folder, following in (
        ("stages", "pipeline"),
        ("pipeline", "configs"),
        ("configs", "tests"),
    ):
        part = tree.partition(f"{folder}/ ")[2].partition(f"\n{following}/ ")[0]
        told = set(re.findall(r"(?<![\w/.-])([\w-]+\.(?:py|yaml)|\w+/)(?=[ \n:])", part))
        there = {f"{p.name}/" if p.is_dir() else p.name for p in (ROOT / folder).glob("[!_]*")}
        assert there <= told, sorted(there - told)
        below = {f"{p.name}/" if p.is_dir() else p.name for p in (ROOT / folder).rglob("*")}
        assert told <= below, sorted(told - below)
