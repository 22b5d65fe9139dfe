"""Copies of remote files, one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.dag import DatasetTask, Published
from pipeline.engine.dataset import drop_images, open_input
from pipeline.in_turn import InTurn
from pipeline.store import Store
from stages.select import SelectConfig, SelectStage
from tests.run_folder import publish_files


def filled(url: str) -> tuple[Store, list[str]]:
    store = Store(url)
    store.ensure()
    names = [f"images/{number}.tar" for number in range(3)]
    for name in names:
        store.write_bytes(name, name.encode())
    return store, names


def test_only_the_one_in_use_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store, names = filled("memory://in-turn")
    files = InTurn(store, names)
    assert len(files) == 3
    for name, file in zip(names, files, strict=True):
        assert file.read_bytes() == name.encode()
        assert list(store.cache.rglob("*.tar")) == [file]
    assert [store.exists(name) for name in names] == [True] * 3


def test_files_of_a_local_store_stay(tmp_path: Path) -> None:
    store, names = filled(str(tmp_path))
    assert [file.read_bytes().decode() for file in InTurn(store, names)] == names
    assert all((tmp_path / name).is_file() for name in names)
    assert [file.name for file in InTurn(store, names)[1:]] == ["1.tar", "2.tar"]


def test_tars_are_given_back_after_training_and_tables_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store, names = filled("memory://given-back")
    record = publish_files(store, (*names, "dataset/index.parquet"))
    published = Published((record.name,), "*")
    task = DatasetTask(
        stage=SelectStage(SelectConfig(), ()),
        round=0,
        fingerprint="00",
        folder="round=00",
        inputs={"train": published, "med": "someone/med"},
    )
    assert len([*open_input(published, store)]) == 4
    drop_images(task, store)
    assert [path.name for path in store.cache.rglob("*.*") if path.is_file()] == ["index.parquet"]
