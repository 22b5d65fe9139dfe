"""The caption stage, on a tiny real captioner."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from PIL import Image

from stages.caption import CaptionConfig, CaptionStage
from stages.errors import CheckpointError
from stages.models.captioner import Captioner
from stages.models.checkpoints import weights_hash
from stages.models.config import GenerationConfig
from stages.models.images import decode
from stages.schemas import CAPTIONS, IMAGES
from tests import tiny_models
from tests.images import cut, image_rows, jpeg
from tests.tables import filled
from tests.unit.test_images import encoded

SEVEN = [jpeg(seed) for seed in range(7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("models") / "captioner"
    return tiny_models.save_blip(tiny_models.captioner_model(), where)


def ready(folder: Path, batch_size: int = 3, captions: int = 1) -> CaptionStage:
    generation = GenerationConfig(captions_per_image=captions, seed=5)
    config = CaptionConfig(
        model=str(folder), batch_size=batch_size, device="cpu", generation=generation
    )
    stage = CaptionStage(config)
    stage.setup()
    return stage


def images(files: list[bytes]) -> pa.Table:
    return filled(IMAGES, image_rows(files))


def test_captions_are_the_captioners_own_in_order(folder: Path) -> None:
    table = images(SEVEN)
    found = ready(folder).process(table)
    assert found.schema == CAPTIONS
    generation = GenerationConfig(seed=5)
    keys = [bytes.fromhex(sha256) for sha256 in table["sha256"].to_pylist()]
    expected = Captioner(folder, batch_size=3)([decode(i) for i in SEVEN], keys, generation)
    assert found["text"].to_pylist() == [texts[0] for texts in expected]
    assert len(set(found["text"].to_pylist())) > 3
    assert found["sample_id"].to_pylist() == table["sample_id"].to_pylist()
    assert set(found["status"].to_pylist()) == {"success"}
    assert set(found["model"].to_pylist()) == {weights_hash(folder)}


def test_a_broken_image_fails_alone(folder: Path) -> None:
    files = [SEVEN[0], cut(SEVEN[1]), *SEVEN[2:]]
    found = ready(folder, captions=2).process(images(files)).to_pylist()
    assert [row["caption_index"] for row in found] == [0, 1] * 7
    failures = [row for row in found if row["status"] != "success"]
    assert [(row["sample_id"], row["status"]) for row in failures] == [("s001", "failed")] * 2
    assert all(row["text"] is None and "truncated" in row["detail"] for row in failures)


def test_odd_shapes_are_captioned_and_harm_nobody(folder: Path) -> None:
    odd = [jpeg(8, size) for size in ((1, 1), (20_000, 10), (10, 20_000))]
    found = ready(folder, batch_size=4).process(images([SEVEN[0], *odd, SEVEN[1]]))
    assert found["status"].to_pylist() == ["success"] * 5
    alone = ready(folder, batch_size=4).process(images([SEVEN[0], SEVEN[1]]))
    assert found["text"].to_pylist()[::4] == alone["text"].to_pylist()


def test_int8_and_bfloat16_are_what_the_config_asks_for(folder: Path) -> None:
    texts = {}
    for precision in ("float32", "bfloat16", "int8"):
        stage = CaptionStage(CaptionConfig(model=str(folder), device="cpu", precision=precision))
        stage.setup()
        kinds = {type(part).__name__ for part in stage.model.vision.modules()}
        assert ("Int8Linear" in kinds) == (precision == "int8")
        assert (stage.model.dtype == torch.bfloat16) == (precision == "bfloat16")
        texts[precision] = stage.process(images(SEVEN))["text"].to_pylist()
    assert texts["int8"] != texts["float32"] != texts["bfloat16"]


def test_the_same_file_gets_the_same_captions_anywhere(folder: Path) -> None:
    stage = ready(folder, batch_size=4)
    texts = dict(zip(SEVEN, stage.process(images(SEVEN))["text"].to_pylist(), strict=True))
    turned = [SEVEN[3], SEVEN[3], SEVEN[6], SEVEN[0]]
    again = ready(folder, batch_size=4).process(images(turned))
    assert again["text"].to_pylist() == [texts[file] for file in turned]
    assert stage.process(images(SEVEN)) == stage.process(images(SEVEN))


def test_failed_rows_need_no_model(folder: Path) -> None:
    stage = CaptionStage(CaptionConfig(generation=GenerationConfig(captions_per_image=2)))
    table = stage.failed(images(SEVEN[:1]), "quarantined", "crashed")
    assert table.schema == CAPTIONS
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("s000", 0, None, "quarantined", "crashed", None),
        ("s000", 1, None, "quarantined", "crashed", None),
    ]


def test_no_images_give_no_captions(folder: Path) -> None:
    assert ready(folder).process(images([])).num_rows == 0


def test_a_caption_without_a_word_has_failed(folder: Path, tmp_path: Path) -> None:
    """A captioner that only ever ends its caption."""
    import torch

    model = tiny_models.captioner_model()
    with torch.no_grad():
        bias = model.text_decoder.cls.predictions.bias
        bias[tiny_models.tokenizer().sep_token_id] += 1000.0
    stage = CaptionStage(
        CaptionConfig(
            model=str(tiny_models.save_blip(model, tmp_path / "mute")),
            generation=GenerationConfig(min_tokens=1),
        )
    )
    stage.setup()
    found = stage.process(images(SEVEN[:2])).to_pylist()
    assert [(row["text"], row["status"], row["detail"]) for row in found] == [
        (None, "failed", "empty text")
    ] * 2


@pytest.fixture(scope="module")
def dazzled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioner that sees black pictures only: what is brighter becomes infinite."""
    where = tmp_path_factory.mktemp("models") / "dazzled"
    tiny_models.save_blip(tiny_models.captioner_model(), where)
    file = where / "preprocessor_config.json"
    settings = json.loads(file.read_text()) | {"image_mean": [0.0] * 3, "image_std": [1e-39] * 3}
    file.write_text(json.dumps(settings))
    return where


@pytest.mark.filterwarnings("ignore:overflow encountered in divide")
@pytest.mark.parametrize("method", ["nucleus", "greedy", "beam"])
def test_logits_that_are_not_finite_harm_no_other_image(dazzled: Path, method: str) -> None:
    def processed(files: list[bytes]) -> list[dict[str, object]]:
        captions = 1 if method == "greedy" else 2
        generation = GenerationConfig(method=method, captions_per_image=captions)
        config = CaptionConfig(model=str(dazzled), device="cpu", generation=generation)
        stage = CaptionStage(config)
        stage.setup()
        return stage.process(images(files)).to_pylist()

    dark = [encoded(Image.new("RGB", (40, 32 + i)), "PNG") for i in range(3)]
    found = processed([dark[0], SEVEN[0], dark[1], SEVEN[1], dark[2]])
    told = [(row["text"], row["status"], row["detail"]) for row in found]
    each = len(told) // 5
    for bright in (1, 3):
        rows = told[bright * each : (bright + 1) * each]
        assert rows == [(None, "failed", "scores are not finite")] * each
    expected = [(row["text"], row["status"], row["detail"]) for row in processed(dark)]
    assert told[:each] + told[2 * each : 3 * each] + told[4 * each :] == expected
    assert {status for _, status, _ in expected} == {"success"}


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    tiny_models.clip_model().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"found model_type 'clip'.*need a BLIP captioner"):
        ready(tmp_path)
