"""From chains to clusters: a guard against chains that join unlike images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stages.dedup.images import Matrix, Rows, Vectors

_BLOCK = 8192
"""Rows in memory at once."""
_EXACT_DIAMETER = 2048
"""Of a larger cluster the diameter is a bound from below."""


@dataclass(frozen=True)
class Parted:
    """Clusters after the guard."""

    root: Rows
    """Of each row the smallest row of its cluster."""
    parted: int
    """Chains that the guard cut."""
    widest: float
    """Least cosine of two images of one cluster; 1 where no cluster has two embeddings."""
    widest_root: int | None
    """That cluster."""


def guarded(vectors: Vectors, distinct: Rows, chains: Rows, guard: float | None) -> Parted:
    """Clusters out of ``chains``, the root of each row's connected component.

    Each chain is parted so that all images of a part have at least a cosine of ``guard`` to its
    middle: the image nearest to the mean of those not yet placed, again and again.

    Args:
        distinct: rows with embeddings, one of each distinct file.
    """
    root = chains.copy()
    parted, widest, widest_root = 0, 1.0, None
    order = distinct[np.argsort(chains[distinct], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(chains[order])) + 1)
    for members in groups:
        if len(members) < 2:
            continue
        parts = [members]
        if guard is not None and len(members) > 2:
            parts = list(_peeled(vectors, members, guard))
        if len(parts) > 1:
            parted += 1
            for part in parts:
                root[part] = part.min()
        for part in parts:
            least = diameter(vectors, part)
            if least < widest:
                widest, widest_root = least, int(part.min())
    return Parted(root, parted, widest, widest_root)


def _peeled(vectors: Vectors, members: Rows, guard: float) -> Iterator[Rows]:
    left = members
    while len(left):
        centre = left[np.argmax(_cosines_to(vectors, left, _mean(vectors, left)))]
        near = _cosines_to(vectors, left, vectors.read(np.array([centre]))[0]) >= guard - 1e-6
        near |= left == centre
        yield left[near]
        left = left[~near]


def _mean(vectors: Vectors, rows: Rows) -> Matrix:
    total = np.zeros(vectors.width, dtype=np.float64)
    for start in range(0, len(rows), _BLOCK):
        total += vectors.read(rows[start : start + _BLOCK]).sum(axis=0, dtype=np.float64)
    mean: Matrix = (total / len(rows)).astype(np.float32)
    return mean


def _cosines_to(vectors: Vectors, rows: Rows, vector: Matrix) -> npt.NDArray[np.float32]:
    parts = [
        vectors.read(rows[start : start + _BLOCK]) @ vector for start in range(0, len(rows), _BLOCK)
    ]
    return np.concatenate(parts)


def diameter(vectors: Vectors, rows: Rows) -> float:
    """The least cosine of two of the rows. Of very many rows: that of the one farthest from the
    first to the one farthest from it."""
    if len(rows) <= _EXACT_DIAMETER:
        unit = vectors.read(rows)
        return min(1.0, float((unit @ unit.T).min()))
    least, at = 1.0, rows[0]
    for _ in range(2):
        cosines = _cosines_to(vectors, rows, vectors.read(np.array([at]))[0])
        least, at = min(least, float(cosines.min())), rows[cosines.argmin()]
    return least
