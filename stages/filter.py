"""Filter: how well each text matches its image. Scores only; `stages.select` decides."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from pydantic import Field

from stages.ids import pair_id
from stages.inference import InferenceConfig, ModelStage, Opened, from_rows
from stages.schemas import IMAGES_WITH_TEXTS, SCORES, check

if TYPE_CHECKING:
    from torch import Tensor

    from stages.models.matcher import Matcher

Row = dict[str, Any]


class FilterConfig(InferenceConfig):
    """The matcher."""

    max_tokens: int = Field(35, ge=3)
    """[CLS] and [SEP] counted; what is longer is cut (35: models/blip_retrieval.py)."""


class FilterStage(ModelStage[FilterConfig, "Matcher"]):
    """IMAGES_WITH_TEXTS → SCORES: one row a text, image by image, in order. Equal texts are scored
    once an image; each of their owners gets the score.

    Status ``failed``, without scores: the texts of an image that cannot be decoded, and a text of
    which cleaning (`clean_caption`) leaves nothing that the model reads.
    """

    name = "filter"
    version = 4
    input_schema = IMAGES_WITH_TEXTS
    output_schema = SCORES

    def load(self, opened: Opened) -> Matcher:
        from stages.models.matcher import Matcher

        return Matcher(*opened.arguments, max_tokens=self.config.max_tokens)

    def trial(self, pixels: Tensor) -> object:
        return self.model.match(pixels, [["a " * self.config.max_tokens] * 2] * len(pixels))

    def process(self, table: pa.Table) -> pa.Table:
        table = check(table, IMAGES_WITH_TEXTS, "filter input")
        given = [list(dict.fromkeys(texts)) for texts in table["texts"].to_pylist()]
        flat = list(dict.fromkeys(text for texts in given for text in texts))
        kept = dict(zip(flat, self.model.has_tokens(flat), strict=True))
        wanted = [[text for text in texts if kept[text]] for texts in given]
        broken: dict[int, str] = {}
        scores: dict[int, dict[str, tuple[float, float]]] = {}
        for batch in self.batches(table, broken):
            texts = [wanted[row] for row in batch.rows]
            for row, own, found in zip(
                batch.rows, texts, self.model.match(batch.pixels, texts), strict=True
            ):
                scores[row] = dict(zip(own, found, strict=True))
        rows = []
        for row, pair in _pairs(table):
            if row in broken:
                rows.append(pair | {"status": "failed", "detail": broken[row]})
            else:
                rows.append(pair | self._scored(scores[row].get(pair["text"])))
        return from_rows(rows, SCORES)

    def _scored(self, score: tuple[float, float] | None) -> Row:
        if score is None:
            return {"status": "failed", "detail": "empty text", "model": self.weights}
        if not all(map(math.isfinite, score)):
            detail = "score is not a number"
            return {"status": "failed", "detail": detail, "model": self.weights}
        itm, itc = score
        return {"itm_score": itm, "itc_score": itc, "status": "success", "model": self.weights}

    def failed(self, table: pa.Table, status: str, detail: str) -> pa.Table:
        reason = {"status": status, "detail": detail}
        return from_rows([pair | reason for _, pair in _pairs(table)], SCORES)


def _pairs(table: pa.Table) -> Iterator[tuple[int, Row]]:
    """Every text of every image as (row of the image, the columns that name the pair)."""
    columns = (table[name].to_pylist() for name in ("owners", "sources", "texts"))
    for row, of_image in enumerate(zip(*columns, strict=True)):
        for sample, source, text in zip(*of_image, strict=True):
            name = pair_id(sample, source, text)
            yield row, {"pair_id": name, "sample_id": sample, "source": source, "text": text}
