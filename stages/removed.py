"""What must not be used again, and how a stage's tables keep to it."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from stages.base import ShardStage

STATUS = "removed"
_DETAIL = "must not be used again (capfilt forget)"
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
        gone = pc.is_in(table["sample_id"], pa.array(sorted(self.samples), pa.string()))
        output = stage.process(table.filter(pc.invert(gone)))
        if stage.name != "download":
            return output
        refused = stage.failed(table.filter(gone), STATUS, _DETAIL)
        whole = pa.concat_tables([self._without_hashes(output), refused])
        return whole.take(pc.index_in(table["row_id"], whole["row_id"].combine_chunks()))

    def _without_hashes(self, output: pa.Table) -> pa.Table:
        """Downloaded rows whose bytes turn out to be removed lose the image."""
        gone = pc.is_in(output["sha256"], pa.array(sorted(self.hashes), pa.string()))
        gone = pc.fill_null(gone, False)
        replaced = {"status": STATUS, "detail": _DETAIL, **dict.fromkeys(_OF_THE_IMAGE)}
        for name, value in replaced.items():
            index = output.schema.get_field_index(name)
            field = output.schema.field(index)
            column = pc.if_else(gone, pa.scalar(value, field.type), output[name])
            output = output.set_column(index, field, column)
        return output
