"""The embed stage, on a tiny real CLIP and on a tiny BLIP's contrastive head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from stages.embed import EmbedConfig, EmbedStage
from stages.errors import CheckpointError
from stages.models.checkpoints import weights_hash
from stages.models.embedder import Embedder
from stages.models.images import decode
from stages.schemas import EMBEDDINGS, IMAGES
from tests import tiny_models
from tests.images import cut, image_rows, jpeg
from tests.tables import filled

FIVE = [jpeg(seed) for seed in range(5)]


@pytest.fixture(scope="module", params=["clip", "blip"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("models") / str(request.param)
    if request.param == "blip":
        return tiny_models.save_blip(tiny_models.matcher_model(), where)
    tiny_models.clip_model().save_pretrained(where)
    return where


def ready(folder: Path) -> EmbedStage:
    stage = EmbedStage(EmbedConfig(model=str(folder), batch_size=3, device="cpu"))
    stage.setup()
    return stage


def images(files: list[bytes]) -> pa.Table:
    return filled(IMAGES, image_rows(files))


def test_embeddings_are_the_embedders_own_unit_vectors(folder: Path) -> None:
    found = ready(folder).process(images(FIVE))
    assert found.schema == EMBEDDINGS
    vectors = np.array(found["embedding"].to_pylist(), dtype=np.float32)
    expected = Embedder(folder, batch_size=3).embed_images([decode(file) for file in FIVE])
    assert vectors.shape == (5, 24)
    np.testing.assert_array_equal(vectors, expected.astype(np.float32))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=2e-3)
    assert len(np.unique(vectors, axis=0)) == 5
    assert found["sample_id"].to_pylist() == [f"s{number:03d}" for number in range(5)]
    assert set(found["model"].to_pylist()) == {weights_hash(folder)}


def test_a_broken_image_fails_alone(folder: Path) -> None:
    stage = ready(folder)
    found = stage.process(images([FIVE[0], cut(FIVE[1]), *FIVE[2:]])).to_pylist()
    assert [row["status"] for row in found] == ["success", "failed", *["success"] * 3]
    assert found[1]["embedding"] is None
    assert "truncated" in found[1]["detail"]
    whole = stage.process(images(FIVE)).to_pylist()
    np.testing.assert_allclose(found[2]["embedding"], whole[2]["embedding"], atol=2e-3)


@pytest.mark.parametrize("weight", [0.0, float("nan")])
def test_an_embedding_that_compares_with_nothing_has_failed(tmp_path: Path, weight: float) -> None:
    model = tiny_models.clip_model()
    with torch.no_grad():
        model.visual_projection.weight.fill_(weight)
    model.save_pretrained(tmp_path)
    found = ready(tmp_path).process(images(FIVE)).to_pylist()
    assert {(row["status"], row["detail"]) for row in found} == {
        ("failed", "embedding is zero or not finite")
    }


def test_failed_rows_need_no_model_and_no_rows_give_none(folder: Path) -> None:
    table = EmbedStage(EmbedConfig()).failed(images(FIVE[:2]), "quarantined", "crashed")
    assert table.schema == EMBEDDINGS
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("s000", None, "quarantined", "crashed", None),
        ("s001", None, "quarantined", "crashed", None),
    ]
    assert ready(folder).process(images([])).num_rows == 0


def test_a_folder_that_embeds_nothing_is_refused(tmp_path: Path) -> None:
    tiny_models.save_blip(tiny_models.captioner_model(), tmp_path)
    with pytest.raises(CheckpointError, match="need a CLIP model"):
        ready(tmp_path)
