from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.images import write_tar
from pipeline.inspect import View
from pipeline.report.collect import RoundFacts, read_facts
from pipeline.report.samples import (
    PER_GROUP,
    Sample,
    draw,
    read_pictures,
    read_samples,
    spread,
    stratified,
)
from pipeline.store import Store
from stages.ids import digest
from stages.schemas import CLUSTERS, DOWNLOAD, PAIRS
from tests.images import cut, jpeg
from tests.run_folder import make_run
from tests.tables import filled


def encoded(size: tuple[int, int], kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), 200, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def sample(number: int, score: float | None = None, shard: str = "000000") -> Sample:
    return Sample(digest(str(number)), f"s{number}", shard, "web", "a cat", score, "kept")


def decoded(src: str) -> Image.Image:
    head, _, data = src.partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


# ---- pictures --------------------------------------------------------------------------------


def test_a_tiny_picture_keeps_its_pixels() -> None:
    picture = draw(encoded((32, 24)))
    assert picture is not None and picture.tiny
    assert (picture.width, picture.height) == (32, 24)
    assert decoded(picture.src).getpixel((3, 3)) == (200, 200, 200)


def test_a_large_picture_is_made_small() -> None:
    picture = draw(jpeg(1, (1200, 600)))
    assert picture is not None and not picture.tiny
    assert (picture.width, picture.height) == (192, 96)
    assert decoded(picture.src).size == (192, 96)
    assert len(picture.src) < 30_000


def test_no_metadata_comes_along() -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "<script>alert(1)</script>"
    Image.new("RGB", (200, 200)).save(buffer, "JPEG", exif=exif)
    picture = draw(buffer.getvalue())
    assert picture is not None and not decoded(picture.src).getexif()


@pytest.mark.parametrize(
    "data",
    [b"", b"<svg onload='alert(1)'/>", cut(jpeg(1, (300, 300))), encoded((8, 8), "GIF")],
    ids=["empty", "svg", "cut", "another format"],
)
def test_what_is_no_image_of_ours(data: bytes) -> None:
    assert draw(data) is None


def test_pictures_from_tars(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    rows = [{"sample_id": f"s{n}", "image": encoded((16, 16))} for n in range(3)]
    rows.append({"sample_id": "s3", "image": b"\x89PNG broken"})
    tar = store.put_named("images", ".tar", write_tar(filled(DOWNLOAD, rows)))
    torn = store.put_named("images", ".tar", b"not a tar")
    gone = tar.model_copy(update={"path": "images/gone.tar"})
    wanted = [sample(1), sample(3), sample(9), sample(2, shard="000001"), sample(4, shard="000002")]
    tars = {"000000": (tar,), "000001": (torn, tar), "000002": (gone,)}
    assert read_pictures(store, tars, wanted).keys() == {"s1", "s2"}


# ---- the choice ------------------------------------------------------------------------------


def test_evenly_spaced_shards() -> None:
    names = [f"{n:06d}" for n in range(100)]
    assert spread(names[:3], 8) == names[:3]
    chosen = spread(names, 8)
    assert len(set(chosen)) == 8 and (chosen[0], chosen[-1]) == (names[0], names[-1])


def test_the_choice_covers_the_scores_and_is_always_the_same() -> None:
    samples = [sample(n, n / 1000) for n in range(1000)]
    chosen = stratified(samples, 12)
    scores = [s.score or 0 for s in chosen]
    assert len(chosen) == 12 and scores == sorted(scores, reverse=True)
    assert scores[0] > 0.91 and scores[-1] < 0.09
    assert chosen == stratified(samples[::-1], 12)
    assert len(stratified(samples[:5], 12)) == 5


def view(store: Store, name: str, table: object) -> View:
    return View(name, 1, ((name, store.put_table(name, table)),))


@pytest.fixture
def many(tmp_path: Path) -> tuple[Store, RoundFacts]:
    """200 images of two texts each, over 20 shards; the first two clusters have duplicates."""
    store = make_run(str(tmp_path / "run"))
    pairs, clusters = [], []
    for n in range(200):
        who = {"sample_id": f"s{n:03d}", "shard": f"{n // 10:06d}", "cluster_id": cluster_of(n)}
        for source in ("web", "synthetic"):
            score = (n % 100) / 100
            state = "kept" if score >= 0.5 else "rejected"
            if n in (51, 52):
                state = "merged" if source == "web" else "duplicate"
            text = f"{source} text {n} " + "long " * 1000
            pair = {"pair_id": digest(source, str(n)), "source": source, "text": text}
            pairs.append({**who, **pair, "itm_score": score, "state": state})
        net = {50: "exact", 51: "exact", 52: "exact", 60: "semantic", 61: "semantic"}.get(n)
        clusters.append({"sample_id": who["sample_id"], "cluster_id": cluster_of(n), "net": net})
    facts = read_facts(store).rounds[1]
    views = {
        "pairs": view(store, "pairs", filled(PAIRS, pairs)),
        "clusters": view(store, "clusters", filled(CLUSTERS, clusters, similarity=0.98)),
    }
    return store, replace(facts, views=views, tars={f"{n:06d}": () for n in range(20)})


def cluster_of(number: int) -> str:
    first = {51: 50, 52: 50, 61: 60}.get(number, number)
    return f"s{first:03d}"


def test_samples_of_a_round(many: tuple[Store, RoundFacts]) -> None:
    found = read_samples(*many)
    assert list(found.groups) == [
        (source, state) for source in ("web", "synthetic") for state in ("kept", "rejected")
    ]
    for (source, state), group in found.groups.items():
        assert len(group) == PER_GROUP == len({s.sample_id for s in group})
        assert {s.source for s in group} == {source}
        assert all((s.score or 0) >= 0.5 for s in group) == (state == "kept")
        assert all(len(s.text or "") == 1000 and s.picture is None for s in group)
        # Of twenty shards only eight are looked at.
        assert len({s.shard for s in group}) <= 8
    assert found == read_samples(*many)


def test_clusters_of_a_round(many: tuple[Store, RoundFacts]) -> None:
    clusters = read_samples(*many).clusters
    assert [len(cluster.members) for cluster in clusters] == [2, 3]
    semantic, exact = clusters
    assert [member.survives for member in exact.members] == [True, False, False]
    assert exact.images == 3 and exact.members[1].net == "exact"
    assert {s.state for m in exact.members[1:] for s in m.samples} == {"merged", "duplicate"}
    assert semantic.members[0].net == "semantic"
    assert semantic.members[1].similarity == pytest.approx(0.98)


def test_a_run_folder(tmp_path: Path) -> None:
    store = make_run(str(tmp_path / "run"))
    facts = read_facts(store)
    raw = read_samples(store, facts.rounds[0])
    assert list(raw.groups) == [("web", "kept")] and not raw.clusters
    assert all(s.score is None and s.picture is not None for s in raw.groups["web", "kept"])
    found = read_samples(store, facts.rounds[1])
    assert [s.text for s in found.groups["web", "rejected"]] == ["buy now"]
    assert not read_samples(store, replace(facts.rounds[1], views={})).groups
