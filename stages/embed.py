"""Embed: each image as a unit vector, by which dedup compares pictures."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from stages.base import Resources, ShardStage
from stages.inference import InferenceConfig, batches, from_rows, open_model
from stages.models.embedder import Embedder
from stages.schemas import EMBEDDINGS, IMAGES, check


class EmbedConfig(InferenceConfig):
    """The embedder: CLIP, or a BLIP model's contrastive head. Frozen for the whole run, so that
    old and new embeddings compare."""

    batch_size: int = Field(32, ge=1)


class EmbedStage(ShardStage):
    """IMAGES → EMBEDDINGS: one row an image, in order; ``embedding`` has the model's length.

    Status ``failed``: the image cannot be decoded, or its embedding is zero or not finite.
    """

    name = "embed"
    version = 1
    input_schema = IMAGES
    output_schema = EMBEDDINGS

    def __init__(self, config: EmbedConfig) -> None:
        self.config = config

    @property
    def resources(self) -> Resources:
        return self.config.resources

    def setup(self) -> None:
        opened = open_model(self.name, self.config)
        self._weights = opened.weights
        self._embedder = Embedder(opened.folder, opened.device, batch_size=self.config.batch_size)

    def process(self, table: pa.Table) -> pa.Table:
        table = check(table, IMAGES, "embed input")
        broken: dict[int, str] = {}
        vectors: dict[int, npt.NDArray[np.float16]] = {}
        for batch in batches(table, self.config.batch_size, broken):
            for row, vector in zip(
                batch.rows, self._embedder.embed_images(batch.images), strict=True
            ):
                if np.isfinite(vector).all() and vector.any():
                    vectors[row] = vector
                else:
                    broken[row] = "embedding is zero or not finite"
        rows: list[dict[str, object]] = []
        for row, sample in enumerate(table["sample_id"].to_pylist()):
            known = {"sample_id": sample, "model": self._weights}
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
