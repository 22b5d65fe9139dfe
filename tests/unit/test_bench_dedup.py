"""The benchmark of the search for duplicates, at a size for a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stages.dedup import SearchConfig
from tests.bench.dedup import compare, embeddings, growth

SMALL = SearchConfig(exhaustive_below=0)


@pytest.mark.parametrize(("kind", "median"), [("isotropic", 0.0), ("CLIP-like", 0.6)])
def test_ours_finds_what_faiss_finds(kind: str, median: float) -> None:
    lines = {line["metric"].partition(": ")[2]: line for line in compare(kind, 3000, 300, SMALL)}
    assert lines["median cosine"]["value"] == pytest.approx(median, abs=0.02)
    assert 120 <= lines["pairs"]["value"] <= 240
    assert lines["recall"]["value"] >= 0.995
    assert lines["precision"]["value"] == 1.0
    assert lines["time"]["ratio"] > 0


def test_growth_is_told_by_size_and_as_an_exponent() -> None:
    lines = growth([1000, 2000], SMALL)
    assert [line["metric"] for line in lines if line["unit"] == "s"] == [
        "growth 1,000: time",
        "growth 2,000: time",
    ]
    assert np.isfinite(lines[-1]["value"])


def test_planted_images_lie_as_near_as_said(tmp_path: Path) -> None:
    vectors = embeddings("CLIP-like", 400, 100, tmp_path / "v", seed=3)
    unit = vectors.read(np.arange(400))
    nearest = (unit[300:] @ unit[:300].T).max(axis=1)
    assert nearest.min() > 0.945 and nearest.max() <= 1.001
    assert 0.2 < (nearest < 0.97).mean() < 0.6
