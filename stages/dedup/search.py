"""Pairs of images whose embeddings are close: every pair of a few, or bucket by bucket of many.

Many images are put into buckets by their sketches, in several tables (`stages.dedup.sketches`), and
only those that share a bucket are compared: first their sketches, then, where these are similar,
the embeddings themselves. So no pair is tied that is not close; some close pairs are missed. How
few is measured in every run, on a sample that is compared with everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.base import Context
from stages.dedup.buckets import Part, parts, within_buckets
from stages.dedup.config import SearchConfig
from stages.dedup.exhaustive import BLOCK, every_pair, spread
from stages.dedup.images import Mask, Rows, Vectors
from stages.dedup.sketches import Plan, Sketches, sketched
from stages.dedup.ties import Ties, gathered, verified
from stages.errors import RunError

_ROWS = 1 << 22
"""Of a part of a table: some 50 bytes each are in memory."""
_FEW_ROWS = 1 << 20
"""So few, counted once a table, are compared before workers for them have started."""
_FEW_PARTS = 8


@dataclass(frozen=True)
class Measured:
    """How a search went."""

    images: int
    tables: int = 0
    """0: every pair was looked at."""
    bits: int = 0
    """Planes of a key."""
    pairs: int = 0
    """Close pairs found; of a crowd of pictures that are all alike, as many as tie it together."""
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
        RunError: too few pairs were found and ``max_tables`` allows no more.
    """
    new, old = rows[fresh[rows]], rows[~fresh[rows]]
    seen = np.zeros(vectors.rows, dtype=np.bool_) if watch is None else watch
    if len(rows) <= config.exhaustive_below:
        ties = every_pair(vectors, new, old, cosine, ctx, seen, config.gpus)
        return ties, Measured(
            len(rows), pairs=ties.pairs, sampled=len(new), sampled_pairs=ties.pairs
        )
    if not len(new):
        return Ties.none(), Measured(len(rows))
    chosen = np.random.default_rng(1).choice(new, min(config.sample, len(new)), replace=False)
    sketches = sketched(vectors, rows, cosine, scratch, ctx)
    truth = _sampled(sketches, np.sort(chosen), ctx, config)
    sample = np.zeros(vectors.rows, dtype=np.bool_)
    sample[chosen] = True
    plan = sketches.plan(config)
    while True:
        if plan.bits == 0:  # one bucket that holds all
            ties = every_pair(vectors, new, old, cosine, ctx, sample | seen, config.gpus)
        else:
            ties = _by_buckets(sketches, plan, fresh, sample | seen, ctx)
        measured = _measured(ties, plan, sample, truth, len(rows))
        if measured.recall >= config.recall:
            return ties, measured
        if plan.tables >= config.max_tables:
            raise RunError(
                f"dedup: of {len(truth)} close pairs of {len(chosen)} sampled images the search "
                f"found {measured.recall:.4f}, less than dedup.search.recall ({config.recall}), "
                f"with {plan.tables} tables; raise dedup.search.max_tables"
            )
        plan = plan.harder(config.max_tables)
        ctx.progress(f"searching again, with {plan.tables} tables", 0, plan.tables)


def _measured(ties: Ties, plan: Plan, sample: Mask, truth: Rows, images: int) -> Measured:
    found = ties.incident(sample)
    right = len(np.intersect1d(found, truth, assume_unique=True))
    return Measured(
        images=images,
        tables=plan.tables,
        bits=plan.bits,
        pairs=ties.pairs,
        sampled=int(sample.sum()),
        sampled_pairs=len(truth),
        recall=right / len(truth) if len(truth) else 1.0,
        precision=right / len(found) if len(found) else 1.0,
    )


def _sampled(sketches: Sketches, chosen: Rows, ctx: Context, config: SearchConfig) -> Rows:
    """All close pairs of the chosen rows and any other, as `Ties.incident` tells them."""
    watch = np.zeros(sketches.vectors.rows, dtype=np.bool_)
    watch[chosen] = True
    at, count = np.searchsorted(sketches.rows, chosen), len(sketches.rows)

    def against(start: int) -> Ties:
        every = np.arange(start, min(start + 16 * BLOCK, count))
        rows = sketches.rows[every]
        found = []
        for first in range(0, len(at), BLOCK):
            i, j = sketches.near(at[first : first + BLOCK], every, config.device)
            left = chosen[first + i]
            apart = left != rows[j]
            left, right = left[apart], rows[j[apart]]
            found.append(verified(sketches.vectors, left, right, sketches.cosine, watch))
        return gathered(found)

    starts = range(0, count, 16 * BLOCK)
    few = len(starts) <= _FEW_PARTS
    found = spread(
        ctx, "searching a sample exhaustively", against, starts, sketches.files, few, config.gpus
    )
    return gathered(found).incident(watch)


def _by_buckets(sketches: Sketches, plan: Plan, fresh: Mask, watch: Mask, ctx: Context) -> Ties:
    sketches.write_keys(plan, ctx)

    def join(part: Part) -> Ties:
        return within_buckets(sketches, plan, part, fresh, watch)

    count = len(sketches.rows)
    work, few = parts(plan, count, _ROWS), count * plan.tables <= _FEW_ROWS
    return gathered(spread(ctx, "comparing images", join, work, sketches.files, few))
