"""Source files become shards once and for good."""

import pyarrow as pa
import pytest
from pyarrow import csv

from pipeline.config import parse
from pipeline.sources import ingest, known_shards, link_shards, publish_cut
from pipeline.store import Store
from stages.errors import SourceError, StoreError


def config(tmp_path, **source):
    values = {
        "run": str(tmp_path / "run"),
        "sources": [{"path": str(tmp_path / "web"), **source}],
        "human": [{"path": str(tmp_path / "human"), "kind": "human"}],
        "ingest": {"shard_size": 2},
        "pretrain": {"tokenizer": "unused"},
    }
    return parse(values, "test").model_copy(update={"human": ()})


def write(tmp_path, name, rows):
    (tmp_path / "web").mkdir(exist_ok=True)
    table = pa.table(
        {"url": [f"http://x/{name}-{i}" for i in range(rows)], "caption": ["a"] * rows}
    )
    csv.write_csv(table, tmp_path / "web" / f"{name}.csv")


def test_new_files_become_new_shards_and_old_ones_stay(tmp_path):
    write(tmp_path, "a", 3)
    store = Store(str(tmp_path / "run"))
    first = ingest(config(tmp_path), store)
    assert sorted(first) == ["000000", "000001"]
    write(tmp_path, "b", 1)
    second = ingest(config(tmp_path), store)
    assert sorted(second) == ["000000", "000001", "000002"]
    assert {shard: second[shard] for shard in first} == first
    assert ingest(config(tmp_path), store) == second


def test_a_file_without_rows_stands_beside_others(tmp_path):
    """As Spark writes them."""
    for name, rows in (("a", 0), ("b", 3), ("c", 0)):
        write(tmp_path, name, rows)
    store = Store(str(tmp_path / "run"))
    first = ingest(config(tmp_path), store)
    assert sorted(first) == ["000000", "000001"]
    cut = [name for name in store.record_names() if "/stage=ingest/" in name]
    assert len(cut) == 3
    assert ingest(config(tmp_path), store) == first
    write(tmp_path, "d", 1)
    assert sorted(ingest(config(tmp_path), store)) == ["000000", "000001", "000002"]


def test_other_column_settings_on_a_cut_file_are_refused(tmp_path):
    write(tmp_path, "a", 3)
    store = Store(str(tmp_path / "run"))
    ingest(config(tmp_path), store)
    before = store.record_names()
    with pytest.raises(SourceError, match="was cut before with other column settings"):
        ingest(config(tmp_path, url_column="url"), store)
    assert store.record_names() == before


def test_shards_beyond_a_million_keep_their_numbers(tmp_path):
    store = Store(str(tmp_path / "run"))
    numbers = [100_000, 1_000_000, 1_000_001, 10_000_000]
    payloads = tuple(
        store.put_table(f"sources/shard={number:06d}", pa.table({"n": [number]}))
        for number in numbers
    )
    cut = publish_cut(store, "f", payloads, {"kind": "web"}, 0.0)
    link_shards(store, [cut], set())
    assert sorted(map(int, known_shards([cut]))) == numbers
    for shard, (_, record) in known_shards([cut]).items():
        (payload,) = store.read_record(record).payloads
        assert store.read_table(payload)["n"].to_pylist() == [int(shard)]


def test_two_files_cut_as_one_shard_are_not_taken_for_one(tmp_path):
    store = Store(str(tmp_path / "run"))
    payload = store.put_table("sources/shard=000000", pa.table({"n": [1]}))
    cut = [publish_cut(store, name, (payload,), {"kind": "web"}, 0.0) for name in ("f", "g")]
    known_shards(cut[:1] * 2)
    with pytest.raises(StoreError, match=r"shard 000000 was cut twice, by .*f\.json and .*g\.json"):
        known_shards(cut)
