"""What a config names is looked at before anything is written."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import BertConfig, ViTConfig

from pipeline.config import parse
from pipeline.preflight import check
from stages.errors import CheckpointError, ConfigError, SourceError, UserError
from tests import tiny_models
from tests.images import jpeg


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A config of which everything can be used."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "web.csv").write_text("url,text\nhttp://127.0.0.1:9/a.png,a cat\n")
    for name in ("human", "dev"):
        (folder / name).mkdir()
        (folder / name / "0.jpg").write_bytes(jpeg(0))
        line = json.dumps({"image": "0.jpg", "captions": ["a cat"]})
        (folder / name / "annotations.jsonl").write_text(line + "\n")
    matcher = tiny_models.save_blip(tiny_models.matcher_model(), folder / "matcher")
    captioner = tiny_models.save_blip(tiny_models.captioner_model(), folder / "captioner")
    return {
        "run": "run",
        "sources": [{"path": str(folder / "web.csv")}],
        "human": [{"path": str(folder / "human")}],
        "dev": str(folder / "dev"),
        "caption": {"model": str(captioner)},
        "filter": {"model": str(matcher)},
        "embed": {"model": str(matcher)},
        "pretrain": {"tokenizer": str(matcher)},
    }


def checked(values: dict[str, Any], **changes: Any) -> None:
    check(parse(values | changes, "test"))


def test_a_good_config_passes(good: dict[str, Any]) -> None:
    checked(good)


def test_a_run_folder_that_ends_with_its_job_is_refused(
    good: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_0"
    copied.mkdir(parents=True)
    monkeypatch.chdir(copied)
    with pytest.raises(ConfigError, match=r"run: 'runs/x' would lie in this job's copy"):
        checked(good, run="runs/x")
    checked(good, run=str(tmp_path / "run"))
    checked(good, run="s3://bucket/run")


def test_sources_may_be_gone_once_they_are_cut(good: dict[str, Any]) -> None:
    gone = parse(good | {"sources": [{"path": "/no/such.csv"}]}, "test")
    check(gone, sources=False)
    with pytest.raises(SourceError):
        check(gone)


def test_what_the_sample_world_will_hold_is_not_looked_for(good: dict[str, Any]) -> None:
    inside = {"sources": [{"path": "{world}/web.parquet"}], "test": "{world}/test"}
    checked(good, world={}, **inside)


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("a.csv", b"", "holds no rows"),
        ("a.csv", b"url,text\n", "holds no rows"),
        ("a.csv", b"x,text\n1,a\n", "no column for the url"),
        ("a.jsonl", b"{\n", "not a valid jsonl file"),
        ("a.parquet", b"", "not a valid parquet file"),
        ("a.tar", b"junk" * 300, "cannot be read as webdataset"),
        ("a.xyz", b"junk", "no source file there"),
    ],
)
def test_sources(
    good: dict[str, Any], tmp_path: Path, file: str, content: bytes, part: str
) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(SourceError) as caught:
        checked(good, sources=[*good["sources"], {"path": str(tmp_path / file)}])
    said = str(caught.value)
    assert said.startswith(f"sources.1.path: {tmp_path / file}: ") and part in said, said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("annotations", "part"),
    [
        (None, "cannot be read"),
        ("", "no probes"),
        ("{", "not JSON"),
        ('{"image": "0.jpg", "captions": []}', "captions is missing or empty"),
        ('{"image": "gone.jpg", "captions": ["a"]}', "'gone.jpg' cannot be read"),
    ],
)
def test_probes(good: dict[str, Any], tmp_path: Path, annotations: str | None, part: str) -> None:
    if annotations is not None:
        (tmp_path / "annotations.jsonl").write_text(annotations)
    with pytest.raises(SourceError) as caught:
        checked(good, test=str(tmp_path))
    assert str(caught.value).startswith(f"test: {tmp_path}") and part in str(caught.value)


def test_evaluation_sets(good: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "0.JPG").write_bytes(jpeg(0))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "deep" / "er" / "0.JPG", "er/0.JPG")
    pq.write_table(pa.table({"embedding": [[0.5]]}), tmp_path / "a.parquet")
    sets = [str(tmp_path / name) for name in ("deep", "a.tar", "a.parquet")]
    checked(good, dedup={"evaluation": sets})
    checked(good, world={}, dedup={"evaluation": ["{world}/test"]})


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("none", None, "not there"),
        ("none.parquet", None, "not there"),
        ("folder", {"a.txt": b"1"}, "no picture in it"),
        ("a.tar", b"junk" * 300, "cannot be read"),
        ("a.tar", b"", "cannot be read"),
        ("a.tar.gz", b"\x1f\x8b\x08" + b"\xff" * 99, "cannot be read"),
        ("a.parquet", b"junk", "cannot be read"),
        ("a.parquet", pa.table({"text": ["a"]}), "no picture in it"),
        ("a.parquet", pa.table({"embedding": pa.array([], pa.list_(pa.float32()))}), "no picture"),
    ],
)
def test_evaluation_sets_that_are_none(
    good: dict[str, Any], tmp_path: Path, name: str, content: Any, part: str
) -> None:
    """A bootstrapping round would find out, hours of pretraining later."""
    path = tmp_path / name
    if isinstance(content, dict):
        path.mkdir()
        for file, data in content.items():
            (path / file).write_bytes(data)
    elif isinstance(content, pa.Table):
        pq.write_table(content, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(SourceError) as caught:
        checked(good, dedup={"evaluation": [good["dev"], str(path)]})
    said = str(caught.value)
    assert said.startswith(f"dedup.evaluation.1: {path}: {part}") and "\n" not in said
    assert said.endswith("give a folder or tar of images, or Parquet with a column `embedding`")


def write(folder: Path, **files: str | bytes) -> None:
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name.replace("__", ".")).write_bytes(data)


@pytest.mark.parametrize("field", ["caption", "filter", "embed"])
@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config__json": "a text"},
        {"config__json": '{"model_type": "bert"}'},
        {"config__json": '{"model_type": "blip"}'},
        {"config__json": '{"model_type": "blip"}', "model__safetensors": b"\xff" * 100},
        {"config__json": '{"model_type": "clip"}', "model__safetensors": b""},
    ],
)
def test_models(
    good: dict[str, Any], tmp_path: Path, field: str, files: dict[str, str | bytes]
) -> None:
    write(tmp_path, **files)
    with pytest.raises(CheckpointError) as caught:
        checked(good, **{field: {"model": str(tmp_path)}})
    assert str(caught.value).startswith(f"{field}.model: {tmp_path}: ")
    assert "\n" not in str(caught.value)


def test_weights_cut_short(good: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_models.save_blip(tiny_models.matcher_model(), tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"filter\.model: .*model\.safetensors is not"):
        checked(good, filter={"model": str(folder)})


def test_a_captioner_is_no_filter(good: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"filter\.model: .*need a BLIP matcher"):
        checked(good, filter=good["caption"])


@pytest.mark.parametrize("field", ["caption", "filter", "embed"])
def test_a_hub_id_that_cannot_be_had(
    good: dict[str, Any], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=rf"{field}\.model: no/such: .*from the hub"):
        checked(good, **{field: {"model": "no/such"}})


def test_the_tokenizer(good: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pretrain\.tokenizer: .*no tokenizer\.json"):
        checked(good, pretrain={"tokenizer": str(tmp_path)})


@pytest.mark.parametrize("field", ["init", "init_vision", "init_text"])
def test_what_pretraining_starts_from(good: dict[str, Any], tmp_path: Path, field: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        checked(good, pretrain=good["pretrain"] | {field: str(tmp_path)})
    assert str(caught.value).startswith(f"pretrain.{field}: {tmp_path}: no config.json")
    # Of the right kind, but not of the model's sizes, which are ViT-B's and BERT-base's here.
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = {"init_vision": ViTConfig(**sizes), "init_text": BertConfig(**sizes)}
    if field in made:
        made[field].save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=rf"pretrain\.{field}: .* does not fit: width 32"):
            checked(good, pretrain=good["pretrain"] | {field: str(tmp_path)})


def test_a_bert_is_not_compared_with_words_that_the_world_will_make(
    good: dict[str, Any], tmp_path: Path
) -> None:
    pretrain = {"tokenizer": "{world}/tokenizer", "init_text": str(tmp_path)}
    checked(good, world={}, pretrain=pretrain)


def test_limits_that_the_model_cannot_meet(good: dict[str, Any]) -> None:
    prompt = {"prompt": "a " * 30}
    alike = {"evaluate": prompt, "finetune": {"captioner": prompt}}
    with pytest.raises(ConfigError, match=r"caption\.model: max_tokens 20 leaves no room"):
        checked(good, caption=good["caption"] | {"generation": prompt}, **alike)
    with pytest.raises(ConfigError, match=r"filter\.model: max_tokens 999 is not between"):
        checked(good, filter=good["filter"] | {"max_tokens": 999})


def test_all_of_it_is_bad_input() -> None:
    """So that the program ends with exit code 2."""
    assert all(issubclass(e, UserError) for e in (CheckpointError, ConfigError, SourceError))
