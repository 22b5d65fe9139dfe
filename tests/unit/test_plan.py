"""What a round's plan says of its inputs before any work is done."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import RunConfig, parse
from pipeline.plan import content_of, probes
from stages.errors import SourceError


def config(**fields: object) -> RunConfig:
    values = {
        "run": "run",
        "sources": [{"path": "web.parquet"}],
        "human": [{"path": "human", "kind": "human"}],
        "pretrain": {"tokenizer": "tokenizer"},
    }
    return parse(values | fields, "test")


def test_the_content_of_a_folder_is_its_names_and_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(b"1234")
    assert content_of(str(tmp_path / "one")) == content_of(str(tmp_path / "two"))
    (tmp_path / "two" / "weights").write_bytes(b"1235")
    assert content_of(str(tmp_path / "one")) != content_of(str(tmp_path / "two"))
    (tmp_path / "two" / "weights").rename(tmp_path / "two" / "other")
    (tmp_path / "two" / "other").write_bytes(b"1234")
    assert content_of(str(tmp_path / "one")) != content_of(str(tmp_path / "two"))


def test_a_hub_id_stands_for_itself_and_a_missing_path_does_not(tmp_path: Path) -> None:
    assert content_of("someone/blip") == "someone/blip"
    with pytest.raises(SourceError, match="no such folder"):
        content_of(str(tmp_path / "missing"))


def test_probe_folders_must_be_there_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "probes" / "dev"
    folder.mkdir(parents=True)
    # As short a path as a hub id, which would be looked up only when it is opened.
    with pytest.raises(SourceError, match=r"dev: probes/dev: no annotations\.jsonl"):
        probes(config(dev="probes/dev"))
    (folder / "annotations.jsonl").write_text("{}")
    assert probes(config(dev="probes/dev")) == {"dev": "probes/dev"}
    assert probes(config()) == {}
