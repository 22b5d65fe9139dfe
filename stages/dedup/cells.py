"""Embeddings parted into cells, in files: what each part of a search reads of them is small."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.base import Context
from stages.dedup.images import Matrix, Rows, Vectors

_BLOCK = 8192
"""Rows in memory while they are assigned. Fixed, as are the seeds: nothing depends on either."""
_PER_CELL = 40
"""Sampled rows for each cell that k-means learns."""
_SLACK = 1e-5
_WIDTHS = (32, 64, 96, 128, 192, 256, 384)
_FALSE_ALARMS = 1e-5
"""Share of unlike pairs that may have to be looked at in full."""


@dataclass(frozen=True)
class Cells:
    """Rows of ``vectors`` in principal components, and the cells they lie in.

    The arrays lie in ``folder`` and are mapped, not loaded: whoever is handed cells is handed
    little. Positions count in ``rows``.
    """

    vectors: Vectors
    cosine: float
    mean: Matrix
    components: Matrix
    """(width, dimensions), orthonormal columns."""
    centres: Matrix
    """(cells, dimensions)."""
    folder: Path

    @property
    def files(self) -> list[Path]:
        """Whatever its methods read."""
        return [self.vectors.file, *sorted(self.folder.glob("*.npy"))]

    @property
    def rows(self) -> Rows:
        """The rows of ``vectors`` that are parted."""
        mapped: Rows = np.load(self.folder / "rows.npy", mmap_mode="r")
        return mapped

    @property
    def count(self) -> int:
        return len(self.centres)

    @property
    def dimensions(self) -> int:
        return int(self.components.shape[1])

    @property
    def _distance(self) -> float:
        return float(np.sqrt(max(0.0, 2.0 - 2.0 * self.cosine)))

    def members(self, cell: int) -> Rows:
        """Positions of the images of a cell."""
        return self._list("members", cell)

    def touching(self, cell: int) -> Rows:
        """Positions of its members and of all images near one of its borders."""
        return self._list("touching", cell)

    def near(self, left: Rows, right: Rows, device: str) -> tuple[Rows, Rows]:
        """Indices into ``left`` and ``right`` (positions) of pairs that may be close."""
        import torch

        projected = np.load(self.folder / "projected.npy", mmap_mode="r")
        a, b = (torch.from_numpy(projected[side]).to(device) for side in (left, right))
        # One product gives a·b - |a|²/2 - |b|²/2 = -|a - b|²/2.
        halves = [(side * side).sum(dim=1, keepdim=True) / -2 for side in (a, b)]
        ones = [torch.ones_like(half) for half in halves]
        a = torch.cat([a, halves[0], ones[0]], dim=1)
        b = torch.cat([b, ones[1], halves[1]], dim=1)
        floor = -(self._distance**2) / 2 - _SLACK
        i, j = ((a @ b.T) >= floor).nonzero(as_tuple=True)
        return i.cpu().numpy(), j.cpu().numpy()

    def assign(self, reach: float, ctx: Context) -> float:
        """Find every cell's members and what touches it within ``reach`` of what would be safe.
        Returns how many cells an image touches on average."""
        import torch

        projected = np.load(self.folder / "projected.npy", mmap_mode="r")
        centres = torch.from_numpy(self.centres)
        apart = torch.cdist(centres, centres) * (reach * self._distance / 2 + _SLACK)
        half = (centres * centres).sum(dim=1) / 2
        own, touched, cells = [], [], []
        for start in range(0, len(projected), _BLOCK):
            ctx.progress("parting images into cells", start, len(projected))
            # x·c - |c|²/2: its difference between two cells, over the distance of their centres,
            # is how far x lies from their border.
            scores = (
                torch.from_numpy(np.array(projected[start : start + _BLOCK])) @ centres.T - half
            )
            best, first = scores.max(dim=1)
            at, cell = (scores + apart[first] >= best[:, None]).nonzero(as_tuple=True)
            own.append(first.numpy().astype(np.int32))
            touched.append((at.numpy() + start).astype(np.int64))
            cells.append(cell.numpy().astype(np.int32))
        self._write("members", np.concatenate(own), np.arange(len(projected)))
        self._write("touching", np.concatenate(cells), np.concatenate(touched))
        return sum(map(len, cells)) / len(projected)

    def _write(self, name: str, cells: npt.NDArray[np.int32], positions: Rows) -> None:
        np.save(self.folder / f"{name}.npy", positions[np.argsort(cells, kind="stable")])
        ends = np.cumsum(np.bincount(cells, minlength=self.count))
        np.save(self.folder / f"{name}-ends.npy", np.concatenate([[0], ends]))

    def _list(self, name: str, cell: int) -> Rows:
        ends = np.load(self.folder / f"{name}-ends.npy", mmap_mode="r")
        positions = np.load(self.folder / f"{name}.npy", mmap_mode="r")
        return np.array(positions[ends[cell] : ends[cell + 1]])


def part(vectors: Vectors, rows: Rows, cosine: float, count: int | None, folder: Path) -> Cells:
    """Cells learnt from a sample of the rows, without members as yet."""
    import faiss

    count = min(count or int(2 * np.sqrt(len(rows))), len(rows))
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(rows), min(_PER_CELL * count, len(rows)), replace=False)
    sample = vectors.read(rows[np.sort(chosen)])
    mean = sample.mean(axis=0)
    sample -= mean
    _, axes = np.linalg.eigh(sample.T @ sample)
    axes = np.ascontiguousarray(axes[:, ::-1], dtype=np.float32)
    sample = sample @ axes
    width = _enough(sample, 2.0 - 2.0 * cosine)
    kmeans: Any = faiss.Kmeans(
        width, count, niter=8, seed=0, min_points_per_centroid=1, max_points_per_centroid=_PER_CELL
    )
    kmeans.train(np.ascontiguousarray(sample[:, :width]))
    components = np.ascontiguousarray(axes[:, :width])
    np.save(folder / "rows.npy", rows)
    shape = (len(rows), width)
    projected = np.lib.format.open_memmap(folder / "projected.npy", "w+", np.float32, shape)
    for start in range(0, len(rows), _BLOCK):
        block = vectors.read(rows[start : start + _BLOCK]) - mean
        projected[start : start + _BLOCK] = block @ components
    projected.flush()
    return Cells(vectors, cosine, mean, components, kmeans.centroids, folder)


def _enough(sample: Matrix, bound: float) -> int:
    """The fewest leading columns in which nearly no two rows that are farther apart than the root
    of ``bound`` look closer. Any number is right; too few or too many cost time."""
    pairs = np.random.default_rng(2).integers(0, len(sample), (2, 200_000))
    widths = [width for width in _WIDTHS if width < sample.shape[1]]
    squares = np.zeros(pairs.shape[1])
    before = 0
    found = int(sample.shape[1])
    close = {}
    for width in [*widths, sample.shape[1]]:
        left, right = sample[pairs[0], before:width], sample[pairs[1], before:width]
        squares += ((left - right) ** 2).sum(axis=1)
        close[width] = float((squares <= bound).mean())
        before = width
    for width in reversed(widths):
        if close[width] - close[sample.shape[1]] <= _FALSE_ALARMS:
            found = width
    return found
