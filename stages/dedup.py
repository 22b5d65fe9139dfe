"""Which images show the same picture: three nets, and the clusters they tie.

    exact       equal sha256 of the bytes
    perceptual  close 256-bit DCT hashes, and embeddings that agree (hashes alone collide)
    semantic    close embeddings

Only web images take part: human pairs are trusted. The search is exhaustive over distinct files;
it looks at one block of embeddings against one other at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from stages.base import Config, Context, DatasetStage, read_table
from stages.errors import RunError
from stages.schemas import CLUSTERS, DOWNLOAD, EMBEDDINGS, check

NETS = ("exact", "perceptual", "semantic")
_EXACT, _PERCEPTUAL, _SEMANTIC, _NO_NET = range(4)

_BLOCK = 2048
"""Rows of a tile. Fixed, so that float sums never depend on a setting; a tile takes 16 MiB."""

Rows = npt.NDArray[np.int64]


class DedupConfig(Config):
    """When two images are the same picture.

    Of the labelled pairs of real photos that the defaults were read from, ``same_picture`` lie at
    a Hamming distance of 0 to 44 (one at 92), and ``different`` pairs at 86 or more.
    """

    perceptual_distance: int = Field(32, ge=0, le=256)
    """At most so many of the 256 bits of two perceptual hashes may differ."""
    perceptual_cosine: float = Field(0.9, ge=-1, le=1)
    """Perceptual closeness counts only where the embeddings' cosine is at least this."""
    semantic_cosine: float = Field(0.97, ge=-1, le=1)
    """A cosine of at least this is enough alone."""


class DedupStage(DatasetStage):
    """Inputs ``download`` (DOWNLOAD) and ``embeddings`` (EMBEDDINGS, may be no files); writes
    ``clusters.parquet`` (CLUSTERS), one row for each downloaded web sample, by sample_id.

    An image without a usable embedding (failed, not finite, or zero) is only tied by its bytes.
    The result does not depend on the order of files or rows.

    Raises:
        RunError: embeddings of different lengths or models, which cannot be compared.
    """

    name = "dedup"
    version = 1

    def __init__(self, config: DedupConfig) -> None:
        self.config = config

    def run(self, inputs: Mapping[str, Sequence[Path]], output_dir: Path, ctx: Context) -> None:
        images = load_images(inputs["download"], inputs.get("embeddings", ()))
        clusters = find_clusters(images, self.config, ctx)
        pq.write_table(check(clusters, CLUSTERS, "dedup"), output_dir / "clusters.parquet")


@dataclass(frozen=True)
class Images:
    """What is compared, one entry an image, ascending by sample_id."""

    sample_ids: pa.Array
    sha256: pa.Array
    phash: npt.NDArray[np.uint64]
    """(n, 4): 256 bits; zeros where ``hashed`` is false."""
    hashed: npt.NDArray[np.bool_]
    embeddings: npt.NDArray[np.float16]
    """(n, d), as stored; zeros where ``embedded`` is false."""
    embedded: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.sample_ids)


def load_images(download: Sequence[Path], embeddings: Sequence[Path]) -> Images:
    """The downloaded web images of a round. Of a sample that two shards hold, the smallest sha256
    and the smallest phash count, so that the order of shards does not."""
    table = read_table(download, DOWNLOAD, ["sample_id", "source", "status", "sha256", "phash"])
    wanted = pc.and_(pc.equal(table["source"], "web"), pc.equal(table["status"], "success"))
    table = (
        table.filter(wanted).group_by("sample_id").aggregate([("sha256", "min"), ("phash", "min")])
    )
    table = table.sort_by("sample_id").combine_chunks()
    hashes = table["phash_min"].combine_chunks()
    sample_ids = table["sample_id"].combine_chunks()
    vectors, embedded = _load_embeddings(embeddings, sample_ids)
    return Images(
        sample_ids,
        table["sha256_min"].combine_chunks(),
        _bits(hashes),
        np.asarray(hashes.is_valid()),
        vectors,
        embedded,
    )


def _bits(hashes: pa.Array) -> npt.NDArray[np.uint64]:
    """256-bit hashes in hex as (n, 4) words; null becomes zeros."""
    hexadecimal = "".join(hashes.fill_null("0" * 64).to_pylist())
    return np.frombuffer(bytes.fromhex(hexadecimal), dtype=np.uint64).reshape(len(hashes), 4)


def _load_embeddings(
    files: Sequence[Path], sample_ids: pa.Array
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_]]:
    """(n, d) vectors in the order of ``sample_ids``, and which rows hold a usable one."""
    vectors = np.zeros((len(sample_ids), 0), dtype=np.float16)
    embedded = np.zeros(len(sample_ids), dtype=np.bool_)
    models: set[str | None] = set()
    for file in files:
        table = read_table([file], EMBEDDINGS, ["sample_id", "embedding", "status", "model"])
        known = pc.is_in(table["sample_id"], value_set=sample_ids)
        table = table.filter(pc.and_(known, pc.equal(table["status"], "success")))
        if not len(table):
            continue
        models.update(table["model"].unique().to_pylist())
        block = _matrix(table["embedding"].combine_chunks(), file)
        if vectors.shape[1] == 0:
            vectors = np.zeros((len(sample_ids), block.shape[1]), dtype=np.float16)
        if len(models) > 1 or block.shape[1] != vectors.shape[1]:
            raise RunError(
                f"dedup: {file}: embeddings of another model or length (models "
                f"{sorted(map(str, models))}, lengths {vectors.shape[1]} and {block.shape[1]}) "
                "cannot be compared; embed every shard with one model"
            )
        rows = pc.index_in(table["sample_id"], value_set=sample_ids).to_numpy()
        norms = np.linalg.norm(block.astype(np.float32), axis=1)
        usable = np.isfinite(norms) & (norms > 0)
        vectors[rows[usable]] = block[usable]
        embedded[rows[usable]] = True
    return vectors, embedded


def _matrix(column: pa.Array, file: Path) -> npt.NDArray[np.float16]:
    """A list column as (n, d)."""
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) != 1 or not lengths[0]:
        raise RunError(f"dedup: {file}: embeddings of different lengths {lengths} in one file")
    flat: npt.NDArray[np.float16] = column.flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float16, copy=False).reshape(len(column), lengths[0])


class UnionFind:
    """Disjoint sets over 0 … n-1, joined many edges at a time; a set's root is its smallest."""

    def __init__(self, size: int) -> None:
        self._parent = np.arange(size, dtype=np.int64)

    def roots(self, items: Rows) -> Rows:
        found: Rows = self._parent[items]
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                self._parent[items] = found
                return found
            found = above

    def union(self, left: Rows, right: Rows) -> None:
        while True:
            a, b = self.roots(left), self.roots(right)
            apart = a != b
            if not apart.any():
                return
            left, right, a, b = left[apart], right[apart], a[apart], b[apart]
            # Hanging the larger root below the smaller one never makes a cycle.
            np.minimum.at(self._parent, np.maximum(a, b), np.minimum(a, b))


@dataclass(frozen=True)
class Edges:
    """Pairs of images that one net ties: rows ``left`` < ``right``."""

    net: int
    left: Rows
    right: Rows


def find_clusters(images: Images, config: DedupConfig, ctx: Context) -> pa.Table:
    """A CLUSTERS table: connected components of all that the nets tie."""
    joined = UnionFind(len(images))
    first_net = np.full(len(images), _NO_NET, dtype=np.int8)

    def tie(edges: Edges) -> None:
        joined.union(edges.left, edges.right)
        for side in (edges.left, edges.right):
            np.minimum.at(first_net, side, np.int8(edges.net))

    exact = exact_edges(images)
    tie(exact)
    # Copies of one file are compared once: 10,000 copies must not cost 100 million comparisons.
    embedded = np.flatnonzero(images.embedded)
    _, first = np.unique(joined.roots(embedded), return_index=True)
    distinct = np.sort(embedded[first])
    for edges in close_edges(images, distinct, config, ctx):
        tie(edges)
    root = joined.roots(np.arange(len(images)))
    return pa.table(
        {
            "sample_id": images.sample_ids,
            "cluster_id": images.sample_ids.take(pa.array(root)),
            "net": pa.array([*NETS, None], pa.string()).take(pa.array(first_net)),
            "similarity": _similarities(images, root, distinct, exact),
        }
    )


def exact_edges(images: Images) -> Edges:
    """Each image tied to the first one with the same bytes."""
    codes = images.sha256.dictionary_encode().indices.fill_null(-1).to_numpy()
    rows = np.flatnonzero(codes >= 0)
    _, first, group = np.unique(codes[rows], return_index=True, return_inverse=True)
    left = rows[first[group]]
    copies = left != rows
    return Edges(_EXACT, left[copies], rows[copies])


def close_edges(images: Images, rows: Rows, config: DedupConfig, ctx: Context) -> Iterator[Edges]:
    """Perceptual and semantic ties among ``rows``, every pair of them looked at once.

    Since perceptual closeness needs the embeddings to agree, the Hamming distance is taken only of
    pairs whose cosine reaches ``perceptual_cosine``.
    """
    floor = min(config.semantic_cosine, config.perceptual_cosine)
    for start in range(0, len(rows), _BLOCK):
        ctx.progress("comparing images", start, len(rows))
        across = rows[start : start + _BLOCK]
        unit = _unit(images.embeddings[across])
        for other in range(start, len(rows), _BLOCK):
            down = rows[other : other + _BLOCK]
            cosines = unit @ _unit(images.embeddings[down]).T
            a, b = np.nonzero(cosines >= floor)
            once = across[a] < down[b]  # matters in the tiles on the diagonal only
            left, right, cosine = across[a[once]], down[b[once]], cosines[a[once], b[once]]
            near = _perceptually_close(images, left, right, config)
            near &= cosine >= config.perceptual_cosine
            far = cosine >= config.semantic_cosine
            yield Edges(_PERCEPTUAL, left[near], right[near])
            yield Edges(_SEMANTIC, left[far], right[far])


def _perceptually_close(
    images: Images, left: Rows, right: Rows, config: DedupConfig
) -> npt.NDArray[np.bool_]:
    both: npt.NDArray[np.bool_] = images.hashed[left] & images.hashed[right]
    bits = np.bitwise_count(images.phash[left] ^ images.phash[right]).sum(axis=1, dtype=np.int64)
    close: npt.NDArray[np.bool_] = both & (bits <= config.perceptual_distance)
    return close


def _unit(vectors: npt.NDArray[np.float16]) -> npt.NDArray[np.float32]:
    """Rows scaled to length 1 in float32: half precision leaves them up to 0.1% off."""
    wide = vectors.astype(np.float32)
    scaled: npt.NDArray[np.float32] = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    return scaled


def _similarities(images: Images, root: Rows, distinct: Rows, exact: Edges) -> pa.Array:
    """Cosine of each image to its nearest neighbour in its cluster; 1 for copies of a file."""
    found = np.full(len(images), np.nan, dtype=np.float32)
    order = distinct[np.argsort(root[distinct], kind="stable")]
    for members in np.split(order, np.flatnonzero(np.diff(root[order])) + 1):
        for start in range(0, len(members) if len(members) > 1 else 0, _BLOCK):
            rows = members[start : start + _BLOCK]
            for other in range(0, len(members), _BLOCK):
                columns = members[other : other + _BLOCK]
                cosines = _unit(images.embeddings[rows]) @ _unit(images.embeddings[columns]).T
                cosines[rows[:, None] == columns[None, :]] = -np.inf
                found[rows] = np.fmax(found[rows], cosines.max(axis=1))
    found[exact.left] = found[exact.right] = 1.0
    return pa.array(np.clip(found, -1.0, 1.0), pa.float32(), mask=np.isnan(found))
