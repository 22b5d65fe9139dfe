"""The books of a small round that select and assemble made, and of rounds that someone spoiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.images import write_tar
from pipeline.ledger import LedgerStage, balance
from stages.assemble import AssembleConfig, AssembleStage
from stages.base import LocalContext
from stages.errors import LedgerError
from stages.ids import pair_id
from stages.schemas import CAPTIONS, CLUSTERS, DOWNLOAD, LEDGER, SCORES, SOURCES
from stages.select import SelectConfig, SelectStage
from tests.tables import filled, write_shards

Inputs = dict[str, list[Path]]

DOWNLOADS = [
    [
        {"row_id": "r0", "sample_id": "a", "text": "a dog", "image": b"\xff\xd8\xff a"},
        {"row_id": "r1", "sample_id": "a", "text": "a dog", "status": "duplicate_row"},
        {"row_id": "r2", "sample_id": "b", "text": "a big dog", "image": b"\xff\xd8\xff b"},
        {"row_id": "r3", "sample_id": "c", "text": "a cat", "status": "http_4xx"},
        {"row_id": "r4", "sample_id": "d", "text": "spam", "image": b"\xff\xd8\xff d"},
        {"row_id": "r5", "sample_id": "e", "text": "gone", "image": b"\xff\xd8\xff e"},
    ],
    [
        {"row_id": "r6", "sample_id": "h", "text": "a horse", "image": b"\xff\xd8\xff h"},
        {"row_id": "r7", "sample_id": "h", "text": "a foal"},
    ],
]
CAPTIONED = [
    {"sample_id": "a", "caption_index": 0, "text": "A DOG", "status": "success"},
    {"sample_id": "b", "caption_index": 0, "text": "a hound", "status": "success"},
    {"sample_id": "d", "caption_index": 0, "status": "failed", "detail": "no image"},
]
SCORED = {
    ("a", "web", "a dog"): 0.9,
    ("b", "web", "a big dog"): 0.8,
    ("d", "web", "spam"): 0.1,
    ("e", "web", "gone"): 0.9,
    ("a", "synthetic", "A DOG"): 0.7,
    ("b", "synthetic", "a hound"): 0.2,
}


@pytest.fixture
def books(tmp_path: Path) -> Inputs:
    """The files of one finished round."""
    tables = [
        filled(DOWNLOAD, rows, source=source, status="success")
        for rows, source in zip(DOWNLOADS, ("web", "human"), strict=True)
    ]
    names = ["row_id", "sample_id", "source"]
    sources = [filled(SOURCES, table.select(names).to_pylist()) for table in tables]
    scores = [
        {"pair_id": pair_id(*pair), "itm_score": score, "status": "success"}
        for pair, score in SCORED.items()
    ]
    tied = [{"sample_id": s, "cluster_id": "a" if s in "ab" else s} for s in "abde"]
    inputs: Inputs = {
        "sources": write_shards(tmp_path, "sources", sources),
        "download": write_shards(tmp_path, "download", tables),
        "captions": write_shards(tmp_path, "captions", [filled(CAPTIONS, CAPTIONED)]),
    }
    read = inputs | {
        "scores": write_shards(tmp_path, "scores", [filled(SCORES, scores)]),
        "clusters": write_shards(tmp_path, "clusters", [filled(CLUSTERS, tied)]),
        "tombstones": write_shards(tmp_path, "gone", [pa.table({"sample_id": ["e"]})]),
    }
    shards = ["000000", "000001"]
    SelectStage(SelectConfig(), shards).run(read, tmp_path, LocalContext())
    inputs |= {"rows": [tmp_path / "rows.parquet"], "pairs": [tmp_path / "pairs.parquet"]}
    tars = [tmp_path / f"{shard}.tar" for shard in shards]
    for tar, table in zip(tars, tables, strict=True):
        tar.write_bytes(write_tar(table))
    images = {"pairs": inputs["pairs"], "images": tars}
    AssembleStage(AssembleConfig(), shards).run(images, tmp_path, LocalContext())
    return inputs | {"index": [tmp_path / "index.parquet"]}


def test_a_whole_round_balances(books: Inputs, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    LedgerStage().run(books, tmp_path / "out", LocalContext())
    table = pq.read_table(tmp_path / "out" / "ledger.parquet")
    assert table.schema == LEDGER
    found = [tuple(row.values()) for row in table.to_pylist()]
    assert found == [
        ("rows", "human", "downloaded", 2),
        ("rows", "web", "downloaded", 3),
        ("rows", "web", "duplicate_row", 1),
        ("rows", "web", "http_4xx", 1),
        ("rows", "web", "removed", 1),
        ("pairs", "human", "kept", 2),
        ("pairs", "synthetic", "duplicate", 1),
        ("pairs", "synthetic", "failed", 1),
        ("pairs", "synthetic", "rejected", 1),
        ("pairs", "web", "kept", 1),
        ("pairs", "web", "merged", 1),
        ("pairs", "web", "rejected", 1),
        ("pairs", "web", "removed", 1),
    ]


def test_a_raw_round_without_captions_or_index_balances(books: Inputs, tmp_path: Path) -> None:
    raw = {name: books[name] for name in ("sources", "download")}
    SelectStage(SelectConfig(), ["000000", "000001"]).run(raw, tmp_path, LocalContext())
    del books["captions"], books["index"]
    table = balance(books)
    assert pc.sum(table["count"]).as_py() == 8 + 6


def without(row: int) -> Callable[[pa.Table], pa.Table]:
    return lambda table: pa.concat_tables([table.slice(0, row), table.slice(row + 1)])


def again(row: int) -> Callable[[pa.Table], pa.Table]:
    return lambda table: pa.concat_tables([table, table.slice(row, 1)])


def changed(row: int, **values: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        rows[row] |= values
        return pa.Table.from_pylist(rows, schema=table.schema)

    return change


MERGED = f"pair_id {pair_id('b', 'web', 'a big dog')}"


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("rows", without(3), "rows: expected 8, found 7: 1 missing, first row_id r3"),
        ("rows", again(3), "rows: expected 8, found 9: 1 found twice, first row_id r3"),
        (
            "rows",
            changed(3, row_id="x"),
            "1 missing, first row_id r3; 1 unexpected, first row_id x",
        ),
        ("rows", changed(3, state=None), "1 without a final state, first row_id r3: None is not"),
        ("rows", changed(3, state="lost"), "first row_id r3: 'lost' is not one of downloaded, "),
        ("rows", changed(3, state="downloaded"), "r3 ended as 'downloaded' though download says"),
        ("rows", changed(0, state="timeout"), "r0 ended as 'timeout' though download says 'succe"),
        ("sources", again(2), "expected 9, found 8: 1 in twice, first row_id r2"),
        ("download", without(3), "download: expected 8, found 7: 1 missing, first row_id r3"),
        ("pairs", again(0), "pairs: expected 9, found 10: 1 found twice, first pair_id "),
        ("pairs", without(0), "pairs: expected 9, found 8: 1 missing, first pair_id "),
        ("pairs", changed(0, state="success"), "'success' is not one of kept, merged, "),
        ("captions", without(2), "pairs: expected 8, found 9: 1 unexpected, first pair_id "),
        ("captions", changed(0, text="new"), "1 missing, first pair_id "),
        ("index", without(0), "training index: expected 4, found 3: 1 missing, first pair_id "),
        ("index", again(0), "training index: expected 4, found 5: 1 found twice"),
    ],
)
def test_what_went_missing_is_named(
    books: Inputs, name: str, spoil: Callable[[pa.Table], pa.Table], message: str
) -> None:
    pq.write_table(spoil(pq.read_table(books[name][0])), books[name][0])
    with pytest.raises(LedgerError) as raised:
        balance(books)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("carrier", [None, "d"])
def test_a_merged_text_needs_a_sample_that_keeps_one(books: Inputs, carrier: str | None) -> None:
    pairs = pq.read_table(books["pairs"][0])
    merged = pairs["state"].to_pylist().index("merged")
    pq.write_table(changed(merged, carried_by=carrier)(pairs), books["pairs"][0])
    with pytest.raises(LedgerError, match=f"{MERGED} is merged onto sample {carrier}"):
        balance(books)


def test_an_empty_round_balances(tmp_path: Path) -> None:
    assert balance({name: [] for name in ("sources", "download", "rows", "pairs")}).num_rows == 0
