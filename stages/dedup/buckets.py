"""Close pairs of images that share a bucket of one table of sketches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stages.base import LocalContext
from stages.dedup.exhaustive import between, every_pair
from stages.dedup.images import Mask, Rows, Vectors
from stages.dedup.sketches import Bits, Keys, Plan, Sketches
from stages.dedup.ties import TOLERANCE, Ties, gathered, pair_cosines

_MANY = 1024
"""Images of a bucket, from which on they are compared a tile at a time."""
_PAIRS = 1 << 19
"""Pairs in memory at once."""
_PIVOTS = 8
_CROWD = 8
"""Of a large bucket, one image in so many must be close to a pivot for a crowd to form round it."""


@dataclass(frozen=True)
class Part:
    """Some buckets of one table: the ``number``-th of ``count`` equal ranges of keys."""

    table: int
    number: int
    count: int


def parts(plan: Plan, rows: int, most: int) -> list[Part]:
    """All tables in parts of about ``most`` rows; what one holds in memory is bounded by that."""
    count = min(-(-rows // most), 1 << plan.bits)
    return [Part(table, number, count) for table in range(plan.tables) for number in range(count)]


def within_buckets(sketches: Sketches, plan: Plan, part: Part, fresh: Mask, watch: Mask) -> Ties:
    """Ties of images that share a bucket of ``part`` and none of an earlier table; of two, one is
    ``fresh`` at least."""
    order, keys = _ordered(sketches.keys[part.table], plan, part)
    is_new = fresh[sketches.rows[order]]
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])) if len(keys) else order
    sizes = np.diff(np.append(starts, len(keys)))
    news = np.add.reduceat(is_new, starts, dtype=np.int64) if len(starts) else sizes
    wanted = (sizes > 1) & (news > 0)
    large = wanted & (sizes > _MANY)
    found = [
        _large(sketches.vectors, sketches.rows[np.sort(order[a : a + n])], fresh, sketches, watch)
        for a, n in zip(starts[large], sizes[large], strict=True)
    ]
    kept = np.repeat(wanted & ~large, sizes)
    order, keys, is_new = order[kept], keys[kept], is_new[kept]
    for left, right in _similar(keys, np.asarray(sketches.sketches[order]), is_new, plan.most):
        pairs = _unmet(sketches.keys, part.table, order[left], order[right])
        found.append(_close(sketches, *pairs, watch))
    return gathered(found)


def _ordered(keys: Keys, plan: Plan, part: Part) -> tuple[Rows, Keys]:
    """Positions of the part's images by their key, and the keys."""
    if part.count == 1:
        mine = np.arange(len(keys))
    else:
        first, end = ((part.number + i) * 2**plan.bits // part.count for i in (0, 1))
        mine = np.flatnonzero((keys >= first) & (keys < end))
    order = mine[np.argsort(keys[mine], kind="stable")]
    return order, keys[order]


def _similar(keys: Keys, sketches: Bits, is_new: Mask, most: int) -> Iterator[tuple[Rows, Rows]]:
    """Index pairs of equal keys, of which one is new, whose sketches differ in ``most`` bits at
    most; ``keys`` are sorted. All pairs of one distance in that order are looked at together."""
    apart = 1
    at = np.flatnonzero(keys[1:] == keys[:-1])
    while len(at):
        for start in range(0, len(at), _PAIRS):
            left = at[start : start + _PAIRS]
            left = left[is_new[left] | is_new[left + apart]]
            # Rows by `take`: indexing copies them several times slower.
            sides = sketches.take(left, axis=0), sketches.take(left + apart, axis=0)
            left = left[_differing(*sides) <= most]
            if len(left):
                yield left, left + apart
        apart += 1
        at = at[: np.searchsorted(at, len(keys) - apart)]
        at = at[keys[at] == keys[at + apart]]


def _differing(left: Bits, right: Bits) -> npt.NDArray[np.uint16]:
    """Bits in which each pair differs."""
    counts = np.bitwise_count(left ^ right)
    differing = np.zeros(len(counts), dtype=np.uint16)
    for word in range(counts.shape[1]):  # numpy sums short rows one by one, columns all at once
        differing += counts[:, word]
    return differing


def _unmet(keys: Keys, table: int, left: Rows, right: Rows) -> tuple[Rows, Rows]:
    """Those pairs that no table before ``table`` has in one bucket."""
    for earlier in range(table):
        if not len(left):
            break
        row = keys[earlier]
        apart = row[left] != row[right]
        left, right = left[apart], right[apart]
    return left, right


def _close(sketches: Sketches, left: Rows, right: Rows, watch: Mask) -> Ties:
    left, right = sketches.rows[left], sketches.rows[right]
    cosines = pair_cosines(sketches.vectors, left, right)
    good = cosines >= sketches.cosine - TOLERANCE
    return Ties.of(left[good], right[good], cosines[good], watch)


def _large(vectors: Vectors, rows: Rows, fresh: Mask, sketches: Sketches, watch: Mask) -> Ties:
    """Ties of one large bucket.

    Where many of its images are close to one, that one is tied to each of them and, of their own
    pairs, only the watched ones are looked at: ten thousand pictures that are all alike make fifty
    million pairs, which say no more than ten thousand ties do.
    """
    cosine, found = sketches.cosine, []
    while len(rows) > _MANY:
        pivots = rows[:: -(-len(rows) // _PIVOTS)]
        cosines = np.concatenate(
            [
                vectors.read(rows[start : start + _MANY]) @ vectors.read(pivots).T
                for start in range(0, len(rows), _MANY)
            ]
        )
        close = cosines >= cosine - TOLERANCE
        best = int(close.sum(axis=0).argmax())
        crowd = close[:, best]
        if crowd.sum() * _CROWD < len(rows):
            break
        pivot, others = pivots[best], rows[crowd & (rows != pivots[best])]
        tied = fresh[others] | fresh[pivot]
        nearest = cosines[crowd & (rows != pivot), best][tied]
        found.append(Ties.of(np.full(tied.sum(), pivot), others[tied], nearest, watch))
        inside, outside = rows[crowd], rows[~crowd]
        found.append(between(vectors, inside[watch[inside]], inside, fresh, cosine, watch))
        found.append(between(vectors, inside, outside, fresh, cosine, watch))
        rows = outside
    new, old = rows[fresh[rows]], rows[~fresh[rows]]
    found.append(every_pair(vectors, new, old, cosine, LocalContext(), watch))
    return gathered(found)
