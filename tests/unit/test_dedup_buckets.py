"""Sketches and buckets: what they compare, and what they spare."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from stages.base import LocalContext
from stages.dedup import SearchConfig, UnionFind, buckets
from stages.dedup.buckets import parts, within_buckets
from stages.dedup.images import Vectors
from stages.dedup.search import close_pairs
from stages.dedup.sketches import Plan, Sketches, sketched
from stages.dedup.ties import Ties, gathered
from stages.errors import RunError

COSINE = 0.95


def made(folder: Path, values: np.ndarray) -> Sketches:
    vectors = Vectors(folder / "vectors.f16", *values.shape)
    vectors.write(np.arange(len(values)), values.astype(np.float16))
    return sketched(vectors, np.arange(len(values)), COSINE, folder, LocalContext())


def scattered(count: int, seed: int = 0) -> np.ndarray:
    """Every fifth is near the one before it."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, 32))
    values[1::5] = values[::5] + 0.15 * rng.normal(size=values[::5].shape)
    return values


def searched(sketches: Sketches, plan: Plan, fresh: np.ndarray, watch: np.ndarray) -> list[Ties]:
    sketches.write_keys(plan, LocalContext())
    work = parts(plan, len(fresh), 100)
    assert len(work) > plan.tables or plan.bits == 0
    return [within_buckets(sketches, plan, part, fresh, watch) for part in work]


def close(sketches: Sketches) -> set[tuple[int, int]]:
    unit = sketches.vectors.read(np.asarray(sketches.rows))
    left, right = np.nonzero(np.triu(unit @ unit.T >= COSINE - 1e-6, 1))
    return set(zip(left.tolist(), right.tolist(), strict=True))


def test_each_close_pair_is_found_once_and_no_other(tmp_path: Path) -> None:
    sketches = made(tmp_path, scattered(600))
    every = np.ones(600, dtype=np.bool_)
    found = gathered(searched(sketches, Plan(bits=4, tables=60, most=256), every, every))
    pairs = [tuple(pair) for pair in found.watched.tolist()]
    assert len(pairs) == len(set(pairs)) == found.pairs
    assert set(pairs) == close(sketches)
    assert len(pairs) > 80


def test_two_images_of_earlier_rounds_are_not_compared(tmp_path: Path) -> None:
    sketches = made(tmp_path, scattered(600))
    every, fresh = np.ones(600, dtype=np.bool_), np.arange(600) % 10 == 0
    found = gathered(searched(sketches, Plan(bits=4, tables=60, most=256), fresh, every))
    expected = {pair for pair in close(sketches) if fresh[list(pair)].any()}
    assert {tuple(pair) for pair in found.watched.tolist()} == expected
    assert 0 < len(expected) < len(close(sketches))


def test_pairs_of_unlike_sketches_are_passed_over(tmp_path: Path) -> None:
    values = scattered(600)
    values[:40] = values[0]
    sketches = made(tmp_path, values)
    every = np.ones(600, dtype=np.bool_)
    found = gathered(searched(sketches, Plan(bits=4, tables=60, most=0), every, every))
    equal = {(a, b) for a in range(40) for b in range(a + 1, 40)}
    assert {tuple(pair) for pair in found.watched.tolist()} == equal < close(sketches)


@pytest.mark.parametrize("alike", [0, 300])
@pytest.mark.parametrize("news", [2, 3, 100])
def test_a_large_bucket_ties_a_crowd_to_some_of_it(
    tmp_path: Path, alike: int, news: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buckets, "_MANY", 64)
    values = scattered(600)
    values[:alike] = values[0] + 0.02 * values[:alike]
    sketches = made(tmp_path, values)
    fresh, watch = np.arange(600) % news > 0, np.arange(600) % 50 == 0
    if news == 100:  # hardly anything is new
        fresh = ~fresh
    found = gathered(searched(sketches, Plan(bits=1, tables=20, most=256), fresh, watch))
    truth = {pair for pair in close(sketches) if fresh[list(pair)].any()}
    watched = {pair for pair in truth if watch[list(pair)].any()}
    pairs = [tuple(pair) for pair in found.watched.tolist()]
    assert set(pairs) == watched and len(pairs) == len(watched)
    if alike and news < 100:
        assert found.pairs < len(truth) / 2
    expected, sets = UnionFind(600), UnionFind(600)
    expected.union(*np.array(sorted(truth)).T)
    sets.union(found.left, found.right)
    assert sets.roots(np.arange(600)).tolist() == expected.roots(np.arange(600)).tolist()


def test_pairs_that_are_only_just_close_share_a_bucket_as_often_as_planned(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    values = rng.normal(size=(4_000, 64))
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    other = (
        values[2_000:] - (values[2_000:] * values[:2_000]).sum(1, keepdims=True) * values[:2_000]
    )
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    values[2_000:] = COSINE * values[:2_000] + np.sqrt(1 - COSINE**2) * other
    sketches = made(tmp_path, values)
    plan = sketches.plan(SearchConfig(recall=0.75, bits=10))
    sketches.write_keys(plan, LocalContext())
    keys = np.asarray(sketches.keys)
    met = (keys[:, :2_000] == keys[:, 2_000:]).any(axis=0).mean()
    assert 0.93 < met < 0.98
    assert len(np.unique(keys)) > 500
    bits = np.bitwise_count(sketches.sketches[:2_000] ^ sketches.sketches[2_000:]).sum(axis=1)
    assert (bits > plan.most).mean() < 0.001
    assert plan.most < 100  # unlike ones differ in half of 256


def test_a_plan_of_many_images_has_many_buckets(tmp_path: Path) -> None:
    sketches = made(tmp_path, scattered(600))
    few = sketches.plan(SearchConfig())
    bits = [few.bits]
    for count in (10_000, 10_000_000):
        np.save(tmp_path / "rows.npy", np.resize(np.arange(600), count))
        bits.append(sketches.plan(SearchConfig()).bits)
    assert bits == sorted(set(bits)) and bits[-1] - bits[0] > 6


def test_where_close_pairs_share_nothing_all_are_compared(tmp_path: Path) -> None:
    """All images in one heap: seen from its middle, close ones are anywhere."""
    rng = np.random.default_rng(0)
    sketches = made(tmp_path, np.eye(32)[0] + 0.001 * rng.normal(size=(600, 32)))
    assert sketches.plan(SearchConfig(max_tables=8)).bits == 0
    assert sketches.plan(SearchConfig(max_tables=8, bits=9)).tables == 8
    config, every = SearchConfig(exhaustive_below=0, max_tables=8), np.ones(600, dtype=np.bool_)
    ties, measured = close_pairs(
        sketches.vectors, np.arange(600), every, COSINE, config, LocalContext(), tmp_path
    )
    assert ties.pairs == measured.pairs == 600 * 599 / 2
    assert measured.recall == 1.0


def test_fewer_tables_than_it_takes_have_fewer_and_larger_buckets(tmp_path: Path) -> None:
    sketches = made(tmp_path, scattered(600))
    np.save(tmp_path / "rows.npy", np.resize(np.arange(600), 1_000_000))
    plans = [sketches.plan(SearchConfig(tables=tables)) for tables in (1, 4, 16)]
    assert [plan.tables for plan in plans] == [1, 4, 16]
    assert plans[0].bits < plans[1].bits < plans[2].bits < 20


def test_a_full_disk_is_told_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1 << 10)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    with pytest.raises(RunError, match=r"0\.0 GiB left .* set TMPDIR to a larger disk"):
        made(tmp_path, scattered(600))


def test_more_tables_than_allowed_are_refused() -> None:
    with pytest.raises(ValueError, match="tables 9 exceeds max_tables 8"):
        SearchConfig(tables=9, max_tables=8)
