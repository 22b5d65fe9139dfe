"""Clusters of duplicate images, from real Parquet files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stages.base import LocalContext
from stages.dedup import (
    DedupConfig,
    DedupStage,
    SearchConfig,
    UnionFind,
    exhaustive,
    hashes,
    search,
    ties,
)
from stages.dedup import images as dedup_images
from stages.errors import RunError
from stages.keeper import ImageConfig, perceptual_hash
from stages.models.images import decode
from stages.schemas import CLUSTERS, DEDUP, DOWNLOAD, EMBEDDINGS
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

    monkeypatch.setattr(exhaustive, "BLOCK", 64)
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


def picture_embedding(image: Image.Image) -> np.ndarray:
    """Where which colours lie: sixteen of them, of zero mean and length 1. Small, and real."""
    colours = np.asarray(image.resize((4, 4), Image.Resampling.LANCZOS), dtype=float).reshape(-1, 3)
    flat = (colours - colours.mean(axis=0)).ravel()
    unit_: np.ndarray = flat / np.linalg.norm(flat)
    return unit_


@pytest.mark.parametrize(("distance", "same"), [(32, 23), (92, 25)])
def test_labelled_real_pictures(tmp_path: Path, distance: int, same: int) -> None:
    """With room enough the perceptual net finds all 25 same pictures, and none of 72 others, one
    of which is nearer by its hash than one of the same."""
    if "CAPFILT_TEST_DATA" not in os.environ:
        pytest.skip("CAPFILT_TEST_DATA is unset: no labelled pictures")
    folder = Path(os.environ["CAPFILT_TEST_DATA"]) / "near_duplicates"
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    rows, vectors = [], {}
    for name in sorted({pair[side] for pair in pairs for side in "ab"}):
        image = decode((folder / name).read_bytes())
        rows.append({"sample_id": name, "sha256": name, "phash": perceptual_hash(image)})
        vectors[name] = picture_embedding(image)
    config = DedupConfig(perceptual_distance=distance, semantic_cosine=None)
    found = run(tmp_path, [download(rows)], [embeddings(vectors)], config)
    together: dict[str, int] = {}
    for pair in pairs:
        tied = found[pair["a"]]["cluster_id"] == found[pair["b"]]["cluster_id"]
        together[pair["label"]] = together.get(pair["label"], 0) + tied
    assert together["same_picture"] == same
    assert together["different"] == 0


def test_equal_pixels_in_different_files_are_copies(tmp_path: Path) -> None:
    rows = [
        {"sample_id": "a", "sha256": "x", "pixel_sha256": "p"},
        {"sample_id": "b", "sha256": "y", "pixel_sha256": "p"},
        {"sample_id": "c", "sha256": "y", "pixel_sha256": "q"},
        {"sample_id": "d", "sha256": "z", "pixel_sha256": None},
    ]
    found = run(tmp_path, [download(rows)])
    assert clusters(found) == {frozenset("abc"), frozenset("d")}
    assert [found[s]["copy_of"] for s in "abcd"] == ["a", "a", "a", None]


def test_a_hash_alone_may_be_enough_and_nets_may_be_off(tmp_path: Path) -> None:
    rows = [
        {"sample_id": "a", "sha256": "x", "phash": HASH},
        {"sample_id": "b", "sha256": "y", "phash": flipped(HASH, 9)},
        {"sample_id": "c", "sha256": "z", "phash": HASH},
    ]
    alone = run(tmp_path, [download(rows)], (), DedupConfig(perceptual_cosine=None))
    assert clusters(alone) == {frozenset("abc")}
    assert [alone[s]["hamming"] for s in "abc"] == [0, 9, 0]
    vectors = [embeddings({s: unit(1) for s in "abc"})]
    off = DedupConfig(perceptual_distance=None, semantic_cosine=None)
    assert len(clusters(run(tmp_path, [download(rows)], vectors, off))) == 3


def test_a_chain_of_unlike_images_is_cut(tmp_path: Path) -> None:
    """Each image is close to the next; the first and the last have nothing in common."""
    a, b = np.eye(8)[:2]
    angles = np.linspace(0, np.pi / 2, 16)
    vectors = {f"{i:02d}": np.cos(x) * a + np.sin(x) * b for i, x in enumerate(angles)}
    rows = [{"sample_id": s, "sha256": s} for s in vectors]
    rows.append({"sample_id": "copy", "sha256": "15"})
    for guard, least in ((None, 0.0), (0.85, np.cos(2 * np.arccos(0.85)))):
        config = DedupConfig(cluster_cosine=guard)
        found = run(tmp_path, [download(rows)], [embeddings(vectors)], config)
        assert len({row["chain_id"] for row in found.values()}) == 1
        assert (len(clusters(found)) == 1) == (guard is None)
        assert found["copy"]["cluster_id"] == found["15"]["cluster_id"]
        measured = facts(tmp_path)
        assert measured["clusters", "chains_cut"] == (guard is not None)
        assert measured["clusters", "widest_cosine"] >= least - 2e-3
    assert min(
        vectors[a] @ vectors[b] for group in clusters(found) for a in group - {"copy"}
        for b in group - {"copy"}
    ) == pytest.approx(measured["clusters", "widest_cosine"], abs=2e-3)  # fmt: skip


def facts(folder: Path) -> dict[tuple[str, str], float]:
    table = pq.read_table(folder / "dedup.parquet")
    assert table.schema == DEDUP
    return {(row["net"], row["metric"]): row["value"] for row in table.to_pylist()}


def test_the_guard_is_never_stricter_than_a_net() -> None:
    assert DedupConfig().guard == 0.85
    assert DedupConfig(perceptual_cosine=0.2).guard == 0.2
    assert DedupConfig(perceptual_cosine=None).guard is None
    assert DedupConfig(perceptual_cosine=0.2, perceptual_distance=None).guard == 0.85


def many(count: int, seed: int = 0) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Images of which a third are near an earlier one, by hash, by embedding, or by bytes."""
    rng = RNG(seed)
    rows: list[dict[str, Any]] = []
    vectors: dict[str, np.ndarray] = {}
    for number in range(count):
        sample, kind = rng.bytes(8).hex(), number % 9
        row = {"sample_id": sample, "sha256": f"{number}", "phash": rng.bytes(32).hex()}
        vector = unit(int(rng.integers(1 << 40)), 32)
        if number > 9 and kind in (0, 1, 2):
            old = rows[int(rng.integers(len(rows)))]
            cosine = float(rng.uniform(0.93, 1.0))
            vector = near(vectors[old["sample_id"]], cosine, int(rng.integers(1 << 40)))
            if kind == 1:
                row["phash"] = flipped(old["phash"], int(rng.integers(60)))
            elif kind == 2:
                row |= {"sha256": old["sha256"], "phash": old["phash"]}
                vector = vectors[old["sample_id"]]
        rows.append(row)
        vectors[sample] = vector / np.linalg.norm(vector)
    return rows, vectors


BUCKETS = DedupConfig(search=SearchConfig(exhaustive_below=0, bits=4))


class Threads(LocalContext):
    """Work spread over threads, which end in any order."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    def map(self, function: Any, items: Any, reads: Any = (), gpus: float = 0.0) -> Any:
        assert all(Path(file).is_file() for file in reads)
        with ThreadPoolExecutor(self._count) as pool:
            return list(pool.map(function, items))


def test_shards_workers_and_batches_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, vectors = many(900)
    seen = []
    for number, (workers, batch, rows_a_part) in enumerate(
        [(1, 8192, 1 << 22), (3, 7, 100), (2, 100, 400)]
    ):
        monkeypatch.setattr(dedup_images, "_BATCH", batch)
        monkeypatch.setattr(search, "_ROWS", rows_a_part)
        monkeypatch.setattr(exhaustive, "_FEW", 1)
        folder = tmp_path / str(number)
        folder.mkdir()
        parts = np.array_split(RNG(number).permutation(len(rows)), 1 + 2 * number)
        inputs = {
            "download": write_shards(folder, "d", [download([rows[i] for i in p]) for p in parts]),
            "embeddings": write_shards(
                folder, "e",
                [
                    embeddings({rows[i]["sample_id"]: vectors[rows[i]["sample_id"]] for i in p})
                    for p in reversed(parts)
                ],
            ),
        }  # fmt: skip
        DedupStage(BUCKETS, ImageConfig()).run(inputs, folder, Threads(workers))
        tables = [pq.read_table(folder / f"{t}.parquet") for t in ("clusters", "dedup")]
        seen.append([table.to_pylist() for table in tables])
    assert seen[0] == seen[1] == seen[2]
    measured = facts(folder)
    assert measured["semantic", "bits"] == 4
    assert measured["semantic", "tables"] > 1
    assert measured["semantic", "sampled_pairs"] > 50
    assert measured["semantic", "recall"] >= 0.995
    assert measured["semantic", "precision"] == 1.0
    assert measured["semantic", "pairs"] > measured["semantic", "sampled_pairs"] / 2


def test_buckets_find_what_brute_force_finds(tmp_path: Path) -> None:
    rows, vectors = many(700, seed=1)
    search_ = SearchConfig(exhaustive_below=0, bits=4, tables=200)
    config = DedupConfig(search=search_, cluster_cosine=None)
    found = run(tmp_path, [download(rows)], [embeddings(vectors)], config)
    assert clusters(found) == brute_force(rows, vectors, config)
    assert facts(tmp_path)["semantic", "recall"] == 1.0


def test_too_little_recall_takes_more_tables_or_stops_the_run(tmp_path: Path) -> None:
    rows, vectors = many(900, seed=2)
    shy = SearchConfig(exhaustive_below=0, bits=12, tables=1, recall=0.9)
    config = DedupConfig(search=shy, semantic_cosine=0.9)
    run(tmp_path, [download(rows)], [embeddings(vectors)], config)
    measured = facts(tmp_path)
    assert measured["semantic", "recall"] >= 0.9
    assert measured["semantic", "tables"] > 1
    low = config.model_copy(update={"search": shy.model_copy(update={"max_tables": 1})})
    with pytest.raises(
        RunError, match=r"found 0\.\d+, less than dedup\.search\.recall .*max_tables"
    ):
        run(tmp_path, [download(rows)], [embeddings(vectors)], low)


@pytest.mark.parametrize("config", [DedupConfig(), BUCKETS], ids=["every pair", "buckets"])
@pytest.mark.parametrize("guard", [0.85, 0.969])
def test_a_later_round_comes_to_what_one_round_would(
    tmp_path: Path, config: DedupConfig, guard: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, vectors = many(600, seed=3)
    search_ = config.search.model_copy(update={"tables": 200})
    config = config.model_copy(update={"search": search_, "cluster_cosine": guard})
    at_once = run(tmp_path, [download(rows)], [embeddings(vectors)], config)
    run(tmp_path, [download(rows[:400])], [embeddings(vectors)], config)
    earlier = (tmp_path / "clusters.parquet").rename(tmp_path / "earlier.parquet")
    compared = []
    monkeypatch.setattr(
        hashes, "pair_cosines",
        lambda v, a, b: compared.append(np.stack([a, b])) or ties.pair_cosines(v, a, b),
    )  # fmt: skip
    inputs = {
        "download": write_shards(tmp_path, "download", [download(rows)]),
        "embeddings": write_shards(tmp_path, "embeddings", [embeddings(vectors)]),
        "earlier": [earlier],
    }
    DedupStage(config, ImageConfig()).run(inputs, tmp_path, LocalContext())
    later = pq.read_table(tmp_path / "clusters.parquet").to_pylist()
    keys = ("sample_id", "cluster_id", "chain_id", "net", "copy_of", "hamming")
    assert [[row[k] for k in keys] for row in later] == [
        [at_once[row["sample_id"]][k] for k in keys] for row in later
    ]
    new = {row["sample_id"] for row in rows[400:]}
    fresh = np.array([row["sample_id"] in new for row in later])
    assert fresh[np.concatenate(compared, axis=1)].any(axis=0).all()
    assert facts(tmp_path)["clusters", "new_images"] == 200


def test_an_earlier_round_without_news_needs_no_search(tmp_path: Path) -> None:
    rows, vectors = many(100)
    first = run(tmp_path, [download(rows)], [embeddings(vectors)], BUCKETS)
    earlier = (tmp_path / "clusters.parquet").rename(tmp_path / "earlier.parquet")
    inputs = {
        "download": write_shards(tmp_path, "download", [download(rows)]),
        "embeddings": write_shards(tmp_path, "embeddings", [embeddings(vectors)]),
        "earlier": [earlier],
    }
    DedupStage(BUCKETS, ImageConfig()).run(inputs, tmp_path, LocalContext())
    again = pq.read_table(tmp_path / "clusters.parquet").to_pylist()
    assert {row["sample_id"]: row for row in again} == first


CROWDS = DedupConfig(search=SearchConfig(exhaustive_below=0, bits=1))
"""Two buckets a table: where two thousand are all alike, one of them is a crowd."""


@pytest.mark.parametrize("config", [DedupConfig(), CROWDS], ids=["every pair", "buckets"])
def test_thousands_of_pictures_that_are_all_alike(tmp_path: Path, config: DedupConfig) -> None:
    """Each its own file, and nothing but the embedding ties them: two million pairs."""
    vectors = {f"{i:04d}": near(unit(1, 16), 0.9999, i) for i in range(2_200)}
    rows = [{"sample_id": s, "sha256": s, "phash": None} for s in vectors]
    found = run(tmp_path, [download(rows)], [embeddings(vectors)], config)
    assert [len(group) for group in clusters(found)] == [2_200]


@pytest.mark.parametrize(("count", "distance"), [(300, 32), (3_000, 8), (3_000, 0)])
def test_hashes_are_found_exactly(count: int, distance: int) -> None:
    rng = RNG(6)
    packed = rng.integers(0, 256, (count, 32), dtype=np.uint8)
    for row in range(0, count - 1, 2):
        for bit in rng.choice(256, int(rng.integers(distance + 12)), replace=False):
            packed[row + 1] = packed[row]
            packed[row + 1, bit // 8] ^= 1 << (bit % 8)
    distances = np.bitwise_count(packed[:, None, :] ^ packed[None, :, :]).sum(axis=2)
    asked = np.sort(rng.choice(count, count // 2, replace=False))
    left, right = np.nonzero(distances <= distance)
    once = (left < right) & (np.isin(left, asked) | np.isin(right, asked))
    expected = {(a, b, distances[a, b]) for a, b in zip(left[once], right[once], strict=True)}
    found = [
        (min(a, b), max(a, b), bits)
        for part in hashes.within(packed, asked, distance, LocalContext())
        for a, b, bits in zip(*part, strict=True)
    ]
    assert len(found) == len(set(found)) and set(found) == expected


def test_a_million_hashes_are_looked_up_not_compared() -> None:
    """At a million hashes a look-up is cheaper; FAISS decides by what it is asked to build."""
    assert "MultiHash" in type(hashes.empty_index(1_000_000, 16)).__name__
    assert "Flat" in type(hashes.empty_index(500, 16)).__name__
    assert "Flat" in type(hashes.empty_index(1_000_000, 92)).__name__


def test_pairs_of_two_popular_hashes_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "_PAIRS", 100)
    members = [np.arange(30), np.arange(30, 80), np.arange(80, 81)]
    pairs = [(0, 1, 3), (0, 2, 4), (2, 1, 5)]
    a, b, bits = (np.array(part) for part in zip(*pairs, strict=True))
    parts = list(hashes._expanded(members, a, b, bits))
    assert max(len(left) for left, _, _ in parts) <= 200
    found = [pair for part in parts for pair in zip(*map(list, part), strict=True)]
    expected = [(i, j, bit) for x, y, bit in pairs for i in members[x] for j in members[y]]
    assert sorted(found) == sorted(expected)


def test_of_a_sample_in_two_shards_the_first_image_counts(tmp_path: Path) -> None:
    """A banner that rotates: ``a`` was another picture when the second shard asked for it."""
    shards = [
        download([{"sample_id": "a", "sha256": "bb"}, {"sample_id": "b", "sha256": "11"}]),
        download([{"sample_id": "a", "sha256": "aa"}, {"sample_id": "c", "sha256": "22"}]),
    ]
    vectors = [
        embeddings({"a": [1, 0, 0], "b": None}),
        embeddings({"a": [0, 1, 0], "b": [0, 1, 0], "c": [0, 1, 0]}),
    ]
    images = dedup_images.load_images(
        write_shards(tmp_path, "download", shards),
        write_shards(tmp_path, "embeddings", vectors),
        tmp_path,
    )
    assert images.sha256.to_pylist() == ["bb", "11", "22"]
    assert images.embedded.tolist() == [True, False, True]
    assert images.vectors.read(np.array([0, 2])).argmax(axis=1).tolist() == [0, 1]
