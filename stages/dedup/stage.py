"""Dedup: the nets one after the other, their clusters, and what the search measured of itself."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.base import Context, DatasetStage, read_table
from stages.dedup.clusters import Parted, guarded
from stages.dedup.config import DedupConfig
from stages.dedup.contamination import check_share, contaminated, read_evaluation
from stages.dedup.hashes import close_hashes, first_of_equals
from stages.dedup.images import Images, Mask, load_images
from stages.dedup.search import Measured, close_pairs
from stages.dedup.ties import Ties, UnionFind
from stages.schemas import CLUSTERS, CONTAMINATED, DEDUP, check

if TYPE_CHECKING:
    from stages.keeper import ImageConfig

NETS = ("exact", "perceptual", "semantic")
_EXACT, _PERCEPTUAL, _SEMANTIC, _NO_NET = range(4)

EVALUATION = "evaluation:"
"""Inputs of this prefix are evaluation sets, named by what follows."""


class DedupStage(DatasetStage):
    """Inputs ``download`` (DOWNLOAD) and ``embeddings`` (EMBEDDINGS, may be no files); where there
    are any, ``earlier`` (CLUSTERS of an earlier round, made by this very config: its images are
    not compared with one another again), ``embedder`` (a model folder) and evaluation sets.

    Writes ``clusters.parquet`` (CLUSTERS), one row for each downloaded web sample, by sample_id;
    ``contaminated.parquet`` (CONTAMINATED); and ``dedup.parquet`` (DEDUP), what was measured.

    An image without a usable embedding (failed, not finite, or zero) is only tied by its bytes or
    pixels. Where two shards hold different images of one sample, the first counts; else the result
    does not depend on the order of files or rows, nor ever on how the work is spread.

    Raises:
        RunError: embeddings of different lengths or models, which cannot be compared; or too
            little recall.
        ConfigError: most images collide with evaluation sets.
    """

    name = "dedup"
    version = 5

    def __init__(self, config: DedupConfig, images: ImageConfig) -> None:
        """``images`` is how the run's images were decoded; evaluation sets are decoded alike."""
        self.config = config
        self.images = images

    def run(self, inputs: Mapping[str, Sequence[Path]], output_dir: Path, ctx: Context) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            images = load_images(inputs["download"], inputs.get("embeddings", ()), Path(scratch))
            earlier = read_table(inputs.get("earlier", ()), CLUSTERS, CLUSTERS.names)
            clusters, measured = find_clusters(images, earlier, self.config, ctx, Path(scratch))
            collisions = self._contaminated(inputs, images, Path(scratch), ctx)
        facts = {**measured, ("contamination", "images"): float(len(collisions))}
        rows = [(net, metric, value) for (net, metric), value in facts.items()]
        table = pa.table(dict(zip(DEDUP.names, zip(*rows, strict=True), strict=True)), DEDUP)
        pq.write_table(check(clusters, CLUSTERS, "dedup"), output_dir / "clusters.parquet")
        pq.write_table(
            check(collisions, CONTAMINATED, "dedup"), output_dir / "contaminated.parquet"
        )
        pq.write_table(table, output_dir / "dedup.parquet")

    def _contaminated(
        self, inputs: Mapping[str, Sequence[Path]], web: Images, scratch: Path, ctx: Context
    ) -> pa.Table:
        sets = {
            name.removeprefix(EVALUATION): files[0]
            for name, files in inputs.items()
            if name.startswith(EVALUATION)
        }
        embedder = next(iter(inputs.get("embedder", ())), None)
        evaluation = read_evaluation(sets, embedder, self.images, web.vectors.width)
        kinds = [web]
        if sets:
            embeddings = inputs.get("embeddings", ())
            kinds.append(load_images(inputs["download"], embeddings, scratch, "human"))
        found = contaminated(inputs["download"], kinds, evaluation, self.config, ctx)
        check_share(inputs["download"], found, self.config.max_contaminated)
        return found


Facts = dict[tuple[str, str], float]
"""(net, metric) → value."""


class _Joined:
    """What is known of every image while net after net is thrown."""

    def __init__(self, size: int) -> None:
        self.sets = UnionFind(size)
        self.net = np.full(size, _NO_NET, dtype=np.int8)
        self.hamming = np.full(size, np.inf, dtype=np.float32)
        self.cosine = np.full(size, -np.inf, dtype=np.float32)

    def tie(self, ties: Ties, net: int) -> None:
        self.sets.union(ties.left, ties.right)
        self.net[ties.rows] = np.minimum(self.net[ties.rows], net)
        if net == _PERCEPTUAL:
            np.minimum.at(self.hamming, ties.rows, -ties.nearest)
        elif net == _SEMANTIC:
            np.maximum.at(self.cosine, ties.rows, ties.nearest)


def find_clusters(
    images: Images, earlier: pa.Table, config: DedupConfig, ctx: Context, scratch: Path
) -> tuple[pa.Table, Facts]:
    """A CLUSTERS table: connected components of all that the nets tie, chains cut; and figures."""
    joined = _Joined(len(images))
    fresh = _take_over(joined, images, earlier)
    copy_of = _tie_copies(joined, images)
    # Copies of one file are compared once: 10,000 copies must not cost 100 million comparisons.
    rows = np.flatnonzero(images.embedded | images.hashed)
    lead = _leaders(copy_of, rows, images.embedded)
    perceptual, agreeing = close_hashes(images, lead, fresh, config, ctx)
    joined.tie(perceptual, _PERCEPTUAL)
    np.maximum.at(joined.cosine, agreeing.rows, agreeing.nearest)
    distinct = lead[images.embedded[lead]]
    measured = Measured(len(distinct))
    if config.semantic_cosine is not None:
        ties, measured = close_pairs(
            images.vectors, distinct, fresh, config.semantic_cosine, config.search, ctx, scratch
        )
        joined.tie(ties, _SEMANTIC)
    chains = joined.sets.roots(np.arange(len(images)))
    parted = guarded(images.vectors, distinct, chains, config.guard)
    _follow(parted.root, copy_of, lead)
    facts = _facts(images, fresh, copy_of, perceptual, measured, parted)
    # Copies have one hash: which of them was compared must not show.
    np.minimum.at(joined.hamming, copy_of, joined.hamming)
    joined.hamming = joined.hamming[copy_of]
    return _table(images, joined, copy_of, chains, parted), facts


def _take_over(joined: _Joined, images: Images, earlier: pa.Table) -> Mask:
    """Tie what an earlier round tied. Returns which images it did not know."""
    known = pc.is_in(earlier["sample_id"], value_set=images.sample_ids)
    earlier = earlier.filter(known).combine_chunks()
    rows = pc.index_in(earlier["sample_id"], value_set=images.sample_ids).to_numpy()
    rows = rows.astype(np.int64)
    first = first_of_equals(earlier["chain_id"].combine_chunks())
    joined.sets.union(rows[first], rows)
    nets = pc.index_in(earlier["net"], value_set=pa.array(NETS)).fill_null(_NO_NET)
    joined.net[rows] = nets.to_numpy()
    joined.hamming[rows] = pc.cast(earlier["hamming"], pa.float32()).fill_null(np.inf).to_numpy()
    joined.cosine[rows] = earlier["similarity"].fill_null(-np.inf).to_numpy()
    fresh = np.ones(len(images), dtype=np.bool_)
    fresh[rows] = False
    return fresh


def _tie_copies(joined: _Joined, images: Images) -> npt.NDArray[np.int64]:
    """Tie equal files and equal pixels; returns of each row the first row that it equals."""
    copies = UnionFind(len(images))
    every = np.arange(len(images))
    for hashes in (images.sha256, images.pixels):
        first = first_of_equals(hashes)
        copies.union(first, every)
    copy_of = copies.roots(every)
    again = np.flatnonzero(copy_of != every)
    joined.sets.union(copy_of[again], again)
    for side in (copy_of[again], again):
        joined.net[side] = _EXACT
        joined.cosine[side] = 1.0
    return copy_of


def _leaders(
    copy_of: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], embedded: Mask
) -> npt.NDArray[np.int64]:
    """One of ``rows`` for each distinct picture, with an embedding where any copy has one."""
    order = np.lexsort((rows, ~embedded[rows], copy_of[rows]))
    _, first = np.unique(copy_of[rows][order], return_index=True)
    return np.sort(rows[order][first])


def _follow(
    root: npt.NDArray[np.int64], copy_of: npt.NDArray[np.int64], lead: npt.NDArray[np.int64]
) -> None:
    """Copies go where the one that was compared went; then the root is the smallest again."""
    spoken = np.full(len(root), -1)
    spoken[copy_of[lead]] = root[lead]
    has = spoken[copy_of] >= 0
    root[has] = spoken[copy_of[has]]
    smallest = np.full(len(root), len(root))
    np.minimum.at(smallest, root, np.arange(len(root)))
    root[:] = smallest[root]


def _facts(
    images: Images,
    fresh: Mask,
    copy_of: npt.NDArray[np.int64],
    perceptual: Ties,
    measured: Measured,
    parted: Parted,
) -> Facts:
    sizes = np.bincount(parted.root, minlength=1)
    widest = parted.widest_root
    return {
        ("exact", "copies"): float((copy_of != np.arange(len(images))).sum()),
        ("perceptual", "pairs"): float(perceptual.pairs),
        **{("semantic", name): float(value) for name, value in asdict(measured).items()},
        ("clusters", "images"): float(len(images)),
        ("clusters", "new_images"): float(fresh.sum()),
        ("clusters", "of_two_or_more"): float((sizes > 1).sum()),
        ("clusters", "largest"): float(sizes.max(initial=0)),
        ("clusters", "chains_cut"): float(parted.parted),
        ("clusters", "widest_cosine"): parted.widest,
        ("clusters", "widest_size"): 0.0 if widest is None else float(sizes[parted.root[widest]]),
    }


def _table(
    images: Images,
    joined: _Joined,
    copy_of: npt.NDArray[np.int64],
    chains: npt.NDArray[np.int64],
    parted: Parted,
) -> pa.Table:
    ids = images.sample_ids
    counts = np.bincount(copy_of, minlength=len(images))
    single = counts[copy_of] == 1
    return pa.table(
        {
            "sample_id": ids,
            "cluster_id": ids.take(pa.array(parted.root)),
            "chain_id": ids.take(pa.array(chains)),
            "net": pa.array([*NETS, None], pa.string()).take(pa.array(joined.net)),
            "copy_of": ids.take(pa.array(copy_of, mask=single)),
            "hamming": pa.array(
                np.where(np.isfinite(joined.hamming), joined.hamming, 0).astype(np.int16),
                mask=~np.isfinite(joined.hamming),
            ),
            "similarity": pa.array(
                np.clip(joined.cosine, -1.0, 1.0), pa.float32(), mask=~np.isfinite(joined.cosine)
            ),
        }
    )
