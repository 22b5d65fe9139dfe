"""Pairs of images whose embeddings are close: every pair of a few, or cell by cell of many.

Many images are parted into cells by k-means, and an image is compared with the members of its own
cell and of each cell whose border is near. Let r be the distance of two unit vectors at the least
cosine that counts, r² = 2 - 2 cos. The border of two cells lies halfway between their centres; a
close pair that it parts has one image within r/2 of it. So images are compared across borders
within ``reach`` * r/2: with a reach of 1 no pair can be missed, and since a pair's difference
seldom points straight across, a small one misses few. How few is measured in every run.

Both steps see the embeddings in the first principal components of a sample only. A projection
never lengthens a distance, so what is farther apart than r there is no close pair (no pair is lost
by this); what is not is then looked at in full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from stages.base import Context
from stages.dedup.cells import Cells, part
from stages.dedup.config import SearchConfig
from stages.dedup.images import Mask, Rows, Vectors
from stages.dedup.ties import Ties, above, gathered, verified
from stages.errors import RunError

T = TypeVar("T")

_BLOCK = 2048
"""Rows of a tile. Fixed, so that float sums never depend on a setting; a tile takes 16 MiB."""
_TASKS = 64
"""Parts of a search that run side by side, at most."""
_FEW = 8
"""So few are done before workers for them have started."""
_SLACK = 1e-5


@dataclass(frozen=True)
class Measured:
    """How a search went."""

    images: int
    cells: int = 0
    """0: every pair was looked at."""
    dimensions: int = 0
    """Principal components in which images were compared first."""
    probes: float = 0.0
    """Cells that an image was compared with, on average, its own included."""
    reach: float = 1.0
    sampled: int = 0
    """Images that were compared with all others."""
    sampled_pairs: int = 0
    """Close pairs that this found: what recall is a share of."""
    recall: float = 1.0
    precision: float = 1.0


def close_pairs(
    vectors: Vectors,
    rows: Rows,
    fresh: Mask,
    cosine: float,
    config: SearchConfig,
    ctx: Context,
    scratch: Path,
    watch: Mask | None = None,
) -> tuple[Ties, Measured]:
    """What ties those of ``rows`` whose cosine is at least ``cosine``.

    Args:
        fresh: of all rows of ``vectors``, which are new: two that are not are never compared.
        watch: rows of which every pair is returned as such, for a caller that wants to see them.

    Raises:
        RunError: too few pairs were found and ``max_reach`` allows no more.
    """
    new, old = rows[fresh[rows]], rows[~fresh[rows]]
    seen = np.zeros(vectors.rows, dtype=np.bool_) if watch is None else watch
    if len(rows) <= config.exhaustive_below:
        ties = every_pair(vectors, new, old, cosine, ctx, seen, config.gpus)
        return ties, Measured(len(rows), sampled=len(new), sampled_pairs=ties.pairs)
    if not len(new):
        return Ties.none(), Measured(len(rows))
    return _by_cells(vectors, rows, fresh, cosine, config, ctx, scratch, seen)


def every_pair(
    vectors: Vectors,
    new: Rows,
    old: Rows,
    cosine: float,
    ctx: Context,
    watch: Mask,
    gpus: float = 0.0,
) -> Ties:
    """Ties among ``new`` and between ``new`` and ``old``, one tile against one other at a time."""
    ordered = np.concatenate([new, old])

    device = "cuda" if gpus else "cpu"

    def across(start: int) -> Ties:
        found = []
        left = ordered[start : min(start + _BLOCK, len(new))]
        a = vectors.read(left)
        for other in range(start, len(ordered), _BLOCK):
            right = ordered[other : other + _BLOCK]
            # A GPU rounds otherwise: what is near the threshold there is looked at here.
            floor = cosine - _SLACK if gpus else cosine
            i, j, cosines = above(a, vectors.read(right), floor, device)
            once = start + i < other + j
            pairs = left[i[once]], right[j[once]]
            if gpus:
                found.append(verified(vectors, *pairs, cosine, watch))
            else:
                found.append(Ties.of(*pairs, cosines[once], watch))
        return gathered(found)

    starts = range(0, len(new), _BLOCK)
    return gathered(spread(ctx, "comparing images", across, starts, [vectors.file], gpus))


def _by_cells(
    vectors: Vectors,
    rows: Rows,
    fresh: Mask,
    cosine: float,
    config: SearchConfig,
    ctx: Context,
    scratch: Path,
    watch: Mask,
) -> tuple[Ties, Measured]:
    candidates = rows[fresh[rows]]
    chosen = np.random.default_rng(1).choice(
        candidates, min(config.sample, len(candidates)), replace=False
    )
    sample = np.zeros(vectors.rows, dtype=np.bool_)
    sample[chosen] = True
    ctx.progress("parting images into cells", 0, len(rows))
    cells = part(vectors, rows, cosine, config.cells, scratch)
    truth = _sampled(cells, np.sort(chosen), fresh, ctx, config)
    reach = min(config.reach, config.max_reach)
    while True:
        probes = cells.assign(reach, ctx)
        ties = _within_cells(cells, fresh, sample | watch, ctx, config)
        found = ties.incident(sample)
        right = len(np.intersect1d(found, truth, assume_unique=True))
        measured = Measured(
            images=len(rows),
            cells=cells.count,
            dimensions=cells.dimensions,
            probes=probes,
            reach=reach,
            sampled=len(chosen),
            sampled_pairs=len(truth),
            recall=right / len(truth) if len(truth) else 1.0,
            precision=right / len(found) if len(found) else 1.0,
        )
        if measured.recall >= config.recall:
            return ties, measured
        if reach >= config.max_reach:
            raise RunError(
                f"dedup: of {len(truth)} close pairs of {len(chosen)} sampled images the search "
                f"found {measured.recall:.4f}, less than dedup.search.recall ({config.recall}), "
                f"at a reach of {reach:g}; raise dedup.search.max_reach (up to 1)"
            )
        reach = min(1.5 * reach, config.max_reach)


def _sampled(cells: Cells, chosen: Rows, fresh: Mask, ctx: Context, config: SearchConfig) -> Rows:
    """Keys (`Ties.incident`) of all close pairs of the chosen rows, compared with every row."""
    watch = np.zeros(cells.vectors.rows, dtype=np.bool_)
    watch[chosen] = True
    at, count = np.searchsorted(cells.rows, chosen), len(cells.rows)

    def against(start: int) -> Ties:
        every = np.arange(start, min(start + 16 * _BLOCK, count))
        rows = cells.rows[every]
        found = []
        for first in range(0, len(at), _BLOCK):
            i, j = cells.near(at[first : first + _BLOCK], every, config.device)
            left = chosen[first + i]
            apart = left != rows[j]
            left, right = left[apart], rows[j[apart]]
            found.append(verified(cells.vectors, left, right, cells.cosine, watch))
        return gathered(found)

    starts = range(0, count, 16 * _BLOCK)
    found = spread(
        ctx, "searching a sample exhaustively", against, starts, cells.files, config.gpus
    )
    return gathered(found).incident(watch)


def _within_cells(
    cells: Cells, fresh: Mask, watch: Mask, ctx: Context, config: SearchConfig
) -> Ties:
    def join(numbers: range) -> Ties:
        found, rows = [], cells.rows
        for number in numbers:
            members, near = cells.members(number), cells.touching(number)
            new, late = fresh[rows[near]], members[fresh[rows[members]]]
            for queries, others in ((near[new], members), (near[~new], late)):
                for start in range(0, len(queries), _BLOCK):
                    part_ = queries[start : start + _BLOCK]
                    i, j = cells.near(part_, others, config.device)
                    left, right = rows[part_[i]], rows[others[j]]
                    apart = left != right
                    found.append(
                        verified(cells.vectors, left[apart], right[apart], cells.cosine, watch)
                    )
        return gathered(found)

    step = -(-cells.count // _TASKS)
    parts = [range(n, min(n + step, cells.count)) for n in range(0, cells.count, step)]
    return gathered(spread(ctx, "comparing images", join, parts, cells.files, config.gpus))


def spread(
    ctx: Context,
    message: str,
    work: Callable[[T], Ties],
    parts: Sequence[T],
    reads: Sequence[Path],
    gpus: float,
) -> list[Ties]:
    """``work`` on every part, side by side where the engine can; it ``reads`` these files."""
    ctx.progress(message, 0, len(parts))
    few = len(parts) <= _FEW and not gpus
    done = [work(item) for item in parts] if few else ctx.map(work, list(parts), reads, gpus)
    ctx.progress(message, len(parts), len(parts))
    return done
