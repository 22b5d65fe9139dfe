"""Repeats found on disk."""

from __future__ import annotations

from pathlib import Path

from stages import ids
from stages.schemas import SOURCES
from stages.seen import SeenPairs, mark_repeats
from tests.tables import filled, write_shards


def rows(*texts: str, start: int = 0) -> list[dict[str, str]]:
    return [
        {"row_id": ids.row_id("f", start + n), "sample_id": "s", "source": "web", "text": text}
        for n, text in enumerate(texts)
    ]


def test_the_first_row_of_a_pair_is_remembered(tmp_path: Path) -> None:
    earlier = filled(SOURCES, rows("a", "b"))
    (file,) = write_shards(tmp_path, "s", [earlier])
    with SeenPairs() as seen:
        seen.read([file])
        table = mark_repeats(filled(SOURCES, rows("c", "b", "c", "d", start=2)), seen, SOURCES)
        again = mark_repeats(filled(SOURCES, rows("d", start=9)), seen, SOURCES)
    first = [ids.row_id("f", 1), ids.row_id("f", 2)]
    assert table["repeat_of"].to_pylist() == [None, first[0], first[1], None]
    assert again["repeat_of"].to_pylist() == [ids.row_id("f", 5)]
    assert table.schema.equals(SOURCES)


def test_repeats_of_earlier_shards_are_not_learnt(tmp_path: Path) -> None:
    marked = rows("a")[0] | {"repeat_of": ids.row_id("f", 7)}
    (file,) = write_shards(tmp_path, "s", [filled(SOURCES, [marked])])
    with SeenPairs() as seen:
        seen.read([file])
        assert seen.first_rows([ids.pair_id("s", "web", "a")], [ids.row_id("f", 3)]) == [
            ids.row_id("f", 3)
        ]
