"""What becomes of every row and every pair: thresholds, clusters and tombstones, no model.

A pair's state follows from three questions, asked in turn:

1. Does it stand on its own? (removed, failed, quarantined, rejected, or good)
2. Which image of its cluster survives? The one whose best good pair matches best.
3. Does the survivor already carry this text? (kept, merged, or duplicate)
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from stages.base import Config, Context, DatasetStage, WholeRoundConfig, read_table
from stages.ids import failed_caption_id, pair_id
from stages.models.text import clean_caption
from stages.schemas import (
    CAPTIONS,
    CLUSTERS,
    CONTAMINATED,
    DOWNLOAD,
    PAIRS,
    ROWS,
    SCORES,
    SOURCES,
    TEXTS,
    check,
)


class TextRules(Config):
    """Web texts that are rejected whatever their score. All off by default."""

    min_words: int = Field(0, ge=0)
    max_words: int | None = Field(None, ge=1)
    min_letters: float = Field(0.0, ge=0, le=1)
    """Letters among the characters that are not spaces."""
    max_repetition: float = Field(1.0, ge=0, le=1)
    """Words that the text has said before."""
    boilerplate: bool = True
    """Whether file names and placeholders pass."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes (639-3 where there is none) of languages that pass; empty: all. Needs
    ``ingest.language``: a text whose language was not identified is rejected."""
    min_language_score: float = Field(0.0, ge=0, le=1)
    """How sure it must be that a text is in its language; short texts rarely come near 1."""

    @field_validator("languages")
    @classmethod
    def _codes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for code in value:
            if not re.fullmatch("[a-z]{2,3}", code):
                raise ValueError(f"{code!r} must be a language's code, e.g. en, de, zh")
        return value


class SelectConfig(WholeRoundConfig):
    """Which pairs are good enough to train on. The ``resources`` are also those of the ledger,
    which goes through all that select does."""

    threshold: float = Field(0.5, ge=0, le=1)
    """Web texts whose ITM score lies below are rejected; 0 turns the filter off."""
    synthetic_threshold: float = Field(0.5, ge=0, le=1)
    """The same for synthetic texts. A filter passes near misses more readily than gross ones, so
    texts of a weak captioner may want a stricter one."""
    keep: Literal["web", "synthetic", "both"] = "both"
    """Which texts of web images may be kept at all; for ablations."""
    text_cap: int | None = Field(None, ge=1)
    """At most so many images keep the same text of one source, web or synthetic, case, digits and
    punctuation aside: those that it matches best. None: any number."""
    texts: TextRules = TextRules()


class SelectStage(DatasetStage):
    """Every source row and every pair, each with its one final state.

    Inputs: ``sources`` and ``download``, a file a shard, in the order of ``shards``; in rounds
    with models also ``captions`` and ``scores``; ``clusters``, ``contaminated`` and ``tombstones``
    (tables with a ``sample_id``) where there are any. Without scores, every text that is not empty
    is good. A cluster with a contaminated image is contaminated as a whole.

    Writes ``rows.parquet`` (ROWS, in source order), ``pairs.parquet`` (PAIRS, by shard and
    sample) and ``texts.parquet`` (TEXTS), the thousand texts that most images share. A pair that
    several rows or shards repeat is one pair. Human pairs are kept unless contaminated, unfiltered
    and never merged. A caption that could not be written is a pair without text, its id from
    `failed_caption_id`.
    """

    name = "select"
    version = 3

    def __init__(self, config: SelectConfig, shards: Sequence[str]) -> None:
        self.config = config
        self.shards = tuple(shards)

    def run(self, inputs: Mapping[str, Sequence[Path]], output_dir: Path, ctx: Context) -> None:
        # No extension is ever fetched: everything here is in DuckDB itself.
        settings: dict[str, str | bool | int | float | list[str]] = {
            "autoinstall_known_extensions": False
        }
        with duckdb.connect(":memory:", config=settings) as connection:
            self._register(connection, inputs)
            rows = connection.sql(_ROWS).to_arrow_table()
            connection.register("pairs", name_pairs(connection.sql(_PAIRS).to_arrow_table()))
            rules = {
                "web": self.config.threshold,
                "synthetic": self.config.synthetic_threshold,
                "keep": self.config.keep,
                "scored": bool(inputs.get("scores")),
            }
            connection.execute(_PLAIN, self.config.texts.model_dump())
            connection.execute(_ALONE, rules)
            connection.execute(_CAPPED, {"cap": self.config.text_cap})
            texts = connection.sql(_TEXTS).to_arrow_table()
            connection.execute(_CAP)
            connection.execute(_SURVIVORS)
            pairs = connection.sql(_FINAL).to_arrow_table()
        pq.write_table(check(rows, ROWS, "select"), output_dir / "rows.parquet")
        pq.write_table(check(pairs, PAIRS, "select"), output_dir / "pairs.parquet")
        pq.write_table(check(texts, TEXTS, "select"), output_dir / "texts.parquet")

    def _register(
        self, connection: duckdb.DuckDBPyConnection, inputs: Mapping[str, Sequence[Path]]
    ) -> None:
        """The inputs as tables of the same names; ``position`` orders their rows as they came."""
        for name, (schema, columns) in _READS.items():
            files = inputs.get(name, ())
            by_shard = name in {"sources", "download"}
            shards = self.shards if by_shard else [""] * len(files)
            tables = [
                table.append_column("shard", pa.repeat(shard, len(table)))
                for shard, file in zip(shards, files, strict=True)
                for table in [read_table([file], schema, columns)]
            ]
            empty = read_table([], schema, columns).append_column(
                "shard", pa.array([], pa.string())
            )
            table = pa.concat_tables([empty, *tables])
            position = pa.array(np.arange(len(table)))
            connection.register(name, table.append_column("position", position))


def name_pairs(pairs: pa.Table) -> pa.Table:
    """``pairs`` with ``pair_id``; ``cleaned``, the text as the models see it, null for none; and
    ``normal``, in which texts that differ in case, digits or punctuation are one."""
    columns = (pairs[name].to_pylist() for name in ("sample_id", "source", "text", "caption_index"))
    identities = [
        failed_caption_id(sample, index) if text is None else pair_id(sample, source, text)
        for sample, source, text, index in zip(*columns, strict=True)
    ]
    cleaned = [None if text is None else clean_caption(text) for text in pairs["text"].to_pylist()]
    named = pairs.append_column("pair_id", pa.array(identities, pa.string()))
    normal = [None if text is None else normal_form(text) for text in cleaned]
    named = named.append_column("cleaned", pa.array(cleaned, pa.string()))
    return named.append_column("normal", pa.array(normal, pa.string()))


def normal_form(text: str) -> str:
    """``text``'s letters, case folded, in words: "Photo #12 of 40!" and "photo of" are alike. A
    text without a letter stands for itself."""
    letters = "".join(c if c.isalpha() or unicodedata.combining(c) else " " for c in text)
    return " ".join(letters.casefold().split()) or text


_READS: Mapping[str, tuple[pa.Schema, tuple[str, ...]]] = {
    "sources": (
        SOURCES,
        (
            *("row_id", "sample_id", "source", "text", "retry_of", "repeat_of"),
            *("text_words", "text_letters", "text_repetition", "text_boilerplate"),
            *("text_language", "text_language_score"),
        ),
    ),
    "download": (
        DOWNLOAD,
        (
            *("row_id", "sample_id", "source", "url", "text", "status"),
            *("original_width", "original_height"),
        ),
    ),
    "captions": (CAPTIONS, ("sample_id", "caption_index", "text", "status", "detail")),
    "scores": (SCORES, ("pair_id", "itm_score", "itc_score", "status", "detail")),
    "clusters": (CLUSTERS, ("sample_id", "cluster_id")),
    "contaminated": (CONTAMINATED, ("sample_id", "collides_with")),
    "tombstones": (pa.schema([SOURCES.field("sample_id")]), ("sample_id",)),
}

_ROWS = """
SELECT s.row_id, s.sample_id, s.shard,
    CASE WHEN s.sample_id IN (SELECT sample_id FROM tombstones) THEN 'removed'
         WHEN d.status = 'success' THEN 'downloaded'
         WHEN s.row_id IN (SELECT retry_of FROM sources WHERE retry_of IS NOT NULL) THEN 'retried'
         ELSE d.status END AS state
FROM sources s LEFT JOIN download d USING (row_id)
ORDER BY s.position
"""

_PAIRS = """
WITH texts AS (
    SELECT sample_id, source, coalesce(text, '') AS text, NULL::INT AS caption_index,
        status, NULL AS detail, position
    FROM download WHERE status = 'success'
    UNION ALL
    SELECT sample_id, 'synthetic', CASE status WHEN 'success' THEN coalesce(text, '') END,
        CASE WHEN status <> 'success' THEN caption_index END, status, detail, position
    FROM captions
)
SELECT sample_id, source, text, caption_index,
    arg_min(status, position) AS status, arg_min(detail, position) AS detail
FROM texts GROUP BY sample_id, source, text, caption_index
"""

# Figures of texts: a function of the text, so that any of its rows will do.
_PLAIN = """
CREATE TEMP TABLE plain AS
SELECT sample_id, text, any_value(reason) AS reason FROM (
    SELECT sample_id, text, CASE
        WHEN text_words < $min_words THEN 'fewer words than select.texts.min_words'
        WHEN text_words > $max_words THEN 'more words than select.texts.max_words'
        WHEN text_letters < $min_letters::FLOAT THEN 'fewer letters than select.texts.min_letters'
        WHEN text_repetition > $max_repetition::FLOAT
            THEN 'more repetition than select.texts.max_repetition'
        WHEN text_boilerplate AND NOT $boilerplate THEN 'boilerplate'
        WHEN len($languages::VARCHAR[]) > 0 AND text_language IS NULL
            THEN 'language not identified'
        WHEN len($languages::VARCHAR[]) > 0
            AND NOT list_contains($languages::VARCHAR[], text_language)
            THEN text_language || ' is none of select.texts.languages'
        WHEN text_language_score < $min_language_score::FLOAT
            THEN 'language less sure than select.texts.min_language_score' END AS reason
    FROM sources WHERE source = 'web' AND repeat_of IS NULL
) WHERE reason IS NOT NULL GROUP BY sample_id, text
"""

_ALONE = """
CREATE TEMP TABLE alone AS
WITH images AS (
    SELECT sample_id, arg_min(shard, position) AS shard, arg_min(url, position) AS url,
        max(original_width::BIGINT * original_height) AS pixels
    FROM download WHERE status = 'success' GROUP BY sample_id
), scored AS (
    SELECT * FROM scores
    QUALIFY row_number() OVER (PARTITION BY pair_id ORDER BY status <> 'success', position) = 1
), leaks AS (
    -- Of a sample, or of one that shows the same picture.
    SELECT coalesce(c.sample_id, b.sample_id) AS sample_id, min(b.collides_with) AS collides_with
    FROM (
        SELECT l.sample_id, l.collides_with, c.cluster_id
        FROM contaminated l LEFT JOIN clusters c USING (sample_id)
    ) b LEFT JOIN clusters c USING (cluster_id) GROUP BY ALL
), verdicts AS (
    SELECT p.* EXCLUDE (status, detail), i.shard, i.url, i.pixels, s.itm_score, s.itc_score,
        CASE WHEN source <> 'human' THEN coalesce(c.cluster_id, p.sample_id) END AS cluster_id,
        CASE
            WHEN p.sample_id IN (SELECT sample_id FROM tombstones) THEN ['removed']
            WHEN l.collides_with IS NOT NULL THEN ['contaminated', l.collides_with]
            WHEN p.text IS NULL THEN [p.status, p.detail]
            WHEN p.cleaned = '' THEN ['failed', 'empty text']
            WHEN source = 'human' THEN ['good']
            WHEN $keep NOT IN (source, 'both') THEN ['rejected', 'select.keep is ' || $keep]
            WHEN t.reason IS NOT NULL THEN ['rejected', t.reason]
            WHEN NOT $scored THEN ['good']
            WHEN s.pair_id IS NULL THEN ['failed', 'not scored']
            WHEN s.status <> 'success' THEN [s.status, s.detail]
            -- To DuckDB, NaN is above every number.
            WHEN s.itm_score IS NULL OR isnan(s.itm_score) THEN ['failed', 'score is not a number']
            WHEN s.itm_score < if(source = 'web', $web, $synthetic)::FLOAT THEN ['rejected']
            ELSE ['good']
        END AS verdict
    FROM pairs p
    LEFT JOIN images i USING (sample_id)
    LEFT JOIN scored s USING (pair_id)
    LEFT JOIN clusters c USING (sample_id)
    LEFT JOIN leaks l USING (sample_id)
    LEFT JOIN plain t ON p.source = 'web' AND p.sample_id = t.sample_id AND p.text = t.text
)
SELECT * EXCLUDE verdict, verdict[1] AS state, verdict[2] AS detail FROM verdicts
"""

# Images count, not files: copies of one picture share a cluster, and a turn.
_CAPPED = """
CREATE TEMP TABLE capped AS
WITH turns AS (
    SELECT pair_id, min(place) OVER (PARTITION BY source, normal, cluster_id) AS place
    FROM (
        SELECT pair_id, source, normal, cluster_id, row_number() OVER (
            PARTITION BY source, normal ORDER BY itm_score DESC NULLS LAST, pair_id
        ) AS place
        FROM alone WHERE state = 'good' AND source <> 'human'
    )
), ranked AS (
    SELECT pair_id, dense_rank() OVER (PARTITION BY source, normal ORDER BY place) AS turn
    FROM turns JOIN alone USING (pair_id)
)
SELECT pair_id FROM ranked WHERE $cap IS NOT NULL AND turn > $cap
"""

_CAP = """
UPDATE alone SET state = 'rejected', detail = 'more images than select.text_cap have such a text'
WHERE pair_id IN (SELECT pair_id FROM capped)
"""

MOST_TEXTS = 1000
"""Rows of the table of shared texts: the most shared."""

_TEXTS = f"""
SELECT normal AS text, source, count(DISTINCT sample_id) AS images,
    count(*) FILTER (state = 'good') AS good,
    count(*) FILTER (pair_id IN (SELECT pair_id FROM capped)) AS capped
FROM alone WHERE source <> 'human' AND normal <> ''
GROUP BY normal, source HAVING count(DISTINCT sample_id) > 1
ORDER BY images DESC, text, source LIMIT {MOST_TEXTS}
"""

_SURVIVORS = """
CREATE TEMP TABLE survivors AS
WITH best AS (
    SELECT cluster_id, sample_id, max(itm_score) AS itm_score, max(pixels) AS pixels
    FROM alone WHERE state = 'good' AND source <> 'human' GROUP BY cluster_id, sample_id
)
SELECT cluster_id, sample_id AS survivor FROM best
QUALIFY row_number() OVER (
    PARTITION BY cluster_id
    ORDER BY itm_score DESC NULLS LAST, pixels DESC NULLS LAST, sample_id
) = 1
"""

# A survivor's own text wins over the same text of another member; then the better score does.
_FINAL = """
WITH carried AS (
    SELECT a.*, v.survivor,
        row_number() OVER (
            PARTITION BY v.survivor, a.cleaned, v.survivor IS NULL
            ORDER BY a.sample_id <> v.survivor, a.itm_score DESC NULLS LAST,
                a.source DESC, a.pair_id
        ) AS turn
    FROM alone a LEFT JOIN survivors v ON a.cluster_id = v.cluster_id AND a.state = 'good'
)
SELECT pair_id, sample_id, source, text, itm_score, itc_score,
    CASE WHEN survivor IS NULL THEN replace(state, 'good', 'kept')
         WHEN turn > 1 THEN 'duplicate'
         WHEN sample_id = survivor THEN 'kept'
         ELSE 'merged' END AS state,
    CASE WHEN sample_id <> survivor THEN survivor END AS carried_by,
    cluster_id, url, shard, detail
FROM carried ORDER BY shard, sample_id, source, pair_id
"""
