"""Close pairs by looking at every pair, one tile of embeddings against another at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from stages.base import Context
from stages.dedup.images import Mask, Rows, Vectors
from stages.dedup.ties import Ties, above, gathered, verified

T = TypeVar("T")

BLOCK = 2048
"""Rows of a tile. Fixed, so that float sums never depend on a setting; a tile takes 16 MiB."""
SLACK = 1e-5
_FEW = 8
"""So few tiles of rows are compared before workers for them have started."""


def every_pair(
    vectors: Vectors,
    new: Rows,
    old: Rows,
    cosine: float,
    ctx: Context,
    watch: Mask,
    gpus: float = 0.0,
) -> Ties:
    """Ties among ``new`` and between ``new`` and ``old``."""
    ordered = np.concatenate([new, old])
    device = "cuda" if gpus else "cpu"

    def across(start: int) -> Ties:
        found = []
        left = ordered[start : min(start + BLOCK, len(new))]
        a = vectors.read(left)
        for other in range(start, len(ordered), BLOCK):
            right = ordered[other : other + BLOCK]
            # A GPU rounds otherwise: what is near the threshold there is looked at here.
            floor = cosine - SLACK if gpus else cosine
            i, j, cosines = above(a, vectors.read(right), floor, device)
            once = start + i < other + j
            pairs = left[i[once]], right[j[once]]
            if gpus:
                found.append(verified(vectors, *pairs, cosine, watch))
            else:
                found.append(Ties.of(*pairs, cosines[once], watch))
        return gathered(found)

    starts = range(0, len(new), BLOCK)
    few = len(starts) <= _FEW
    return gathered(spread(ctx, "comparing images", across, starts, [vectors.file], few, gpus))


def spread(
    ctx: Context,
    message: str,
    work: Callable[[T], Ties],
    parts: Sequence[T],
    reads: Sequence[Path],
    few: bool,
    gpus: float = 0.0,
) -> list[Ties]:
    """``work`` on every part, side by side where the engine can, unless so ``few`` are done sooner
    than workers start; it ``reads`` these files."""
    ctx.progress(message, 0, len(parts))
    here = few and not gpus
    done = [work(item) for item in parts] if here else ctx.map(work, list(parts), reads, gpus)
    ctx.progress(message, len(parts), len(parts))
    return done
