"""Opening models, and batches of whatever decodes."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from stages import inference
from stages.base import Resources, fingerprinted
from stages.embed import EmbedConfig, EmbedStage
from stages.errors import CheckpointError, ConfigError
from stages.inference import InferenceConfig, batches, open_model
from stages.models.base import InferenceModel
from stages.models.checkpoints import weights_hash
from stages.models.images import decode
from stages.models.preprocessing import Preprocessing
from stages.schemas import IMAGES
from tests import tiny_models
from tests.images import cut, image_rows, jpeg
from tests.tables import filled

SMALL = Preprocessing(size=32)
CPU = torch.device("cpu")


def test_broken_images_leave_their_place_to_the_next() -> None:
    whole = [jpeg(seed) for seed in range(5)]
    images = [whole[0], b"", whole[1], cut(whole[0]), whole[2], whole[3], b"GIF89a", whole[4]]
    broken: dict[int, str] = {}
    table = filled(IMAGES, [*image_rows(images), {"sample_id": "none"}])
    found = list(batches(table, 2, SMALL, broken, 3, CPU))
    assert [batch.rows for batch in found] == [[0, 2], [4, 5], [7]]
    assert sorted(broken) == [1, 3, 6, 8]
    assert all(broken.values())
    expected = SMALL([decode(image) for image in whole])
    assert torch.equal(SMALL(torch.cat([batch.pixels for batch in found])), expected)


@pytest.mark.parametrize("size", [1, 100])
def test_any_batch_size_gives_every_image_once(size: int) -> None:
    table = filled(IMAGES, image_rows([jpeg(seed) for seed in range(3)]))
    found = list(batches(table, size, SMALL, {}, 1, CPU))
    assert [row for batch in found for row in batch.rows] == [0, 1, 2]
    assert max(len(batch.rows) for batch in found) == min(size, 3)
    assert list(batches(table.slice(0, 0), size, SMALL, {}, 1, CPU)) == []


def test_large_photos_are_decoded_at_the_scale_that_covers_the_model() -> None:
    data = jpeg(0, (150, 80))
    [batch] = batches(filled(IMAGES, image_rows([data])), 4, SMALL, {}, 1, CPU)
    assert torch.equal(SMALL(batch.pixels), SMALL([decode(data, cover=32)]))
    assert not torch.equal(SMALL(batch.pixels), SMALL([decode(data)]))


@pytest.mark.parametrize(("gpus", "share"), [(0.25, 0.25), (1.0, 1.0), (2.0, 1.0), (0.0, 1.0)])
def test_growing_is_told_the_share_of_the_gpu(gpus: float, share: float, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    tiny_models.clip_model().save_pretrained(folder)
    needs = Resources(gpus=gpus)
    config = EmbedConfig(model=str(folder), batch_size="auto", device="cpu", resources=needs)
    with patch.object(InferenceModel, "grow") as grow:
        EmbedStage(config).setup()
    assert grow.call_args.kwargs == {"share": share}
    assert len(grow.call_args.args[0](2)) == 2


def test_no_more_than_a_batch_is_decoded_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard's pictures, decoded all at once, would not fit into memory."""
    started: list[bytes] = []

    def counted(data: bytes, **options: int) -> Image.Image:
        started.append(data)
        return decode(data, **options)

    monkeypatch.setattr(inference, "decode", counted)
    table = filled(IMAGES, image_rows([jpeg(seed) for seed in range(40)]))
    found = batches(table, 4, SMALL, {}, 4, CPU)
    next(found)
    assert len(started) <= 4 + 4 + 1
    assert sum(len(batch.rows) for batch in found) == 36


def test_open_model_says_where_what_and_on_which_device(tmp_path: Path) -> None:
    folder = tiny_models.save_blip(tiny_models.matcher_model(), tmp_path / "m")
    threads = torch.get_num_threads()
    try:
        opened = open_model("filter", InferenceConfig(model=str(folder), device="cpu", threads=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert (opened.folder, opened.device) == (folder, "cpu")
    assert opened.weights == weights_hash(folder)


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        (InferenceConfig(), ConfigError, r"caption\.model: none given"),
        (InferenceConfig(model="/no/such/folder"), CheckpointError, "/no/such/folder"),
        (InferenceConfig(model="x", device="cuda"), ConfigError, r"caption\.device: 'cuda'"),
    ],
)
def test_a_model_that_cannot_be_opened_is_one_line(
    config: InferenceConfig, kind: type[Exception], message: str
) -> None:
    if config.device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(kind, match=message) as raised:
        open_model("caption", config)
    assert "\n" not in str(raised.value)


def test_batch_size_and_precision_count_for_fingerprints() -> None:
    config = InferenceConfig(model="x", threads=4, decode_threads=4)
    assert fingerprinted(config) == {"batch_size": 16, "precision": "float32"}


@pytest.mark.parametrize("size", [0, "many"])
def test_batch_sizes_that_are_none(size: object) -> None:
    with pytest.raises(ValidationError, match="batch_size"):
        InferenceConfig(batch_size=size)
