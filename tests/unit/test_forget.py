"""Samples taken out of a small finished run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.config import parse
from pipeline.engine.dataset import Checkpoints
from pipeline.forget import catch_up, forget, read_list
from pipeline.inspect import Query, read_views
from pipeline.progress import Screen
from pipeline.report.collect import read_facts
from pipeline.report.samples import read_samples
from pipeline.rounds import opened
from pipeline.store import Store
from pipeline.tombstones import names, read_removed
from pipeline.verify import verify
from stages.errors import UserError
from stages.ids import media_url, sample_id
from tests.run_folder import make_run, publish_download, publish_training

CONFIG = {
    "sources": [{"path": "web.parquet"}],
    "human": [{"path": "human", "kind": "human"}],
    "pretrain": {"tokenizer": "tokenizer"},
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_run(str(tmp_path / "run"))


CAT = sample_id("cat")


def test_samples_by_id_are_gone_for_every_reader(store: Store) -> None:
    found = forget(store, "id", [CAT, "0" * 32])
    assert (found.asked, found.samples, found.new) == (2, 1, True)
    assert read_removed(store).samples == {CAT, "0" * 32}
    views = read_views(store)[1]
    ask = f"SELECT count(*) FROM pairs WHERE sample_id = '{CAT}'"
    assert Query(store, views).run(ask, 1)[1] != [(0,)]
    assert Query(store, views, read_removed(store).samples).run(ask, 1)[1] == [(0,)]
    shown = read_samples(store, read_facts(store).rounds[1])
    assert CAT not in {s.sample_id for group in shown.groups.values() for s in group}
    assert shown.groups, "the others are still shown"
    assert verify(store).problems == []


def test_models_that_have_seen_them_are_named(store: Store) -> None:
    seen = forget(store, "id", [CAT]).seen_by
    assert {place.split("/")[0] for place in seen} == {"round=00", "round=01"}
    kinds = {place.rstrip("/").rpartition("/")[2] for place in seen}
    assert {"med", "captioner", "filter"} <= kinds
    assert all(store.exists(place) for place in seen)
    assert forget(store, "id", [sample_id("gone")]).seen_by == ()


def test_models_of_before_a_config_change_are_named(store: Store) -> None:
    """No plan names them, but they lie in the run folder."""
    left = publish_training(store, 1, sample_id("only then"), "before")
    others = publish_training(store, 1, sample_id("never asked for"), "long before")
    seen = forget(store, "id", [sample_id("only then")]).seen_by
    assert set(seen) == folders(store, left)
    assert len(seen) == 4  # the training set, MED, captioner and filter
    assert not folders(store, others).intersection(seen)


def test_a_model_that_does_not_say_what_it_was_trained_on_is_named(store: Store) -> None:
    left = publish_training(store, 1, sample_id("only then"), "before")
    for stage in ("pretrain", "finetune_captioner", "finetune_filter"):
        record = store.read_record(left[stage][0])
        store.replace(record.model_copy(update={"details": {}}))
    found = forget(store, "id", [sample_id("only then")])
    assert set(found.seen_by) == folders(store, left)


def test_unfinished_checkpoints_are_named(store: Store) -> None:
    left = publish_training(store, 1, sample_id("only then"), "before")
    others = publish_training(store, 1, sample_id("never asked for"), "long before")
    for name, reads in (
        ("pretrain-of-then", left["assemble"]),
        ("finetune_filter-of-then", left["pretrain"]),
        ("pretrain-of-another", others["assemble"]),
    ):
        Checkpoints(store, name, reads).save(lambda folder: (folder / "step").touch() or None)
    found = forget(store, "id", [sample_id("only then")])
    unfinished = [place for place in found.seen_by if place.startswith("scratch/")]
    assert unfinished == [
        "scratch/checkpoints/finetune_filter-of-then/",
        "scratch/checkpoints/pretrain-of-then/",
    ]
    assert all(store.exists(place) for place in unfinished)


def folders(store: Store, records: Mapping[str, Sequence[str]]) -> set[str]:
    """Those of a training set and its models."""
    found = set()
    for name in records["assemble"]:
        found.add(store.read_record(name).payloads[0].path.rpartition("/")[0] + "/")
    for stage, model in (
        ("pretrain", "med"),
        ("finetune_captioner", "captioner"),
        ("finetune_filter", "filter"),
    ):
        (record,) = store.read_records(records[stage])
        (config,) = (p.path for p in record.payloads if p.path.endswith("config.json"))
        assert config.endswith(f"/{model}/config.json")
        found.add(config.removesuffix("config.json"))
    return found


def test_hashes_find_images_whatever_their_url(store: Store) -> None:
    # In this run the name of an image stands where its sha256 would.
    found = forget(store, "hash", ["tree", "f" * 64])
    assert found.samples == 1
    removed = read_removed(store)
    assert {sample_id("tree"), sample_id(media_url("f" * 64))} <= removed.samples
    assert removed.hashes == {"tree", "f" * 64}


def test_an_image_that_comes_after_its_hash_was_forgotten(store: Store) -> None:
    """Its pass began before that, and knew of no tombstone."""
    forget(store, "hash", ["f" * 64])
    before = read_removed(store)
    publish_download(store, "000003", "f" * 64, "late")
    assert sample_id("late") not in before.samples
    config = parse({"run": store.url, **CONFIG}, "test")
    with opened(config, Screen(io.StringIO(), live=False)):
        assert read_removed(store).samples == before.samples | {sample_id("late")}
    published = names(store.record_names())
    catch_up(store)
    assert names(store.record_names()) == published, "once"


def test_asking_again_changes_nothing(store: Store) -> None:
    urls = ["http://web.test/one.jpg", "http://web.test/two.jpg"]
    assert forget(store, "url", urls).new
    before = names(store.record_names())
    again = forget(store, "url", urls[:1])
    assert (again.new, again.samples) == (False, 0)
    assert names(store.record_names()) == before
    assert read_removed(store).samples == {sample_id(url) for url in urls}


def test_lists_are_read_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text(f"# a request of last week\n\n  {CAT.upper()} \n{CAT}\n")
    assert read_list(file, "id") == [CAT]
    file.write_text(" http://web.test/my cat.jpg \nhttp://web.test/1\nx\n")
    assert read_list(file, "url") == ["http://web.test/my cat.jpg", "http://web.test/1", "x"]
    for text, kind, message in (
        ("", "url", "holds nothing"),
        ("zz", "id", "32 hex digits"),
        ("ab", "hash", "64 hex digits"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_list(file, kind)
    with pytest.raises(UserError, match="cannot be read"):
        read_list(tmp_path / "none", "url")


def test_the_command_says_what_it_did(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ids.txt").write_text(CAT)
    assert main(["forget", store.url, "--ids", str(tmp_path / "ids.txt")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 asked for, 1 samples of this run"
    assert any(line.startswith("had seen them: round=00/models/") for line in lines)
    assert main(["forget", store.url]) == 2
    assert "--urls" in capsys.readouterr().err
