"""What stages read with."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.base import read_tables


def test_tables_have_the_columns_that_were_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "table.parquet"
    pq.write_table(pa.table({"a": [1], "b": [2], "c": [3]}), file)
    (table,) = read_tables([file], ["b", "a"])
    assert table.to_pydict() == {"b": [2], "a": [1]}
    assert table.column_names == ["b", "a"]
    with pytest.raises(KeyError, match="nope"):
        list(read_tables([file], ["a", "nope"]))
