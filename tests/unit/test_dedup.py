"""Clusters of duplicate images, from real Parquet files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.base import LocalContext
from stages.dedup import DedupConfig, DedupStage, UnionFind, search
from stages.errors import RunError
from stages.keeper import ImageConfig
from stages.schemas import CLUSTERS, DOWNLOAD, EMBEDDINGS
from tests.tables import filled, write_shards

RNG = np.random.default_rng


def download(rows: Sequence[dict[str, Any]]) -> pa.Table:
    return filled(DOWNLOAD, rows, source="web", status="success")


def embeddings(vectors: dict[str, Any], model: str = "m") -> pa.Table:
    rows = [
        {
            "sample_id": sample,
            "embedding": None if vector is None else np.asarray(vector, dtype=np.float16),
            "status": "failed" if vector is None else "success",
            "model": model,
        }
        for sample, vector in vectors.items()
    ]
    return pa.Table.from_pylist(rows, schema=EMBEDDINGS)


def run(
    folder: Path,
    downloads: Sequence[pa.Table],
    vectors: Sequence[pa.Table] = (),
    config: DedupConfig | None = None,
) -> dict[str, dict[str, Any]]:
    inputs = {
        "download": write_shards(folder, "download", downloads),
        "embeddings": write_shards(folder, "embeddings", vectors),
    }
    DedupStage(config or DedupConfig(), ImageConfig()).run(inputs, folder, LocalContext())
    table = pq.read_table(folder / "clusters.parquet")
    assert table.schema == CLUSTERS
    return {row["sample_id"]: row for row in table.to_pylist()}


def clusters(found: dict[str, dict[str, Any]]) -> set[frozenset[str]]:
    groups: dict[str, set[str]] = {}
    for sample, row in found.items():
        groups.setdefault(row["cluster_id"], set()).add(sample)
    assert all(min(members) == cluster for cluster, members in groups.items())
    return {frozenset(members) for members in groups.values()}


def near(vector: np.ndarray, cosine: float, seed: int) -> np.ndarray:
    """A unit vector at exactly this cosine to a unit vector."""
    other = RNG(seed).normal(size=vector.size)
    other -= (other @ vector) * vector
    other /= np.linalg.norm(other)
    return cosine * vector + np.sqrt(1 - cosine**2) * other


def unit(seed: int, length: int = 64) -> np.ndarray:
    vector = RNG(seed).normal(size=length)
    return vector / np.linalg.norm(vector)


def flipped(hexadecimal: str, bits: int) -> str:
    value = int(hexadecimal, 16) ^ ((1 << bits) - 1)
    return f"{value:064x}"


HASH = "a1" * 32


def test_each_net_ties_what_it_should_and_says_so(tmp_path: Path) -> None:
    a, b, c = unit(1), unit(2), unit(3)
    rows = [
        {"sample_id": "a0", "sha256": "same", "phash": HASH},
        {"sample_id": "a1", "sha256": "same", "phash": HASH},
        {"sample_id": "b0", "sha256": "b0", "phash": flipped(HASH, 128)},
        {"sample_id": "b1", "sha256": "b1", "phash": flipped(flipped(HASH, 128), 32)},
        {"sample_id": "b2", "sha256": "b2", "phash": flipped(flipped(HASH, 128), 33)},
        {"sample_id": "c0", "sha256": "c0", "phash": None},
        {"sample_id": "c1", "sha256": "c1", "phash": None},
        {"sample_id": "d0", "sha256": "d0", "phash": flipped(HASH, 128)},
    ]
    vectors = {
        "a0": a, "a1": a, "b0": b, "b1": near(b, 0.93, 7), "b2": near(b, 0.93, 8),
        "c0": c, "c1": near(c, 0.98, 9), "d0": near(b, 0.85, 10),
    }  # fmt: skip
    found = run(tmp_path, [download(rows)], [embeddings(vectors)])
    expected = {"a0": "exact", "a1": "exact", "b0": "perceptual", "b1": "perceptual", "b2": None}
    expected |= {"c0": "semantic", "c1": "semantic", "d0": None}
    assert {sample: row["net"] for sample, row in found.items()} == expected
    assert clusters(found) == {
        frozenset({"a0", "a1"}), frozenset({"b0", "b1"}), frozenset({"b2"}),
        frozenset({"c0", "c1"}), frozenset({"d0"}),
    }  # fmt: skip
    assert found["a1"]["similarity"] == 1.0
    assert found["b1"]["similarity"] == pytest.approx(0.93, abs=2e-3)
    assert found["c0"]["similarity"] == pytest.approx(0.98, abs=2e-3)
    assert found["d0"]["similarity"] is None


def test_only_downloaded_web_images_take_part(tmp_path: Path) -> None:
    rows = [
        {"sample_id": "web", "sha256": "x"},
        {"sample_id": "human", "sha256": "x", "source": "human"},
        {"sample_id": "dead", "status": "http_404"},
        {"sample_id": "web", "sha256": "x", "status": "duplicate_row"},
    ]
    assert set(run(tmp_path, [download(rows)])) == {"web"}


def test_without_embeddings_only_bytes_tie(tmp_path: Path) -> None:
    rows = [
        {"sample_id": "a", "sha256": "x", "phash": HASH},
        {"sample_id": "b", "sha256": "y", "phash": HASH},
        {"sample_id": "c", "sha256": "x", "phash": HASH},
    ]
    found = run(tmp_path, [download(rows)])
    assert clusters(found) == {frozenset({"a", "c"}), frozenset({"b"})}


@pytest.mark.parametrize("bad", [[0.0] * 8, [float("nan")] * 8, [float("inf")] * 8, None])
def test_unusable_embeddings_merge_nothing(tmp_path: Path, bad: Any) -> None:
    rows = [{"sample_id": f"{i}", "sha256": f"{i}", "phash": HASH} for i in range(6)]
    vectors = {f"{i}": bad for i in range(5)} | {"5": [1.0] * 8}
    found = run(tmp_path, [download(rows)], [embeddings(vectors)])
    assert len(clusters(found)) == 6


def test_a_copy_with_a_failed_embedding_is_spoken_for(tmp_path: Path) -> None:
    """a and b are one file and only b has an embedding; it also ties c."""
    rows = [{"sample_id": s, "sha256": h} for s, h in [("a", "x"), ("b", "x"), ("c", "y")]]
    vector = unit(1)
    found = run(
        tmp_path,
        [download(rows)],
        [embeddings({"a": None, "b": vector, "c": near(vector, 0.99, 2)})],
    )
    assert clusters(found) == {frozenset({"a", "b", "c"})}
    assert [found[s]["net"] for s in "abc"] == ["exact", "exact", "semantic"]
    assert found["c"]["similarity"] == pytest.approx(0.99, abs=2e-3)


def test_embeddings_that_cannot_be_compared_stop_the_run(tmp_path: Path) -> None:
    rows = download([{"sample_id": s, "sha256": s} for s in "ab"])
    lengths = [embeddings({"a": [1.0, 0.0]}), embeddings({"b": [1.0, 0.0, 0.0]})]
    with pytest.raises(RunError, match="lengths 2 and 3"):
        run(tmp_path, [rows], lengths)
    models = [embeddings({"a": [1.0, 0.0]}, "m"), embeddings({"b": [1.0, 0.0]}, "n")]
    with pytest.raises(RunError, match=r"models \['m', 'n'\]"):
        run(tmp_path, [rows], models)
    with pytest.raises(RunError, match="one file"):
        run(tmp_path, [rows], [embeddings({"a": [1.0, 0.0], "b": [1.0]})])


@pytest.mark.parametrize("count", [0, 1])
def test_none_or_one_image(tmp_path: Path, count: int) -> None:
    rows = [{"sample_id": "a", "sha256": "x", "phash": HASH}][:count]
    vectors = {"a": unit(1)} if count else {}
    assert len(run(tmp_path, [download(rows)], [embeddings(vectors)])) == count
    assert run(tmp_path, [], []) == {}


def test_ten_thousand_copies_are_compared_once(tmp_path: Path) -> None:
    rows = [{"sample_id": f"{i:05d}", "sha256": "x", "phash": HASH} for i in range(10_000)]
    vectors = {row["sample_id"]: unit(1, 8) for row in rows}
    rows.append({"sample_id": "z", "sha256": "z", "phash": flipped(HASH, 200)})
    found = run(tmp_path, [download(rows)], [embeddings(vectors | {"z": unit(2, 8)})])
    assert sorted(map(len, clusters(found))) == [1, 10_000]


def test_equals_brute_force_in_any_order_of_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = RNG(5)
    centres = [unit(seed, 16) for seed in range(40)]
    hashes = [f"{rng.bytes(32).hex()}" for _ in range(40)]
    rows, vectors = [], {}
    for number in range(300):
        centre = int(rng.integers(40))
        sample = f"{rng.bytes(8).hex()}"
        vectors[sample] = near(centres[centre], float(rng.uniform(0.9, 1.0)), number)
        mask = sum(1 << int(bit) for bit in rng.choice(256, int(rng.integers(0, 30)), False))
        phash = f"{int(hashes[centre], 16) ^ mask:064x}"
        rows.append({"sample_id": sample, "sha256": f"{number}", "phash": phash})
        if number % 5 == 0:  # a copy of the same file
            rows.append(rows[-1] | {"sample_id": rng.bytes(8).hex()})
            vectors[rows[-1]["sample_id"]] = vectors[sample]
    config = DedupConfig(perceptual_distance=20)
    expected = brute_force(rows, vectors, config)
    assert 20 < len(expected) < 280

    monkeypatch.setattr(search, "_BLOCK", 64)
    seen = []
    for seed in range(3):
        order = RNG(seed).permutation(len(rows))
        parts = np.array_split(order, 3 + seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        shards = [download([rows[i] for i in part]) for part in parts]
        samples = [[rows[i]["sample_id"] for i in part] for part in reversed(parts)]
        found = run(
            folder, shards, [embeddings({s: vectors[s] for s in part}) for part in samples], config
        )
        assert clusters(found) == expected
        seen.append(found)
    assert seen[0] == seen[1] == seen[2]


def brute_force(
    rows: Sequence[dict[str, Any]], vectors: dict[str, np.ndarray], config: DedupConfig
) -> set[frozenset[str]]:
    groups = {row["sample_id"]: {row["sample_id"]} for row in rows}
    halves = {sample: vector.astype(np.float16).astype(float) for sample, vector in vectors.items()}
    for a, b in combinations(rows, 2):
        u, v = halves[a["sample_id"]], halves[b["sample_id"]]
        cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
        bits = (int(a["phash"], 16) ^ int(b["phash"], 16)).bit_count()
        perceptual = bits <= config.perceptual_distance and cosine >= config.perceptual_cosine
        if a["sha256"] == b["sha256"] or perceptual or cosine >= config.semantic_cosine:
            merged = groups[a["sample_id"]] | groups[b["sample_id"]]
            for sample in merged:
                groups[sample] = merged
    return {frozenset(group) for group in groups.values()}


def test_union_find_matches_a_plain_search() -> None:
    rng = RNG(0)
    left, right = rng.integers(0, 2_000, (2, 1_500))
    sets = UnionFind(2_000)
    for part in np.array_split(np.arange(1_500), 7):
        sets.union(left[part], right[part])
    root = list(range(2_000))
    for a, b in zip(left, right, strict=True):
        low, high = sorted((root[a], root[b]))
        root = [low if value == high else value for value in root]
    assert sets.roots(np.arange(2_000)).tolist() == root


def test_labelled_real_pictures(tmp_path: Path) -> None:
    """At the default distance the perceptual hash finds 23 of 25 same pictures, and none of 72
    different ones even where every embedding agrees."""
    if "CAPFILT_TEST_DATA" not in os.environ:
        pytest.skip("CAPFILT_TEST_DATA is unset: no labelled pictures")
    import imagehash
    from PIL import Image

    folder = Path(os.environ["CAPFILT_TEST_DATA"]) / "near_duplicates"
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    names = sorted({pair[side] for pair in pairs for side in "ab"})
    rows = []
    for name in names:
        with Image.open(folder / name) as image:
            phash = str(imagehash.phash(image.convert("RGB"), hash_size=16))
        rows.append({"sample_id": name, "sha256": name, "phash": phash})
    vectors = {name: near(unit(1, 512), 0.97, seed) for seed, name in enumerate(names)}
    found = run(tmp_path, [download(rows)], [embeddings(vectors)])
    together: dict[str, int] = {}
    for pair in pairs:
        same = found[pair["a"]]["cluster_id"] == found[pair["b"]]["cluster_id"]
        together[pair["label"]] = together.get(pair["label"], 0) + same
    assert together["same_picture"] == 23
    assert together["different"] == 0
