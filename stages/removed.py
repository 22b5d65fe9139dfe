"""What must not be used again, and how a stage's tables keep to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from stages.base import ShardStage

STATUS = "removed"
DETAIL = "must not be used again (capfilt forget)"
_OF_THE_IMAGE = ("sha256", "phash", "pixel_sha256", "width", "height", "image")


@dataclass(frozen=True)
class Removed:
    """Tombstones: samples by id, and images by the sha256 of their bytes, whatever their URL."""

    samples: frozenset[str] = frozenset()
    hashes: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.samples or self.hashes)

    def process(self, stage: ShardStage, table: pa.Table) -> pa.Table:
        """``stage.process`` of the rows that may be used. Download answers for the others too,
        without asking for them: it owes a row for each row."""
        if not self:
            return stage.process(table)
        gone = among(table["sample_id"], self.samples)
        output = stage.process(table.filter(pc.invert(gone)))
        if stage.name != "download":
            return output
        refused = stage.failed(table.filter(gone), STATUS, DETAIL)
        whole = pa.concat_tables([self._without_hashes(output), refused])
        return whole.take(pc.index_in(table["row_id"], whole["row_id"].combine_chunks()))

    def _without_hashes(self, output: pa.Table) -> pa.Table:
        """Downloaded rows whose bytes turn out to be removed lose the image."""
        gone = among(output["sha256"], self.hashes)
        values = {"status": STATUS, "detail": DETAIL, **dict.fromkeys(_OF_THE_IMAGE)}
        return replaced(output, gone, values)


def among(column: pa.ChunkedArray, values: frozenset[str]) -> pa.ChunkedArray:
    """(rows,) bool: whether a string is one of ``values``; false for null."""
    return pc.is_in(column, pa.array(sorted(values), pa.string()))


def replaced(table: pa.Table, rows: pa.ChunkedArray, values: Mapping[str, str | None]) -> pa.Table:
    """``table`` with column → value in the given rows (bool)."""
    for name, value in values.items():
        index = table.schema.get_field_index(name)
        field = table.schema.field(index)
        column = pc.if_else(rows, pa.scalar(value, field.type), table[name])
        table = table.set_column(index, field, column)
    return table
