"""Caption: synthetic texts for each image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from stages.inference import InferenceConfig, ModelStage, Opened, from_rows
from stages.models.config import GenerationConfig
from stages.schemas import CAPTIONS, IMAGES, check

if TYPE_CHECKING:
    from torch import Tensor

    from stages.models.captioner import Captioner


class CaptionConfig(InferenceConfig):
    """The captioner and how it decodes."""

    generation: GenerationConfig = GenerationConfig()


class CaptionStage(ModelStage[CaptionConfig, "Captioner"]):
    """IMAGES → CAPTIONS: ``captions_per_image`` rows an image, in order.

    An image that cannot be decoded, and a caption without a word or from logits that are not
    finite, gives rows with status ``failed``. The noise of a caption hangs on the image's sha256,
    so the same file gets the same captions wherever it lies.
    """

    name = "caption"
    version = 4
    input_schema = IMAGES
    output_schema = CAPTIONS

    def load(self, opened: Opened) -> Captioner:
        from stages.models.captioner import Captioner

        return Captioner(*opened.arguments)

    def trial(self, pixels: Tensor) -> object:
        longest = {"min_tokens": self.config.generation.max_tokens}
        generation = self.config.generation.model_copy(update=longest)
        return self.model(pixels, [b""] * len(pixels), generation)

    def process(self, table: pa.Table) -> pa.Table:
        table = check(table, IMAGES, "caption input")
        keys = [bytes.fromhex(sha256) for sha256 in table["sha256"].to_pylist()]
        broken: dict[int, str] = {}
        written: dict[int, list[str | None]] = {}
        for batch in self.batches(table, broken):
            batch_keys = [keys[row] for row in batch.rows]
            texts = self.model(batch.pixels, batch_keys, self.config.generation)
            written.update(zip(batch.rows, texts, strict=True))
        rows: list[dict[str, object]] = []
        for row, sample in enumerate(table["sample_id"].to_pylist()):
            if row in broken:
                rows += self._failures(sample, "failed", broken[row])
            else:
                rows += [self._row(sample, i, text) for i, text in enumerate(written[row])]
        return from_rows(rows, CAPTIONS)

    def failed(self, table: pa.Table, status: str, detail: str) -> pa.Table:
        samples = table["sample_id"].to_pylist()
        return from_rows(
            [row for sample in samples for row in self._failures(sample, status, detail)], CAPTIONS
        )

    def _row(self, sample: str, index: int, text: str | None) -> dict[str, Any]:
        known = {"sample_id": sample, "caption_index": index, "model": self.weights}
        if text is None:
            return known | {"status": "failed", "detail": "scores are not finite"}
        if not text.strip():
            return known | {"status": "failed", "detail": "empty text"}
        return known | {"text": text, "status": "success"}

    def _failures(self, sample: str, status: str, detail: str) -> list[dict[str, object]]:
        return [
            {"sample_id": sample, "caption_index": index, "status": status, "detail": detail}
            for index in range(self.config.generation.captions_per_image)
        ]
