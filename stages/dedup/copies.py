"""Copies: which images share one captioning and one scoring, before either is done.

The first image of each picture is captioned for all of them; first by shard, so that images which
arrive later never change who leads. The texts of all are scored with one image, in the shards that
arrived together: so neither do they change what an earlier shard has scored.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.base import Context, DatasetStage
from stages.database import database
from stages.dedup.config import SharingConfig
from stages.dedup.hashes import within
from stages.dedup.images import Rows, load_images
from stages.dedup.ties import pair_cosines
from stages.schemas import DEDUP, SHARED, check

_SPAN = 256
"""So many images at most have their texts scored with one of them: the texts of a placeholder
picture that is everywhere must not all meet in one worker."""


class CopiesStage(DatasetStage):
    """Inputs: ``download`` (DOWNLOAD), a file a shard, in the order of ``shards``; for the
    perceptual net ``embeddings`` (EMBEDDINGS); ``tombstones`` where there are any.

    Writes ``shard=<shard>-<16 hex digits of its content>.parquet`` (SHARED) for each shard with an
    image that shares, and ``copies.parquet`` (DEDUP), how much work that spares. A picture is what
    has equal pixels. For the perceptual net an image also goes with the first image of a close
    hash (its own or another), if that one leads and their embeddings agree: what hashes cannot
    tell apart, embeddings must, and no chain joins unlike images.
    """

    name = "copies"
    version = 1

    def __init__(self, config: SharingConfig, shards: Sequence[str]) -> None:
        self.config = config
        self.shards = tuple(shards)

    def run(self, inputs: Mapping[str, Sequence[Path]], output_dir: Path, ctx: Context) -> None:
        with tempfile.TemporaryDirectory() as scratch, database(Path(scratch)) as connection:
            self._register(connection, inputs)
            connection.execute(_OCCURRENCES)
            pictures = connection.sql(_PICTURES).to_arrow_table()
            leads = np.arange(len(pictures))
            if self.config.perceptual_distance is not None:
                leads = self._alike(pictures, inputs, ctx, Path(scratch))
            picture = pictures["picture"]
            led = {"picture": picture, "lead": picture.take(pa.array(leads))}
            connection.register("led", pa.table(led))
            connection.execute(_MEMBERS, {"span": _SPAN})
            for shard, rows in _by_shard(connection.sql(_SHARED).to_arrow_table()):
                name = f"shard={shard}-{content(rows)}.parquet"
                pq.write_table(check(rows, SHARED, "copies"), output_dir / name)
            facts = connection.sql(_FACTS).to_arrow_table()
        pq.write_table(check(facts, DEDUP, "copies"), output_dir / "copies.parquet")

    def _register(
        self, connection: duckdb.DuckDBPyConnection, inputs: Mapping[str, Sequence[Path]]
    ) -> None:
        files = [str(file) for file in inputs["download"]]
        cohorts = [bisect_right(self.config.cohorts, shard) for shard in self.shards]
        connection.register(
            "shards", pa.table({"filename": files, "shard": self.shards, "cohort": cohorts})
        )
        connection.read_parquet(files, filename=True).create_view("download")
        gone = [str(file) for file in inputs.get("tombstones", ())]
        if gone:
            connection.read_parquet(gone).create_view("tombstones")
        else:
            connection.register("tombstones", pa.table({"sample_id": pa.array([], pa.string())}))

    def _alike(
        self,
        pictures: pa.Table,
        inputs: Mapping[str, Sequence[Path]],
        ctx: Context,
        scratch: Path,
    ) -> Rows:
        """Of each picture, in order, the one it goes with: an earlier one or itself."""
        distance, cosine = self.config.perceptual_distance, self.config.perceptual_cosine
        assert distance is not None
        images = load_images(inputs["download"], inputs.get("embeddings", ()), scratch)
        rows = pc.index_in(pictures["sample_id"], value_set=images.sample_ids)
        rows = rows.to_numpy().astype(np.int64)
        usable = images.hashed & (images.embedded if cosine is not None else True)
        places = np.flatnonzero(usable[rows])
        packed = np.ascontiguousarray(images.phash[rows[places]])
        found = [np.zeros((0, 2), dtype=np.int64)]
        for left, right in _candidates(packed, distance, ctx):
            pairs = np.stack([places[right], places[left]], axis=1)[left < right]
            if cosine is not None:
                near = pair_cosines(images.vectors, rows[pairs[:, 1]], rows[pairs[:, 0]]) >= cosine
                pairs = pairs[near]
            found.append(pairs)
        leads = np.arange(len(pictures))
        for place, lead in np.unique(np.concatenate(found), axis=0):
            if leads[place] == place and leads[lead] == lead:
                leads[place] = lead
        return leads


def _candidates(
    packed: np.typing.NDArray[np.uint8], distance: int, ctx: Context
) -> Iterator[tuple[Rows, Rows]]:
    """(left, right) indices of (n, 32) hashes: of each hash the first image, against the images of
    the same hash, then of each that is close. All of one hash with all of another would be too
    many where pictures of one colour abound."""
    if not len(packed):
        return
    _, first, group = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    group = group.reshape(-1)
    yield first[group], np.arange(len(packed))
    members = np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])
    for pair in within(packed[first], np.arange(len(first)), distance, ctx):
        for one, other in (pair[:2], pair[1::-1]):
            if len(one):
                led = [members[hash_] for hash_ in other]
                yield np.repeat(first[one], [len(m) for m in led]), np.concatenate(led)


def _by_shard(shared: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """(shard, its SHARED rows) of a table sorted by ``shard``."""
    start = 0
    for counted in pc.value_counts(shared["shard"]).to_pylist():  # in the order of appearance
        rows = shared.slice(start, counted["counts"]).drop_columns(["shard"])
        start += len(rows)
        yield counted["values"], rows


def content(rows: pa.Table) -> str:
    """Hash of a table's rows: what Parquet makes of them may change with its version."""
    state = hashlib.sha256()
    for row in rows.to_pylist():
        state.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return state.hexdigest()[:16]


# One row an image of a shard: a sample that two shards hold may show two pictures.
_OCCURRENCES = """
CREATE TABLE occurrences AS
SELECT shard, any_value(cohort) AS cohort, sample_id,
    coalesce(min(pixel_sha256), min(sha256), shard || '/' || sample_id) AS picture
FROM download JOIN shards USING (filename)
WHERE source = 'web' AND status = 'success'
    AND sample_id NOT IN (SELECT sample_id FROM tombstones WHERE sample_id IS NOT NULL)
GROUP BY shard, sample_id
"""

_PICTURES = """
WITH firsts AS (
    SELECT picture, min((shard, sample_id)) AS first FROM occurrences GROUP BY picture
)
SELECT picture, first[2] AS sample_id FROM firsts ORDER BY first
"""

_MEMBERS = """
CREATE TABLE members AS
WITH placed AS (
    SELECT shard, cohort, sample_id, lead,
        (row_number() OVER (PARTITION BY lead, cohort ORDER BY shard, sample_id) - 1) // $span
            AS turn
    FROM occurrences JOIN led USING (picture)
)
SELECT shard, sample_id, lead,
    first_value((shard, sample_id)) OVER (PARTITION BY lead ORDER BY shard, sample_id) AS leader,
    first_value((shard, sample_id))
        OVER (PARTITION BY lead, cohort, turn ORDER BY shard, sample_id) AS scorer
FROM placed
"""

_SHARED = """
SELECT shard, sample_id, NULL AS text, leader[2] AS captioned_as,
    CASE WHEN scorer <> (shard, sample_id) THEN scorer[2] END AS scored_with
FROM members WHERE leader <> (shard, sample_id)
UNION ALL
SELECT DISTINCT scorer[1], sample_id, coalesce(text, ''), leader[2], scorer[2]
FROM members JOIN (
    SELECT shard, sample_id, text FROM download JOIN shards USING (filename)
    WHERE source = 'web' AND status = 'success'
) USING (shard, sample_id)
WHERE scorer <> (shard, sample_id)
ORDER BY ALL
"""

_FACTS = """
SELECT 'before_caption' AS net, unnest(['images', 'captioned', 'scored']) AS metric,
    unnest([
        count(*),
        count(*) FILTER (leader = (shard, sample_id)),
        count(*) FILTER (scorer = (shard, sample_id))
    ])::DOUBLE AS value
FROM members
"""
