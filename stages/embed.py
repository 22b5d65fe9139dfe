"""Embed: each image as a unit vector, by which dedup compares pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from stages.inference import InferenceConfig, ModelStage, Opened, from_rows
from stages.schemas import EMBEDDINGS, IMAGES, check

if TYPE_CHECKING:
    from torch import Tensor

    from stages.models.embedder import Embedder


class EmbedConfig(InferenceConfig):
    """The embedder: CLIP, or a BLIP model's contrastive head. Frozen for the whole run, so that
    old and new embeddings compare."""

    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 32


class EmbedStage(ModelStage[EmbedConfig, "Embedder"]):
    """IMAGES → EMBEDDINGS: one row an image, in order; ``embedding`` has the model's length.

    Status ``failed``: the image cannot be decoded, or its embedding is zero or not finite.
    """

    name = "embed"
    version = 3
    input_schema = IMAGES
    output_schema = EMBEDDINGS

    def load(self, opened: Opened) -> Embedder:
        from stages.models.embedder import Embedder

        return Embedder(*opened.arguments)

    def trial(self, pixels: Tensor) -> object:
        return self.model.embed_images(pixels)

    def process(self, table: pa.Table) -> pa.Table:
        table = check(table, IMAGES, "embed input")
        broken: dict[int, str] = {}
        vectors: dict[int, npt.NDArray[np.float16]] = {}
        for batch in self.batches(table, broken):
            for row, vector in zip(batch.rows, self.model.embed_images(batch.pixels), strict=True):
                if np.isfinite(vector).all() and vector.any():
                    vectors[row] = vector
                else:
                    broken[row] = "embedding is zero or not finite"
        rows: list[dict[str, object]] = []
        for row, sample in enumerate(table["sample_id"].to_pylist()):
            known = {"sample_id": sample, "model": self.weights}
            if row in broken:
                rows.append(known | {"status": "failed", "detail": broken[row]})
            else:
                rows.append(known | {"status": "success", "embedding": vectors[row]})
        return from_rows(rows, EMBEDDINGS)

    def failed(self, table: pa.Table, status: str, detail: str) -> pa.Table:
        return from_rows(
            [
                {"sample_id": sample, "status": status, "detail": detail}
                for sample in table["sample_id"].to_pylist()
            ],
            EMBEDDINGS,
        )
