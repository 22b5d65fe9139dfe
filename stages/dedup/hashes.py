"""What is tied without a look at embeddings alone: equal files, equal pixels, close hashes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stages.base import Context
from stages.dedup.config import DedupConfig
from stages.dedup.exhaustive import every_pair
from stages.dedup.images import Images, Mask, Rows, Vectors
from stages.dedup.ties import Ties, gathered, pair_cosines

_BITS = 256
_QUERIES = 4096
"""Hashes looked up at once."""
_MANY = 512
"""Images of one hash, from which on they are compared a tile at a time."""
_PAIRS = 1 << 18
"""Image pairs in memory at once."""


def first_of_equals(hashes: pa.Array) -> Rows:
    """For each entry the first index with the same value; nulls equal nothing."""
    codes = hashes.dictionary_encode().indices
    known = np.asarray(codes.is_valid())
    first = np.arange(len(hashes))
    _, found, group = np.unique(
        codes.drop_null().to_numpy(), return_index=True, return_inverse=True
    )
    rows = np.flatnonzero(known)
    first[rows] = rows[found[group]]
    return first


def close_hashes(
    images: Images, rows: Rows, fresh: Mask, config: DedupConfig, ctx: Context
) -> tuple[Ties, Ties]:
    """Ties among ``rows`` by the perceptual net, twice: how near is minus the Hamming distance,
    then the cosine (none where it is not asked for).

    The search for hashes within the distance is exact.
    """
    distance, cosine = config.perceptual_distance, config.perceptual_cosine
    usable = images.hashed & (images.embedded if cosine is not None else True)
    rows = rows[usable[rows]]
    if distance is None or not len(rows) or not fresh[rows].any():
        return Ties.none(), Ties.none()
    packed = np.ascontiguousarray(images.phash[rows])
    _, first, group = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(group, kind="stable")
    members = np.split(rows[order], np.flatnonzero(np.diff(group[order])) + 1)
    rule = _Rule(images.vectors, fresh, cosine, np.zeros(len(images), dtype=np.bool_))
    found = [rule.alike(same, ctx) for same in members if len(same) > 1]
    asked = np.array([bool(fresh[same].any()) for same in members])
    for a, b, bits in within(packed[first], np.flatnonzero(asked), distance, ctx):
        found += [rule.of(*pairs) for pairs in _expanded(members, a, b, bits)]
    return gathered([bits for bits, _ in found]), gathered([cosines for _, cosines in found])


@dataclass(frozen=True)
class _Rule:
    """Which of the images with close hashes are the same picture."""

    vectors: Vectors
    fresh: Mask
    cosine: float | None
    watch: Mask

    def of(self, left: Rows, right: Rows, bits: Rows) -> tuple[Ties, Ties]:
        """Ties out of pairs that are ``bits`` apart."""
        good = self.fresh[left] | self.fresh[right]
        left, right, bits = left[good], right[good], bits[good]
        if self.cosine is None:
            return Ties.of(left, right, -bits.astype(np.float32), self.watch), Ties.none()
        cosines = pair_cosines(self.vectors, left, right)
        good = cosines >= self.cosine
        left, right = left[good], right[good]
        return (
            Ties.of(left, right, -bits[good].astype(np.float32), self.watch),
            Ties.of(left, right, cosines[good], self.watch),
        )

    def alike(self, same: Rows, ctx: Context) -> tuple[Ties, Ties]:
        """Ties among images of one hash."""
        if self.cosine is None:
            return self.of(
                np.full(len(same) - 1, same[0]), same[1:], np.zeros(len(same) - 1, dtype=np.int64)
            )
        if len(same) <= _MANY:
            i, j = np.triu_indices(len(same), 1)
            return self.of(same[i], same[j], np.zeros(len(i), dtype=np.int64))
        new, old = same[self.fresh[same]], same[~self.fresh[same]]
        ties = every_pair(self.vectors, new, old, self.cosine, ctx, self.watch)
        return replace(ties, nearest=np.zeros_like(ties.nearest)), ties


def _expanded(
    members: list[Rows], a: Rows, b: Rows, bits: Rows
) -> Iterator[tuple[Rows, Rows, Rows]]:
    """Image pairs and their distances, from pairs of hashes; some at a time."""
    pieces: list[tuple[Rows, Rows, int]] = []
    for i, j, distance in zip(a, b, bits, strict=True):
        # Two hashes that thousands of images have each, of flat pictures, are millions of pairs.
        step = max(1, _PAIRS // len(members[j]))
        pieces += [
            (members[i][start : start + step], members[j], distance)
            for start in range(0, len(members[i]), step)
        ]
    sizes = np.array([len(left) * len(right) for left, right, _ in pieces])
    for part in np.split(np.arange(len(pieces)), _cuts(sizes)):
        if not len(part):
            continue
        chosen = [pieces[k] for k in part]
        lefts = [np.repeat(left, len(right)) for left, right, _ in chosen]
        rights = [np.tile(right, len(left)) for left, right, _ in chosen]
        distances = np.repeat([distance for _, _, distance in chosen], sizes[part])
        yield np.concatenate(lefts), np.concatenate(rights), distances


def _cuts(sizes: Rows) -> Rows:
    """Where to cut so that no part but a single entry is much larger than `_PAIRS`."""
    parts = np.cumsum(sizes) // _PAIRS
    cuts: Rows = np.flatnonzero(np.diff(parts)) + 1
    return cuts


def within(
    hashes: npt.NDArray[np.uint8], asked: Rows, distance: int, ctx: Context
) -> Iterator[tuple[Rows, Rows, Rows]]:
    """Pairs of different (n, 32) hashes at most ``distance`` bits apart, and how many: those of
    the rows ``asked``, smaller index first where both are asked, some rows at a time."""
    index = indexed(hashes, distance)
    is_asked = np.zeros(len(hashes), dtype=np.bool_)
    is_asked[asked] = True
    for start in range(0, len(asked), _QUERIES):
        ctx.progress("comparing hashes", start, len(asked))
        rows = asked[start : start + _QUERIES]
        # FAISS finds what is nearer than the radius it is given.
        ends, bits, found = index.range_search(hashes[rows], distance + 1)
        left = np.repeat(rows, np.diff(ends.astype(np.int64)))
        once = (left < found) | ((left > found) & ~is_asked[found])
        yield left[once], found[once], bits[once].astype(np.int64)


def indexed(hashes: npt.NDArray[np.uint8], distance: int) -> Any:
    """A FAISS index over (n, 32) hashes that finds all within ``distance`` bits."""
    index = empty_index(len(hashes), distance)
    index.add(np.ascontiguousarray(hashes))
    return index


def empty_index(count: int, distance: int) -> Any:
    """The cheaper of looking at all hashes and of looking up parts of them. Both are exact: of
    ``parts`` disjoint parts of two hashes one differs in at most distance // parts bits."""
    import faiss

    plans = []
    for parts in range(4, 33):
        width, flips = _BITS // parts, distance // parts
        lookups = parts * sum(comb(width, i) for i in range(flips + 1))
        plans.append((lookups * (_LOOKUP + count / 2**width), parts, width, flips))
    cost, parts, width, flips = min(plans)
    if cost >= count:
        return faiss.IndexBinaryFlat(_BITS)
    index = faiss.IndexBinaryMultiHash(_BITS, parts, width)
    index.nflip = flips
    return index


_LOOKUP = 50
"""A look-up costs as much as so many comparisons of two hashes."""
