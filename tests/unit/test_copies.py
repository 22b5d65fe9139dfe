"""What a round's plan makes of images that share captions, in a real store."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config import RunConfig, parse
from pipeline.copies import link, plan_sharing
from pipeline.dag import BEFORE_COPIES
from pipeline.engine.dataset import publish_folder
from pipeline.plan import Model, RoundPlan, Sharing, plan_round
from pipeline.store import Store
from stages.schemas import SHARED

SHARDS = {
    f"{number:06d}": (kind, f"records/run/stage=sources/{number:06d}-{number:02x}.json")
    for number, kind in enumerate(("web", "human", "web", "web"))
}
MODELS = {stage: Model(f"made/{stage}", "00") for stage in ("caption", "filter", "embed")}


def config(before_caption: str = "exact") -> RunConfig:
    values = {
        "run": "run",
        "sources": [{"path": "web.parquet"}],
        "human": [{"path": "human", "kind": "human"}],
        "pretrain": {"tokenizer": "tokenizer"},
        "dedup": {"before_caption": before_caption},
    }
    return parse(values, "test")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


def sharing(store: Store, before_caption: str = "exact") -> Sharing:
    return plan_sharing(config(before_caption), 1, SHARDS, MODELS, ("000000",), (), store)


def plan(shared: Sharing, before_caption: str = "exact") -> RoundPlan:
    return plan_round(config(before_caption), 1, SHARDS, MODELS, None, {}, sharing=shared)


def found(store: Store, folder: Path, *files: str) -> Sharing:
    """What is known after the stage has written these files."""
    task = sharing(store).copies
    assert task is not None
    folder.mkdir()
    for name in files:
        pq.write_table(SHARED.empty_table(), folder / name)
    publish_folder(task, store, folder, 0.0)
    return sharing(store)


def test_nothing_is_looked_for_in_a_raw_round_or_where_it_is_off(store: Store) -> None:
    assert sharing(store, "off") == Sharing()
    assert plan_sharing(config(), 0, SHARDS, {}, (), (), store) == Sharing()
    (job, *_) = plan(Sharing(), "off").jobs(set())
    assert job.todo == ("download", "embed", "caption", "filter")


def test_captions_wait_until_it_is_known_what_is_shared(store: Store, tmp_path: Path) -> None:
    before = sharing(store)
    assert before.copies is not None and before.shared is None
    web, human, *_ = plan(before).jobs(set())
    assert web.todo == BEFORE_COPIES and human.todo == ("download",)
    assert [len(source.records) for source in before.copies.inputs.values()] == [3]
    near = sharing(store, "perceptual").copies
    assert near is not None and set(near.inputs) == {"download", "embeddings"}
    after = plan(found(store, tmp_path / "none", "copies.parquet"))
    assert after.jobs(set())[0].todo == ("download", "embed", "caption", "filter")


def test_a_shard_hangs_on_what_concerns_it_alone(store: Store, tmp_path: Path) -> None:
    alone = plan(sharing(store, "off"), "off").jobs(set())
    files = ("shard=000002-00000000000000ab.parquet", "copies.parquet")
    known = found(store, tmp_path / "found", *files)
    name = "records/run/stage=shared/000002-00000000000000ab.json"
    assert known.shared == {"000002": name}
    for job, other in zip(plan(known).jobs(set()), alone, strict=True):
        changed = {stage for stage in other.records if job.records[stage] != other.records[stage]}
        assert changed == ({"caption", "filter"} if job.shard == "000002" else set())
        assert job.records.get("shared") == known.shared.get(job.shard)
    # What is told of another shard later changes nothing here.
    more = Sharing(known.copies, {**known.shared, "000003": name.replace("2-", "3-")})
    assert plan(more).jobs(set())[2] == plan(known).jobs(set())[2]


def test_every_shard_gets_a_record_of_its_own_once(store: Store, tmp_path: Path) -> None:
    known = found(store, tmp_path / "found", "shard=000000-0a.parquet", "shard=000003-0b.parquet")
    link(store, sharing(store, "off"))
    assert len(store.record_names()) == 1
    link(store, known)
    names = store.record_names()
    assert set((known.shared or {}).values()) < names and len(names) == 3
    for shard, name in (known.shared or {}).items():
        (payload,) = store.read_record(name).payloads
        assert f"/shard={shard}-" in payload.path
    link(store, known)
    assert store.record_names() == names
