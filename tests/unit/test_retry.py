"""Rows that failed, tried again in shards of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import parse
from pipeline.records import Record
from pipeline.retry import retry_failed
from pipeline.runfolder import tables
from pipeline.sources import ingest
from pipeline.store import Store
from stages.download import DownloadConfig, DownloadStage
from stages.schemas import SOURCES

CONFIG = {
    "human": [{"path": "h"}],
    "pretrain": {"tokenizer": "t"},
    "ingest": {"shard_size": 3},
    "dev": None,
}
STATUSES = [
    "success",
    "timeout",
    "http_4xx",
    "http_4xx",
    "dns",
    "opted_out",
    "http_5xx",
    "unreadable",
]
CODES = [200, None, 404, 429, None, None, 503, None]


@pytest.fixture
def run(tmp_path: Path) -> tuple[Store, object]:
    """A run of eight rows that ended as above."""
    (tmp_path / "web.txt").write_text(
        "".join(f"http://w.test/{n}.jpg\ttext {n}\n" for n in range(8))
    )
    human = tmp_path / "human.txt"
    human.write_text("http://h.test/0.jpg\ta boat\n")
    values = {
        **CONFIG,
        "run": str(tmp_path / "run"),
        "sources": [{"path": str(tmp_path / "web.txt")}],
    }
    config = parse({**values, "human": [{"path": str(human)}]}, "test")
    return Store(config.run), config


def fetched(
    store: Store, shards: dict[str, tuple[str, str]], outcome: dict[str, tuple[str, int]]
) -> None:
    """Publish a download of every shard that has none."""
    done = {name.split("/")[-1][:6] for name in store.record_names() if "stage=download" in name}
    stage = DownloadStage(DownloadConfig())
    for shard, (_, record) in shards.items():
        if shard in done:
            continue
        (source,) = tables(store.read_record(record))
        table = stage.failed(store.read_table(source.payload), "failed", "no")
        rows = table.drop_columns(["image"]).to_pylist()
        for row in rows:
            row["status"], row["http_code"] = outcome.get(row["url"], ("success", 200))
        schema = table.schema.remove(table.schema.get_field_index("image"))
        made = type(table).from_pylist(rows, schema=schema)
        payload = store.put_table(f"stage=download/shard={shard}", made)
        fixed = {
            "stage_version": 1,
            "round": None,
            "code_version": "t",
            "started": 0,
            "finished": 1,
        }
        assert store.publish(
            Record(stage="download", shard=shard, fingerprint="f", payloads=(payload,), **fixed)
        )


def test_what_may_have_passed_is_tried_again_in_new_shards(run: tuple[Store, object]) -> None:
    store, config = run
    first = ingest(config, store)
    urls = [f"http://w.test/{n}.jpg" for n in range(8)]
    fetched(store, first, dict(zip(urls, zip(STATUSES, CODES, strict=True), strict=True)))
    before = store.files("sources")
    assert retry_failed(config, store) == 5
    shards = ingest(config, store)
    assert shards.items() > first.items(), "committed shards stay"
    assert before.items() < store.files("sources").items()
    new = sorted(shards.keys() - first.keys())
    assert new == ["000004", "000005"]
    rows = []
    for shard in new:
        kind, record = shards[shard]
        assert kind == "web"
        (source,) = tables(store.read_record(record))
        table = store.read_table(source.payload)
        assert table.schema.equals(SOURCES)
        assert len(table) <= 3
        rows += table.to_pylist()
    assert [row["url"] for row in rows] == [urls[n] for n in (1, 3, 4, 6, 7)]
    originals = {
        row["row_id"]: row
        for _, record in first.values()
        for row in store.read_table(tables(store.read_record(record))[0].payload).to_pylist()
    }
    for row in rows:
        original = originals[row["retry_of"]]
        assert row["row_id"] not in originals
        changed = {name for name in SOURCES.names if row[name] != original[name]}
        assert changed == {"row_id", "retry_of"}


def test_texts_of_one_image_are_tried_again_in_one_shard(
    run: tuple[Store, object], tmp_path: Path
) -> None:
    """Or it would be fetched twice."""
    store, config = run
    urls = ["http://w.test/a.jpg"] * 2 + ["http://w.test/b.jpg"] * 2
    (tmp_path / "web.txt").write_text("".join(f"{url}\ttext {n}\n" for n, url in enumerate(urls)))
    first = ingest(config, store)
    fetched(store, first, dict.fromkeys(urls, ("timeout", 0)))
    assert retry_failed(config, store) == 4
    shards = ingest(config, store)
    new = [
        store.read_table(tables(store.read_record(shards[shard][1]))[0].payload)["url"].to_pylist()
        for shard in sorted(shards.keys() - first.keys())
    ]
    assert new == [urls[:2], urls[2:]]


def test_only_what_failed_again_is_tried_again_again(run: tuple[Store, object]) -> None:
    store, config = run
    fetched(
        store,
        ingest(config, store),
        {"http://w.test/1.jpg": ("timeout", 0)} | {"http://h.test/0.jpg": ("dns", 0)},
    )
    assert retry_failed(config, store) == 2
    assert retry_failed(config, store) == 0, "they have not been tried yet"
    shards = ingest(config, store)
    assert sorted(kind for kind, _ in shards.values()).count("human") == 2
    fetched(store, shards, {"http://w.test/1.jpg": ("refused", 0)})
    assert retry_failed(config, store) == 1
    assert retry_failed(config, store) == 0
