"""Close pairs of images that share a bucket of one table of sketches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stages.dedup.exhaustive import BLOCK
from stages.dedup.images import Mask, Rows
from stages.dedup.sketches import Bits, Keys, Plan, Sketches
from stages.dedup.ties import TOLERANCE, Ties, above, gathered, pair_cosines

_MANY = 1024
"""Images of a bucket, from which on they are compared a tile at a time."""
_PAIRS = 1 << 19
"""Pairs in memory at once."""
_PIVOTS = 8
_CROWD = 8
"""Of a large bucket, one image in so many must be close to a pivot for a crowd to form round it."""

Pairs = tuple[Rows, Rows, npt.NDArray[np.float32]]
"""Positions of either side, and their cosines."""


@dataclass(frozen=True)
class Part:
    """Some buckets of one table: the ``number``-th of ``count`` equal ranges of keys."""

    table: int
    number: int
    count: int


def parts(plan: Plan, rows: int, most: int) -> list[Part]:
    """All tables, in parts of ``most`` rows if all buckets were alike. A bucket is never parted."""
    count = min(-(-rows // most), 1 << plan.bits)
    return [Part(table, number, count) for table in range(plan.tables) for number in range(count)]


def within_buckets(sketches: Sketches, plan: Plan, part: Part, fresh: Mask, watch: Mask) -> Ties:
    """Ties of images that share a bucket of ``part`` and none of an earlier table; of two, one is
    ``fresh`` at least."""
    table = _Table(sketches, part.table, fresh[sketches.rows], watch[sketches.rows])
    order, keys = _ordered(table.keys[part.table], plan, part)
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])) if len(keys) else order
    sizes = np.diff(np.append(starts, len(keys)))
    is_new = table.fresh[order]
    news = np.add.reduceat(is_new, starts, dtype=np.int64) if len(starts) else sizes
    wanted = (sizes > 1) & (news > 0)
    large = wanted & (sizes > _MANY)
    found = [
        table.ties(pairs)
        for start, size in zip(starts[large], sizes[large], strict=True)
        for pairs in table.of_large(np.sort(order[start : start + size]))
    ]
    kept = np.repeat(wanted & ~large, sizes)
    order, keys, is_new = order[kept], keys[kept], is_new[kept]
    for left, right in _similar(keys, np.asarray(table.sketches[order]), is_new, plan.most):
        found.append(table.ties(table.close(order[left], order[right])))
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
    most; ``keys`` are sorted. All pairs of one distance in that order are looked at together, and
    what is found is handed on when it is much: a crowd has a few pairs at each of many distances.
    """
    found: list[tuple[Rows, Rows]] = []
    apart, count = 1, 0
    at = np.flatnonzero(keys[1:] == keys[:-1])
    while len(at):
        for start in range(0, len(at), _PAIRS):
            left = at[start : start + _PAIRS]
            left = left[is_new[left] | is_new[left + apart]]
            # Rows by `take`: indexing copies them several times slower.
            sides = sketches.take(left, axis=0), sketches.take(left + apart, axis=0)
            left = left[_differing(*sides) <= most]
            found.append((left, left + apart))
            count += len(left)
            if count >= _PAIRS:
                yield _joined(found)
                found, count = [], 0
        apart += 1
        at = at[: np.searchsorted(at, len(keys) - apart)]
        at = at[keys[at] == keys[at + apart]]
    if count:
        yield _joined(found)


def _joined(pairs: list[tuple[Rows, Rows]]) -> tuple[Rows, Rows]:
    left, right = map(np.concatenate, zip(*pairs, strict=True))
    return left, right


def _differing(left: Bits, right: Bits) -> npt.NDArray[np.uint16]:
    """Bits in which each pair differs."""
    counts = np.bitwise_count(left ^ right)
    differing = np.zeros(len(counts), dtype=np.uint16)
    for word in range(counts.shape[1]):  # numpy sums short rows one by one, columns all at once
        differing += counts[:, word]
    return differing


class _Table:
    """One table, its files opened once. Images are told by their positions in ``rows``."""

    def __init__(self, sketches: Sketches, number: int, fresh: Mask, watch: Mask) -> None:
        self.vectors, self.cosine = sketches.vectors, sketches.cosine
        self.rows, self.sketches, self.keys = sketches.rows, sketches.sketches, sketches.keys
        self.number, self.fresh, self.watch = number, fresh, watch
        self._seen = np.zeros(sketches.vectors.rows, dtype=np.bool_)
        self._seen[self.rows[watch]] = True

    def ties(self, pairs: Pairs) -> Ties:
        """Of those pairs that no earlier table has in one bucket."""
        left, right, cosines = pairs
        for earlier in self.keys[: self.number]:
            if not len(left):
                break
            apart = earlier[left] != earlier[right]
            left, right, cosines = left[apart], right[apart], cosines[apart]
        return Ties.of(self.rows[left], self.rows[right], cosines, self._seen)

    def close(self, left: Rows, right: Rows) -> Pairs:
        """Those of some pairs that are close."""
        cosines = pair_cosines(self.vectors, self.rows[left], self.rows[right])
        good = cosines >= self.cosine - TOLERANCE
        return left[good], right[good], cosines[good]

    def of_large(self, at: Rows) -> Iterator[Pairs]:
        """Close pairs of one large bucket, as many as it takes to tie what all of them would.

        Where many of its images are close to one, they are tied to that one, and of their own pairs
        only the watched ones are looked at: ten thousand pictures that are all alike make fifty
        million pairs, which say no more than ten thousand ties do.
        """
        while len(at) > _MANY:
            pivots = at[:: -(-len(at) // _PIVOTS)]
            tiles = list(self._tiles(at, pivots))
            if not tiles:
                break
            left, right, cosines = map(np.concatenate, zip(*tiles, strict=True))
            pivot = pivots[(right[:, None] == pivots).sum(axis=0).argmax()]
            crowd = np.isin(at, left[right == pivot]) | (at == pivot)
            if crowd.sum() * _CROWD < len(at):
                break
            inside, outside = at[crowd], at[~crowd]
            pivots = np.intersect1d(pivots, inside)
            once = np.isin(left, inside) & np.isin(right, pivots)
            once &= ~np.isin(left, pivots) | (left < right)
            yield left[once], right[once], cosines[once]
            for left, right, cosines in self._tiles(inside[self.watch[inside]], inside):
                once = ~self.watch[right] | (left < right)
                once &= ~np.isin(left, pivots) & ~np.isin(right, pivots)
                yield left[once], right[once], cosines[once]
            yield from self._tiles(inside, outside)
            at = outside
        for left, right, cosines in self._tiles(at, at):
            once = left < right
            yield left[once], right[once], cosines[once]

    def _tiles(self, left: Rows, right: Rows) -> Iterator[Pairs]:
        """All close pairs of one of ``left`` and another of ``right``, one of them fresh."""
        new = self.fresh[left]
        for ours, theirs in ((left[new], right), (left[~new], right[self.fresh[right]])):
            for start in range(0, len(ours), BLOCK):
                side = ours[start : start + BLOCK]
                unit = self.vectors.read(self.rows[side])
                for other in range(0, len(theirs), BLOCK):
                    across = theirs[other : other + BLOCK]
                    products = above(unit, self.vectors.read(self.rows[across]), self.cosine)
                    i, j, cosines = side[products[0]], across[products[1]], products[2]
                    apart = i != j
                    yield i[apart], j[apart], cosines[apart]
