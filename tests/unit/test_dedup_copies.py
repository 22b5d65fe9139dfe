"""Which images share a captioning, from real Parquet files, and that it loses nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipeline.dag import stage_input
from stages.base import LocalContext, Resources, fingerprinted
from stages.dedup import CopiesStage, DedupConfig
from stages.dedup.config import SharingConfig
from stages.schemas import CAPTIONS, DEDUP, DOWNLOAD, EMBEDDINGS, SHARED
from tests.tables import filled, write_shards

Row = dict[str, Any]
RNG = np.random.default_rng
NEAR = SharingConfig(perceptual_distance=32, perceptual_cosine=0.9)


def row(sample: str, pixels: str | None, text: str | None = None, **more: Any) -> Row:
    text = f"text of {sample}" if text is None else text
    return {
        "sample_id": sample,
        "sha256": f"f{sample}",
        "pixel_sha256": pixels,
        "text": text,
    } | more


def download(rows: Sequence[Row]) -> pa.Table:
    return filled(DOWNLOAD, rows, source="web", status="success", image=b"image")


def run(
    folder: Path,
    shards: Mapping[str, Sequence[Row]],
    config: SharingConfig | None = None,
    order: Sequence[str] | None = None,
    **inputs: Sequence[Path],
) -> tuple[dict[str, list[Row]], dict[str, float]]:
    """(shard → its SHARED rows, figures); ``order`` is the one in which shards are given."""
    names = list(order or sorted(shards))
    folder.mkdir(exist_ok=True, parents=True)
    files = write_shards(folder, "download", [download(shards[name]) for name in names])
    output = folder / "output"
    output.mkdir()
    CopiesStage(config or SharingConfig(), names).run(
        {"download": files, **inputs}, output, LocalContext()
    )
    facts = pq.read_table(output / "copies.parquet")
    assert facts.schema == DEDUP
    found = {}
    for file in sorted(output.glob("shard=*.parquet")):
        table = pq.read_table(file)
        assert table.schema == SHARED
        found[file.name] = table.to_pylist()
    return found, dict(zip(facts["metric"].to_pylist(), facts["value"].to_pylist(), strict=True))


def test_the_first_image_is_captioned_and_scored_for_all(tmp_path: Path) -> None:
    shards = {
        "000000": [row("b", "x"), row("a", "y"), row("c", None), row("d", None)],
        "000001": [row("a0", "x"), row("a0", "x", ""), row("e", "z")],
        "000002": [
            row("e", "z", "another"), row("h", "x", source="human"), row("f", "z", status="x"),
        ],
    }  # fmt: skip
    found, facts = run(tmp_path, shards)
    by_shard = {name[6:12]: rows for name, rows in found.items()}

    def told(sample: str, text: str | None, leader: str, scorer: str | None) -> Row:
        return dict(zip(SHARED.names, (sample, text, leader, scorer), strict=True))

    assert by_shard == {
        "000000": [told("a0", "", "b", "b"), told("a0", "text of a0", "b", "b")],
        "000001": [told("a0", None, "b", "b"), told("e", "another", "e", "e")],
        "000002": [told("e", None, "e", "e")],
    }
    assert facts == {"images": 7, "captioned": 5, "scored": 5}


def test_nothing_alike_says_nothing_of_any_shard(tmp_path: Path) -> None:
    found, facts = run(
        tmp_path, {"000000": [row("a", "x")], "000001": [], "000002": [row("b", "y")]}
    )
    assert found == {} and facts == {"images": 2, "captioned": 2, "scored": 2}
    found, facts = run(tmp_path / "none", {"000000": []})
    assert found == {} and facts == {"images": 0, "captioned": 0, "scored": 0}


def many(count: int, seed: int = 0) -> list[Row]:
    """Images of which most show one of a few pictures."""
    rng = RNG(seed)
    pictures = rng.integers(0, count // 5, count)
    return [row(f"{rng.integers(1 << 40):010x}", f"p{p}") for p in pictures]


def in_shards(rows: Sequence[Row], size: int = 25) -> dict[str, list[Row]]:
    starts = range(0, len(rows), size)
    return {f"{n:06d}": list(rows[start : start + size]) for n, start in enumerate(starts)}


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_files_and_rows_changes_nothing(tmp_path: Path, seed: int) -> None:
    shards = in_shards(many(200, seed))
    config = SharingConfig(cohorts=("000000", "000005"))
    straight = run(tmp_path / "straight", shards, config)
    rng = RNG(seed)
    mixed = {
        name: [shards[name][i] for i in rng.permutation(len(shards[name]))]
        for name in rng.permutation(list(shards)).tolist()
    }
    # The names of the files are hashes of their content, so they too are equal.
    assert run(tmp_path / "mixed", mixed, config, order=list(mixed)) == straight


def test_shards_that_arrive_later_leave_the_earlier_as_they_are(tmp_path: Path) -> None:
    shards = in_shards(many(300))
    before = dict(list(shards.items())[:7])
    first, _ = run(tmp_path / "first", before, SharingConfig(cohorts=("000000",)))
    both, facts = run(tmp_path / "both", shards, SharingConfig(cohorts=("000000", "000007")))
    assert len(first) == 7 and set(first) < set(both)
    pictures = {r["pixel_sha256"] for rows in shards.values() for r in rows}
    assert facts["captioned"] == len(pictures)
    # What is scored once in each of the two is captioned once in both.
    cohorts = [{r["pixel_sha256"] for rows in part for r in rows}
               for part in (before.values(), list(shards.values())[7:])]  # fmt: skip
    assert facts["scored"] == sum(map(len, cohorts)) > len(pictures)


def served(shards: Mapping[str, Sequence[Row]], found: Mapping[str, list[Row]]) -> Any:
    """(images captioned, texts scored), as the caption and filter stages of all shards see them:
    sample ids, and (owner, text) → the samples whose image it was scored with."""
    captioned: list[str] = []
    scored: dict[tuple[str, str], list[str]] = defaultdict(list)
    of_shard = {name[6:12]: rows for name, rows in found.items()}
    for shard, rows in shards.items():
        tables = {"download": download(rows), "caption": CAPTIONS.empty_table()}
        if shard in of_shard:
            tables["shared"] = pa.Table.from_pylist(of_shard[shard], schema=SHARED)
        captioned += stage_input("caption", tables)["sample_id"].to_pylist()
        for image in stage_input("filter", tables).to_pylist():
            for owner, text in zip(image["owners"], image["texts"], strict=True):
                scored[owner, text].append(image["sample_id"])
    return captioned, scored


@pytest.mark.parametrize("cohorts", [("000000",), ("000000", "000003", "000006")])
def test_each_picture_is_captioned_once_and_every_text_scored_once(
    tmp_path: Path, cohorts: tuple[str, ...]
) -> None:
    rows = many(250, seed=4)
    shards = in_shards(rows)
    found, facts = run(tmp_path, shards, SharingConfig(cohorts=cohorts))
    captioned, scored = served(shards, found)
    picture = {r["sample_id"]: r["pixel_sha256"] for r in rows}
    assert sorted(picture[sample] for sample in captioned) == sorted(set(picture.values()))
    assert set(scored) == {(r["sample_id"], r["text"]) for r in rows}
    assert all(len(images) == 1 for images in scored.values())
    assert all(picture[owner] == picture[images[0]] for (owner, _), images in scored.items())
    images = {image for found in scored.values() for image in found}
    assert len(images) == facts["scored"] and len(captioned) == facts["captioned"]


def test_ten_thousand_copies_are_captioned_once_and_no_image_has_all_their_texts(
    tmp_path: Path,
) -> None:
    shards = in_shards([row(f"{n:05d}", "placeholder") for n in range(10_000)], size=2_500)
    found, facts = run(tmp_path, shards)
    captioned, scored = served(shards, found)
    assert captioned == ["00000"] and len(scored) == 10_000
    loads = [images[0] for images in scored.values()]
    assert max(loads.count(image) for image in set(loads)) == 256
    assert facts == {"images": 10_000, "captioned": 1, "scored": 40}


def test_what_must_not_be_used_leads_nobody(tmp_path: Path) -> None:
    shards = {"000000": [row("a", "x"), row("b", "x")], "000001": [row("c", "x")]}
    gone = write_shards(tmp_path, "gone", [pa.table({"sample_id": ["a", None]})])
    found, facts = run(tmp_path / "run", shards, tombstones=gone)
    assert facts == {"images": 2, "captioned": 1, "scored": 1}
    assert {r["captioned_as"] for rows in found.values() for r in rows} == {"b"}
    assert "a" not in {r["sample_id"] for rows in found.values() for r in rows}


HASH = 0xA1 << 200


def like(sample: str, bits: int, pixels: str | None = None) -> Row:
    return row(sample, pixels or sample, phash=f"{HASH ^ ((1 << bits) - 1):064x}")


def embedded(folder: Path, vectors: Mapping[str, Sequence[float]]) -> list[Path]:
    rows = [{"sample_id": s, "embedding": np.asarray(v, np.float16)} for s, v in vectors.items()]
    return write_shards(folder, "embed", [filled(EMBEDDINGS, rows, status="success", model="m")])


def test_close_hashes_share_only_where_embeddings_agree_and_never_in_chains(tmp_path: Path) -> None:
    shards = {
        # Each but the last lies within 32 bits of the one before; 40 lies too far from 0.
        "000000": [like("a", 0), like("b", 20), like("c", 40), like("d", 200)],
        "000001": [like("e", 0), like("f", 10), like("g", 0, pixels="b"), like("h", 0)],
    }
    vectors = {name: [1.0, 0.1] for name in "abcdeg"} | {"f": [0.0, 1.0], "h": [0.0, 0.0]}
    files = embedded(tmp_path, vectors)
    found, facts = run(tmp_path / "near", shards, NEAR, embeddings=files)
    leads = {
        r["sample_id"]: r["captioned_as"]
        for rows in found.values() for r in rows if r["text"] is None
    }  # fmt: skip
    # f disagrees, h has no embedding; c finds b, the first of its hash, which leads nobody.
    assert leads == {"b": "a", "e": "a", "g": "a"}
    assert facts["captioned"] == 5
    # Hashes alone may be enough, if that is asked for.
    loose = SharingConfig(perceptual_distance=32)
    _, facts = run(tmp_path / "loose", shards, loose, embeddings=files)
    assert facts["captioned"] == 3


@pytest.mark.parametrize("seed", range(2))
def test_the_perceptual_net_does_not_depend_on_order_either(tmp_path: Path, seed: int) -> None:
    rng = RNG(seed)
    samples = [f"{n:03d}" for n in rng.permutation(120)]
    rows = [like(sample, int(rng.integers(0, 90))) for sample in samples]
    files = embedded(tmp_path, {s: [1.0, float(rng.integers(0, 2))] for s in samples})
    shards = in_shards(rows)
    straight = run(tmp_path / "straight", shards, NEAR, embeddings=files)
    mixed = {name: rows[::-1] for name, rows in reversed(shards.items())}
    assert run(tmp_path / "x", mixed, NEAR, order=list(mixed), embeddings=files) == straight
    assert straight[1]["captioned"] < 120


def test_the_config_says_what_is_shared() -> None:
    config = DedupConfig(before_caption="perceptual")
    assert config.sharing(["000000"]) == NEAR.model_copy(update={"cohorts": ("000000",)})
    assert DedupConfig().sharing([]) == SharingConfig()
    large = Resources(memory_gb=64)
    for how in ("exact", "perceptual"):
        sharing = DedupConfig(before_caption=how, resources=large).sharing([])
        assert sharing.resources == large
        assert fingerprinted(sharing) == fingerprinted(DedupConfig(before_caption=how).sharing([]))
    with pytest.raises(ValidationError, match="needs perceptual_distance"):
        DedupConfig(before_caption="perceptual", perceptual_distance=None)
