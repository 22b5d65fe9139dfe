"""Sketches of embeddings: on which side of random planes each lies; in files, so that each part of
a search reads little.

A random plane parts two vectors at an angle a with probability a / pi (Charikar 2002, section 3);
here planes go through the images' mean, in principal components that are stretched to weigh more
alike. So one seldom parts two that are close. The sides of some planes
make a key, and the images of one key a bucket. A close pair that one table of buckets parts
another one, of planes of its own, will hold together; unlike images share few buckets.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stages.base import Context
from stages.dedup.config import MOST_BITS, SearchConfig
from stages.dedup.exhaustive import SLACK
from stages.dedup.images import Matrix, Rows, Vectors
from stages.errors import RunError

Keys = npt.NDArray[np.uint32]
Bits = npt.NDArray[np.uint64]

_BLOCK = 8192
"""Rows in memory while they are written. Fixed, as are the seeds: nothing depends on either."""
_SAMPLE = 20_000
"""Rows that principal components are learnt from."""
_WIDTH = 128
"""Principal components that are kept, at most."""
_PLANES = 256
"""Of a sketch."""
_TRIALS = 2_000
"""Made-up close pairs that a search is planned by."""
_SPARE = 8
"""Bits that a close pair's sketches may differ by beyond what any made-up pair's do."""
_MARGIN = 5
"""A plan allows for one in so many of the misses that the recall asked for allows."""
_ROW_COST = 20
"""Putting a row into a table takes as long as comparing so many pairs of sketches."""
_TABLES_AT_ONCE = 16


@dataclass(frozen=True)
class Plan:
    """How hard a search looks."""

    bits: int
    """Planes of a key; 0: one bucket holds all."""
    tables: int
    most: int
    """Bits of two sketches that may differ before the pair is passed over."""

    def harder(self, max_tables: int) -> Plan:
        """Twice as many tables, at most ``max_tables``, and more patience with a pair."""
        return Plan(self.bits, min(2 * self.tables, max_tables), self.most + 2 * _SPARE)


@dataclass(frozen=True)
class Sketches:
    """Rows of ``vectors`` in principal components, with their sketches and keys.

    The arrays lie in ``folder`` and are mapped, not loaded: whoever is handed sketches is handed
    little. Positions count in ``rows``.
    """

    vectors: Vectors
    cosine: float
    mean: Matrix
    components: Matrix
    """(width, dimensions), orthonormal columns."""
    scale: Matrix
    """(dimensions,): what planes are stretched by, so that no few components decide every side."""
    folder: Path

    @property
    def files(self) -> list[Path]:
        """Whatever its methods read."""
        return [self.vectors.file, *sorted(self.folder.glob("*.npy"))]

    @property
    def rows(self) -> Rows:
        """The rows of ``vectors`` that are sketched."""
        mapped: Rows = np.load(self.folder / "rows.npy", mmap_mode="r")
        return mapped

    @property
    def sketches(self) -> Bits:
        """(rows, 4): 256 sides."""
        mapped: Bits = np.load(self.folder / "sketches.npy", mmap_mode="r")
        return mapped

    @property
    def keys(self) -> Keys:
        """(tables, rows)."""
        mapped: Keys = np.load(self.folder / "keys.npy", mmap_mode="r")
        return mapped

    def near(self, left: Rows, right: Rows, device: str) -> tuple[Rows, Rows]:
        """Indices into ``left`` and ``right`` (positions) of all pairs that are close, and of few
        others: a projection never lengthens a distance."""
        import torch

        projected = np.load(self.folder / "projected.npy", mmap_mode="r")
        a, b = (torch.from_numpy(projected[side]).to(device) for side in (left, right))
        # One product gives a·b - |a|²/2 - |b|²/2 = -|a - b|²/2.
        halves = [(side * side).sum(dim=1, keepdim=True) / -2 for side in (a, b)]
        ones = [torch.ones_like(half) for half in halves]
        a = torch.cat([a, halves[0], ones[0]], dim=1)
        b = torch.cat([b, ones[1], halves[1]], dim=1)
        i, j = ((a @ b.T) >= self.cosine - 1.0 - SLACK).nonzero(as_tuple=True)
        return i.cpu().numpy(), j.cpu().numpy()

    def plan(self, config: SearchConfig) -> Plan:
        """The cheapest way to find pairs that are only just close, as often as is asked for.

        Such pairs are made up: two pictures that differ a little are taken to do so along the same
        axes as two that differ much. How far that holds is measured on real pairs afterwards.
        """
        rng = np.random.default_rng(1)
        rows = self.rows[np.sort(rng.integers(0, len(self.rows), 2 * _TRIALS))]
        unit = self.vectors.read(rng.permutation(rows))
        left, other = unit[:_TRIALS], unit[_TRIALS:]
        other = other - (other * left).sum(axis=1, keepdims=True) * left
        other /= np.maximum(np.linalg.norm(other, axis=1, keepdims=True), 1e-12)
        right = self.cosine * left + np.sqrt(max(0.0, 1 - self.cosine**2)) * other
        planes = self._planes(2, 4 * _PLANES)
        sides = [(side - self.mean) @ self.components @ planes > 0 for side in (left, right)]
        same = sides[0] == sides[1]
        most = int((~same[:, :_PLANES]).sum(axis=1).max()) + _SPARE
        return _cheapest(same.mean(axis=1), len(self.rows), most, config)

    def project(self, ctx: Context) -> None:
        """Write ``projected`` and ``sketches``."""
        rows, planes = self.rows, self._planes(3, _PLANES)
        shape = len(rows), self.components.shape[1]
        projected = self._create("projected", shape, np.float32)
        sketches = self._create("sketches", (len(rows), _PLANES // 64), np.uint64)
        for start in range(0, len(rows), _BLOCK):
            ctx.progress("sketching images", start, len(rows))
            at = slice(start, start + _BLOCK)
            block = (self.vectors.read(rows[at]) - self.mean) @ self.components
            projected[at] = block
            sketches[at] = np.packbits(block @ planes > 0, axis=1).view(np.uint64)

    def write_keys(self, plan: Plan, ctx: Context) -> None:
        """Write ``keys`` for every table; a table's planes are its own, however many there are."""
        projected = np.load(self.folder / "projected.npy", mmap_mode="r")
        keys = self._create("keys", (plan.tables, len(projected)), np.uint32)
        for first in range(0, plan.tables, _TABLES_AT_ONCE):
            ctx.progress("putting images into buckets", first, plan.tables)
            tables = range(first, min(first + _TABLES_AT_ONCE, plan.tables))
            planes = np.concatenate([self._planes(4 + t, plan.bits) for t in tables], axis=1)
            for start in range(0, len(projected) if plan.bits else 0, _BLOCK):
                at = slice(start, start + _BLOCK)
                sides = (projected[at] @ planes > 0).reshape(-1, len(tables), plan.bits)
                packed = np.zeros((*sides.shape[:2], 4), dtype=np.uint8)
                packed[..., : -(-plan.bits // 8)] = np.packbits(sides, axis=2, bitorder="little")
                keys[tables.start : tables.stop, at] = packed.view("<u4")[..., 0].T

    def _planes(self, seed: int, count: int) -> Matrix:
        """(dimensions, count): their normals, in principal components."""
        rng = np.random.default_rng(seed)
        normals = rng.standard_normal((count, len(self.scale)), dtype=np.float32)
        return np.ascontiguousarray((normals * self.scale).T)

    def _create(
        self, name: str, shape: tuple[int, ...], kind: npt.DTypeLike
    ) -> npt.NDArray[np.generic]:
        (self.folder / f"{name}.npy").unlink(missing_ok=True)
        needed = int(np.prod(shape)) * np.dtype(kind).itemsize
        free = shutil.disk_usage(self.folder).free
        if needed > free:  # a full disk below a mapped file would kill the process
            raise RunError(
                f"dedup: {self.folder} has {free / 2**30:.1f} GiB left and {needed / 2**30:.1f} "
                "are needed for sketches; set TMPDIR to a larger disk"
            )
        return np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", kind, shape)


def sketched(vectors: Vectors, rows: Rows, cosine: float, folder: Path, ctx: Context) -> Sketches:
    """Sketches of ``rows`` in ``folder``, without keys as yet."""
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(rows), min(_SAMPLE, len(rows)), replace=False)
    sample = vectors.read(rows[np.sort(chosen)])
    mean = sample.mean(axis=0)
    sample -= mean
    variance, axes = np.linalg.eigh(sample.T @ sample / len(sample))
    variance, axes = variance[::-1][:_WIDTH], axes[:, ::-1][:, :_WIDTH]
    # Halfway to equal weights: where all components weigh the same, noise decides as much as they.
    scale = np.maximum(variance, 1e-9) ** -0.25
    np.save(folder / "rows.npy", rows)
    components = np.ascontiguousarray(axes, dtype=np.float32)
    made = Sketches(vectors, cosine, mean, components, scale.astype(np.float32), folder)
    made.project(ctx)
    return made


def _cheapest(
    agreement: npt.NDArray[np.float64], count: int, most: int, config: SearchConfig
) -> Plan:
    """The plan that finds pairs of such ``agreement``, the share of planes that do not part one,
    in the least time. One bucket that holds all is always a way."""
    plans = []
    for bits in range(MOST_BITS + 1) if config.bits is None else [config.bits]:
        needed = _enough_tables(agreement**bits, config)
        tables = config.tables or min(needed, config.max_tables)
        cost = tables * (_ROW_COST + count / 2 ** (bits + 1))
        plans.append((needed > tables, cost, bits, tables))
    *_, bits, tables = min(plans)
    return Plan(bits, tables, most)


def _enough_tables(shared: npt.NDArray[np.float64], config: SearchConfig) -> int:
    """So many that pairs which share a bucket of one table with chances ``shared`` share one of
    any table as often as ``recall`` asks for, and more."""
    aim = 1 - (1 - config.recall) / _MARGIN
    low, high = 1, config.max_tables + 1
    while low < high:
        middle = (low + high) // 2
        found = float((1 - (1 - shared) ** middle).mean())
        low, high = (low, middle) if found >= aim else (middle + 1, high)
    return low
