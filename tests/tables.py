"""Small tables of a given schema, and their Parquet files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def filled(schema: pa.Schema, rows: Sequence[Mapping[str, Any]], **defaults: Any) -> pa.Table:
    """Rows with ``defaults``, then null, in the columns that they leave out."""
    unknown = {name for row in rows for name in row} - set(schema.names)
    assert not unknown, f"no such columns: {unknown}"
    whole = [dict.fromkeys(schema.names) | defaults | dict(row) for row in rows]
    return pa.Table.from_pylist(whole, schema=schema)


def write_shards(folder: Path, name: str, tables: Sequence[pa.Table]) -> list[Path]:
    """One Parquet file a table, named and sorted by shard."""
    files = []
    for number, table in enumerate(tables):
        files.append(folder / f"{name}-{number:06d}.parquet")
        pq.write_table(table, files[-1])
    return files
