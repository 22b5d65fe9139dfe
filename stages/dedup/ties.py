"""What a search hands back: which rows are tied, thinned out where very many pairs say so; and
union-find, which joins them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stages.dedup.images import Mask, Matrix, Rows, Vectors

_NO_ROWS = np.zeros(0, dtype=np.int64)
TOLERANCE = 1e-6  # equal vectors have a cosine of 1 but for rounding


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
class Ties:
    """Close pairs of rows, without the pairs that say nothing new: ten thousand pictures that are
    all alike make fifty million pairs, and ten thousand ties."""

    left: Rows
    right: Rows
    """Tied rows; together they connect whatever the pairs connect."""
    rows: Rows
    nearest: npt.NDArray[np.float32]
    """Rows that are in any pair, with the best closeness of each among the pairs that were looked
    at. A row may stand several times."""
    pairs: int
    """Pairs found; one that two parts of a search found counts twice."""
    watched: npt.NDArray[np.int64]
    """(k, 2): all pairs of which the caller watches a side, smaller row first."""

    @classmethod
    def none(cls) -> Ties:
        none = np.zeros(0, dtype=np.float32)
        return cls(_NO_ROWS, _NO_ROWS, _NO_ROWS, none, 0, _NO_ROWS.reshape(0, 2))

    @classmethod
    def of(cls, left: Rows, right: Rows, closeness: npt.NDArray[np.float32], watch: Mask) -> Ties:
        """From pairs and how close each is; the higher, the closer."""
        if not len(left):
            return cls.none()
        seen = watch[left] | watch[right]
        watched = np.sort(np.stack([left[seen], right[seen]], axis=1), axis=1)
        rows, place = np.unique(np.concatenate([left, right]), return_inverse=True)
        nearest = np.full(len(rows), -np.inf, dtype=np.float32)
        np.maximum.at(nearest, place, np.concatenate([closeness, closeness]))
        count = len(left)
        if count > 2 * len(rows):
            left, right = _spanning(rows, place[:count], place[count:])
        return cls(left, right, rows, nearest, count, watched)

    def incident(self, sample: Mask) -> Rows:
        """One number for each distinct watched pair with a side in ``sample``, ascending."""
        inside = sample[self.watched].any(axis=1)
        # Sorted by hand: numpy's unique is many times slower on millions of equal keys.
        keys: Rows = np.sort(self.watched[inside] @ np.array([len(sample), 1]))
        return keys[np.append(True, keys[1:] != keys[:-1])] if len(keys) else keys


def _spanning(rows: Rows, left: Rows, right: Rows) -> tuple[Rows, Rows]:
    """Each row tied to the first one that the pairs connect it with."""
    sets = UnionFind(len(rows))
    sets.union(left, right)
    return rows[sets.roots(np.arange(len(rows)))], rows


def gathered(parts: Sequence[Ties]) -> Ties:
    """All of them as one."""
    if not parts:
        return Ties.none()
    return Ties(
        np.concatenate([part.left for part in parts]),
        np.concatenate([part.right for part in parts]),
        np.concatenate([part.rows for part in parts]),
        np.concatenate([part.nearest for part in parts]),
        sum(part.pairs for part in parts),
        np.concatenate([part.watched for part in parts]),
    )


def above(
    left: Matrix, right: Matrix, floor: float, device: str = "cpu"
) -> tuple[Rows, Rows, npt.NDArray[np.float32]]:
    """Where the products of two sets of vectors reach ``floor``, and the products there."""
    import torch

    products = torch.from_numpy(left).to(device) @ torch.from_numpy(right).to(device).T
    hits = (products >= floor - TOLERANCE).nonzero(as_tuple=True)
    i, j = (hit.cpu().numpy() for hit in hits)
    return i, j, products[hits].cpu().numpy()


def verified(vectors: Vectors, left: Rows, right: Rows, cosine: float, watch: Mask) -> Ties:
    """Ties of those candidate pairs whose cosine, in full, is at least ``cosine``. The candidates
    are of one tile: all of its rows are compared where any is."""
    if not len(left):
        return Ties.none()
    lefts, i = np.unique(left, return_inverse=True)
    rights, j = np.unique(right, return_inverse=True)
    cosines = (vectors.read(lefts) @ vectors.read(rights).T)[i, j]
    good = cosines >= cosine - TOLERANCE
    return Ties.of(left[good], right[good], cosines[good], watch)


def pair_cosines(
    vectors: Vectors, left: Rows, right: Rows, block: int = 4096
) -> npt.NDArray[np.float32]:
    """Cosine of each pair of rows."""
    found = [np.zeros(0, dtype=np.float32)]
    for start in range(0, len(left), block):
        a, b = (vectors.read(side[start : start + block]) for side in (left, right))
        found.append(np.einsum("ij,ij->i", a, b))
    return np.concatenate(found)
