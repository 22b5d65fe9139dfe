"""Search for near duplicates: ours against FAISS looking at every pair, and how ours grows.

    python -m tests.bench.dedup [--json FILE] [--images 200000] [--grow 125000,250000,500000]

Planted: near duplicates at a cosine of 0.95 to 1 of images drawn at random; a pair counts from
0.97 on. Two kinds of embeddings: isotropic, and CLIP-like: a common mean and a spectrum that
falls off, so that two unlike images have a median cosine of about 0.6. Seeds are fixed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.base import LocalContext
from stages.dedup.config import SearchConfig
from stages.dedup.images import Vectors
from stages.dedup.search import Measured, close_pairs
from tests.bench.memory import Peak

_WIDTH = 512
_COSINE = 0.97
_BLOCK = 25_000
_CONTEXT = LocalContext(threads=len(os.sched_getaffinity(0)))

Values = npt.NDArray[np.float32]


def embeddings(kind: str, rows: int, planted: int, file: Path, seed: int = 0) -> Vectors:
    """``rows`` vectors in ``file``, the last ``planted`` of which are near earlier ones."""
    rng = np.random.default_rng(seed)
    vectors = Vectors(file, rows, _WIDTH)
    scale, mean = _spectrum(kind)
    for start in range(0, rows - planted, _BLOCK):
        count = min(_BLOCK, rows - planted - start)
        block = rng.standard_normal((count, _WIDTH), dtype=np.float32) * scale + mean
        vectors.write(np.arange(start, start + count), _half(block))
    for start in range(rows - planted, rows, _BLOCK):
        count = min(_BLOCK, rows - start)
        original = vectors.read(np.sort(rng.choice(rows - planted, count, replace=False)))
        # Two pictures that differ a little do so as two that differ much: along the same axes.
        other = rng.standard_normal((count, _WIDTH), dtype=np.float32) * scale
        other -= (other * original).sum(axis=1, keepdims=True) * original
        other /= np.linalg.norm(other, axis=1, keepdims=True)
        cosine = rng.uniform(0.95, 1.0, (count, 1)).astype(np.float32)
        near = cosine * original + np.sqrt(1 - cosine**2) * other
        vectors.write(np.arange(start, start + count), _half(near))
    return vectors


def _spectrum(kind: str) -> tuple[Values, Values]:
    """Standard deviation of each axis, and the mean."""
    if kind == "isotropic":
        return np.ones(_WIDTH, np.float32), np.zeros(_WIDTH, np.float32)
    scale = (1.0 + np.arange(_WIDTH, dtype=np.float32)) ** -0.4
    mean = np.zeros(_WIDTH, np.float32)
    mean[-1] = np.sqrt(1.5 * (scale**2).sum())  # 1.5 of 2.5 parts are common: a cosine of 0.6
    return scale, mean


def _half(block: Values) -> npt.NDArray[np.float16]:
    return (block / np.linalg.norm(block, axis=1, keepdims=True)).astype(np.float16)


def exhaustive(vectors: Vectors) -> tuple[npt.NDArray[np.int64], float]:
    """Every pair at or above the cosine that FAISS finds, as `Ties.incident` has it; seconds."""
    import faiss

    every = np.arange(vectors.rows)
    unit = vectors.read(every)
    started = time.perf_counter()
    index = faiss.IndexFlatIP(_WIDTH)
    index.add(unit)
    keys = []
    for start in range(0, vectors.rows, _BLOCK):
        rows = every[start : start + _BLOCK]
        ends, _, found = index.range_search(unit[rows], _COSINE)
        left = np.repeat(rows, np.diff(ends.astype(np.int64)))
        once = left < found
        keys.append(left[once] * vectors.rows + found[once])
    return np.unique(np.concatenate(keys)), time.perf_counter() - started


def ours(
    vectors: Vectors, config: SearchConfig, scratch: Path, every: bool
) -> tuple[npt.NDArray[np.int64], Measured, float]:
    """The pairs that ours finds (where ``every``), what it measured of itself, seconds."""
    rows, fresh = np.arange(vectors.rows), np.ones(vectors.rows, dtype=np.bool_)
    started = time.perf_counter()
    ties, measured = close_pairs(
        vectors, rows, fresh, _COSINE, config, _CONTEXT, scratch, fresh if every else None
    )
    return ties.incident(fresh), measured, time.perf_counter() - started


def compare(kind: str, rows: int, planted: int, config: SearchConfig) -> list[dict[str, Any]]:
    """Recall, precision and time against FAISS, both in this process on the same cores."""
    with tempfile.TemporaryDirectory() as folder:
        vectors = embeddings(kind, rows, planted, Path(folder) / "vectors.f16")
        found, measured, seconds = ours(vectors, config, Path(folder), every=True)
        truth, theirs = exhaustive(vectors)
        sample = vectors.read(np.sort(np.random.default_rng(0).choice(rows, 2_000)))
    right = len(np.intersect1d(found, truth))
    median = float(np.median(sample[:1000] @ sample[1000:].T))
    name = f"{kind} {rows:,}"
    return [
        _line(f"{name}: median cosine", median, ""),
        _line(f"{name}: pairs", len(truth), "", "FAISS, every pair"),
        _line(f"{name}: recall", right / max(len(truth), 1), "", "FAISS, every pair"),
        _line(f"{name}: precision", right / max(len(found), 1), "", "FAISS, every pair"),
        _line(f"{name}: recall as the run measures it", measured.recall, ""),
        _line(f"{name}: tables of 2^{measured.bits} buckets", measured.tables, ""),
        _line(f"{name}: time", seconds, "s", "FAISS, every pair", seconds / theirs),
        _line(f"{name}: FAISS, every pair", theirs, "s"),
    ]


def growth(sizes: list[int], config: SearchConfig) -> list[dict[str, Any]]:
    """Time and memory of CLIP-like embeddings, 5% of which are planted, and the exponent."""
    lines, times = [], []
    for rows in sizes:
        with tempfile.TemporaryDirectory() as folder:
            vectors = embeddings("CLIP-like", rows, rows // 20, Path(folder) / "vectors.f16")
            with Peak(os.getpid()) as peak:
                _, measured, seconds = ours(vectors, config, Path(folder), every=False)
        times.append(seconds)
        lines += [
            _line(f"growth {rows:,}: time", seconds, "s"),
            _line(f"growth {rows:,}: peak memory", peak.bytes / 2**30, "GiB"),
            _line(f"growth {rows:,}: sampled recall", measured.recall, ""),
            _line(f"growth {rows:,}: sampled pairs", measured.sampled_pairs, ""),
            _line(f"growth {rows:,}: tables of 2^{measured.bits} buckets", measured.tables, ""),
        ]
    if len(sizes) > 1:
        slope = float(np.polyfit(np.log(sizes), np.log(times), 1)[0])
        lines.append(_line("growth: exponent of the time", slope, ""))
    return lines


def _line(
    metric: str, value: float, unit: str, against: str = "", ratio: float | None = None
) -> dict[str, Any]:
    return {"metric": metric, "value": value, "unit": unit, "against": against, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--images", type=int, default=200_000, help="0 leaves the comparison out")
    parser.add_argument("--planted", type=int, default=10_000)
    parser.add_argument("--grow", default="125000,250000,500000,1000000", help="'' leaves it out")
    given = parser.parse_args()
    config = SearchConfig()
    lines: list[dict[str, Any]] = []
    for kind in ("isotropic", "CLIP-like") if given.images else ():
        lines += _shown(compare(kind, given.images, given.planted, config))
    if given.grow:
        lines += _shown(growth([int(size) for size in given.grow.split(",")], config))
    if given.json:
        given.json.write_text(json.dumps(lines, indent=1))


def _shown(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for line in lines:
        ratio = "" if line["ratio"] is None else f"  ({line['ratio']:.3f} of {line['against']})"
        print(f"{line['metric']:56} {line['value']:14,.4f} {line['unit']}{ratio}", flush=True)
    return lines


if __name__ == "__main__":
    main()
