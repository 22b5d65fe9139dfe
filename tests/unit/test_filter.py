"""The filter stage, on a tiny real matcher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from stages.errors import CheckpointError
from stages.filter import FilterConfig, FilterStage
from stages.ids import pair_id
from stages.models.checkpoints import weights_hash
from stages.models.images import decode
from stages.models.matcher import Matcher
from stages.schemas import IMAGES_WITH_TEXTS, SCORES
from tests import tiny_models
from tests.images import cut, image_rows, jpeg
from tests.tables import filled

FILES = [jpeg(seed) for seed in range(4)]
TEXTS = [
    [("web", "a red dog"), ("synthetic", "a blue car near the sea")],
    [("web", "two birds")],
    [("web", "a cat"), ("web", "a dark horse"), ("synthetic", "a cat")],
    [("web", "a small house")],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("models") / "matcher"
    return tiny_models.save_blip(tiny_models.matcher_model(), where)


def ready(folder: Path, batch_size: int = 3) -> FilterStage:
    stage = FilterStage(FilterConfig(model=str(folder), batch_size=batch_size, device="cpu"))
    stage.setup()
    return stage


def images(files: list[bytes] = FILES, texts: list[list[tuple[str, str]]] = TEXTS) -> pa.Table:
    rows = [
        row
        | {"sources": [s for s, _ in own], "texts": [t for _, t in own]}
        | {"owners": [row["sample_id"]] * len(own)}
        for row, own in zip(image_rows(files), texts, strict=True)
    ]
    return filled(IMAGES_WITH_TEXTS, rows)


def by_pair(table: pa.Table) -> dict[str, dict[str, Any]]:
    return {row["pair_id"]: row for row in table.to_pylist()}


def test_scores_are_the_matchers_own_in_order(folder: Path) -> None:
    found = ready(folder).process(images())
    assert found.schema == SCORES
    pairs = [(f"s{i:03d}", *pair) for i, own in enumerate(TEXTS) for pair in own]
    assert found["pair_id"].to_pylist() == [pair_id(*pair) for pair in pairs]
    named = [
        tuple(row.values()) for row in found.select(["sample_id", "source", "text"]).to_pylist()
    ]
    assert named == pairs
    texts = [[text for _, text in own] for own in TEXTS]
    expected = Matcher(folder).match([decode(file) for file in FILES], texts)
    flat = [score for own in expected for score in own]
    assert found["itm_score"].to_pylist() == pytest.approx([itm for itm, _ in flat], abs=1e-5)
    assert found["itc_score"].to_pylist() == pytest.approx([itc for _, itc in flat], abs=1e-5)
    assert len({round(itm, 4) for itm, _ in flat}) > 4
    assert set(found["status"].to_pylist()) == {"success"}
    assert set(found["model"].to_pylist()) == {weights_hash(folder)}


def test_a_broken_image_and_an_empty_text_fail_alone(folder: Path) -> None:
    whole = by_pair(ready(folder).process(images()))
    files = [FILES[0], cut(FILES[1]), *FILES[2:]]
    nothing = ["", " \n\u3000", "!!!", "\u200b", "\x00", "\u202e", "\u200d !", "\u200b " * 40]
    texts = [
        [("web", text) for text in nothing] + TEXTS[0],
        TEXTS[1], TEXTS[2], [("web", "")],
    ]  # fmt: skip
    found = by_pair(ready(folder).process(images(files, texts)))
    bad = {row["pair_id"]: row for row in found.values() if row["status"] == "failed"}
    assert {(row["sample_id"], row["text"], row["itm_score"]) for row in bad.values()} == {
        *(("s000", text, None) for text in nothing),
        ("s001", "two birds", None),
        ("s003", "", None),
    }
    details = {row["sample_id"]: row["detail"] for row in bad.values()}
    assert details["s000"] == details["s003"] == "empty text"
    assert len(bad) == len(nothing) + 2
    assert "truncated" in details["s001"]
    for pair in found.keys() - bad.keys():
        assert found[pair]["itm_score"] == pytest.approx(whole[pair]["itm_score"], abs=1e-5)


def test_odd_and_endless_texts_are_scored(folder: Path) -> None:
    texts = [[("web", t)] for t in ("<script>alert(1)</script>", "👩‍🚀 מִזְרָח", "dog " * 10_000)]
    found = ready(folder).process(images(FILES[:3], texts))
    assert found["status"].to_pylist() == ["success"] * 3


def test_a_score_that_is_not_finite_has_failed(folder: Path, tmp_path: Path) -> None:
    model = tiny_models.matcher_model()
    with torch.no_grad():
        model.itm_head.bias.fill_(float("nan"))
    found = ready(tiny_models.save_blip(model, tmp_path / "nan")).process(images())
    assert set(found["detail"].to_pylist()) == {"score is not a number"}
    assert found["itm_score"].null_count == found["itc_score"].null_count == 7


def test_failed_rows_need_no_model() -> None:
    found = FilterStage(FilterConfig()).failed(images(), "quarantined", "crashed")
    assert found.schema == SCORES
    assert len(by_pair(found)) == 7
    rows = found.select(["status", "detail", "itm_score", "model"]).to_pylist()
    assert {tuple(row.values()) for row in rows} == {("quarantined", "crashed", None, None)}


def test_images_without_texts_give_no_rows(folder: Path) -> None:
    stage = ready(folder)
    assert stage.process(images(texts=[[], [], [], []])).num_rows == 0
    assert stage.process(images([], [])).num_rows == 0


def test_a_captioner_is_no_matcher(tmp_path: Path) -> None:
    tiny_models.save_blip(tiny_models.captioner_model(), tmp_path)
    with pytest.raises(CheckpointError, match="need a BLIP matcher"):
        ready(tmp_path)
