"""DuckDB over Parquet files: of these only what a question asks for is read, and what does not fit
in memory lies on disk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow as pa


def database(scratch: Path) -> duckdb.DuckDBPyConnection:
    """An empty one, which fetches no extension; what does not fit in memory goes to ``scratch``."""
    settings: dict[str, str | bool | int | float | list[str]] = {
        "autoinstall_known_extensions": False,
        "temp_directory": str(scratch / "spilled"),
    }
    return duckdb.connect(str(scratch / "tables.duckdb"), config=settings)


def add_view(
    connection: duckdb.DuckDBPyConnection,
    name: str,
    files: Sequence[Path],
    schema: pa.Schema,
    columns: Sequence[str],
) -> None:
    """The named columns of all the files as a view; an empty one where there are no files."""
    if not files:
        kinds = pa.schema([schema.field(column) for column in columns])
        connection.register(name, kinds.empty_table())
        return
    # A folder named shard=000001 is no column.
    table = connection.read_parquet(
        [unglobbed(str(file)) for file in files], hive_partitioning=False
    )
    table.project(", ".join(columns)).create_view(name)


def unglobbed(path: str) -> str:
    """A path that DuckDB takes as it stands, were there ``*`` or ``[`` in a folder's name."""
    return re.sub(r"([*?\[])", r"[\1]", path)
