"""Which (image, text) pairs earlier rows had: on disk, so that memory does not grow with them."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa

from stages import ids
from stages.base import batches

_CACHE_KB = 2 * 1024  # small, so that memory is the same after a thousand rows and a billion
_COLUMNS = ("row_id", "sample_id", "source", "text", "repeat_of")


class SeenPairs:
    """Pair id → row_id of the first row that has it. A scratch file, gone with the object."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="capfilt-seen-")
        self._base = sqlite3.connect(Path(self._folder.name) / "pairs.db", isolation_level=None)
        # Nothing here outlives the process, so nothing needs to reach the disk in order.
        for setting in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{_CACHE_KB}"):
            self._base.execute(f"PRAGMA {setting}")
        self._base.execute("CREATE TABLE seen (pair BLOB PRIMARY KEY, row BLOB) WITHOUT ROWID")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._base.close()
        self._folder.cleanup()

    def read(self, files: Iterable[Path]) -> None:
        """Learn the rows of shards cut earlier."""
        for table in batches(files, _COLUMNS):
            rows = zip(*(table[name].to_pylist() for name in _COLUMNS), strict=True)
            first = [(row, ids.pair_id(*pair)) for row, *pair, repeat in rows if repeat is None]
            self.first_rows([pair for _, pair in first], [row for row, _ in first])

    def first_rows(self, pairs: Sequence[str], rows: Sequence[str]) -> list[str]:
        """For each pair the first row that ever had it, which may be its own; both in hex."""
        keys = [bytes.fromhex(pair) for pair in pairs]
        self._base.execute("BEGIN")
        self._base.executemany(
            "INSERT OR IGNORE INTO seen VALUES (?, ?)",
            zip(keys, map(bytes.fromhex, rows), strict=True),
        )
        self._base.execute("COMMIT")
        ask = "SELECT row FROM seen WHERE pair = ?"
        return [self._base.execute(ask, (key,)).fetchone()[0].hex() for key in keys]


def mark_repeats(table: pa.Table, seen: SeenPairs, schema: pa.Schema) -> pa.Table:
    """``table`` (SOURCES) with ``repeat_of`` filled."""
    names = ("row_id", "sample_id", "source", "text")
    row_ids, samples, sources, texts = (table[name].to_pylist() for name in names)
    pairs = [ids.pair_id(*pair) for pair in zip(samples, sources, texts, strict=True)]
    first = seen.first_rows(pairs, row_ids)
    repeats = [None if one == row else one for one, row in zip(first, row_ids, strict=True)]
    index = table.schema.get_field_index("repeat_of")
    return table.set_column(index, schema.field("repeat_of"), pa.array(repeats, pa.string()))
