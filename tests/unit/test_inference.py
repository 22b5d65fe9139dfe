"""Opening models, and batches of whatever decodes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stages.base import fingerprinted
from stages.errors import CheckpointError, ConfigError
from stages.inference import InferenceConfig, batches, open_model
from stages.models.checkpoints import weights_hash
from stages.models.images import decode
from stages.schemas import IMAGES
from tests import tiny_models
from tests.images import cut, image_rows, jpeg
from tests.tables import filled


def test_broken_images_leave_their_place_to_the_next() -> None:
    whole = [jpeg(seed) for seed in range(5)]
    images = [whole[0], b"", whole[1], cut(whole[0]), whole[2], whole[3], b"GIF89a", whole[4]]
    broken: dict[int, str] = {}
    table = filled(IMAGES, [*image_rows(images), {"sample_id": "none"}])
    found = list(batches(table, 2, broken))
    assert [batch.rows for batch in found] == [[0, 2], [4, 5], [7]]
    assert sorted(broken) == [1, 3, 6, 8]
    assert all(broken.values())
    pixels = [image.tobytes() for batch in found for image in batch.images]
    assert pixels == [decode(image).tobytes() for image in whole]


@pytest.mark.parametrize("size", [1, 100])
def test_any_batch_size_gives_every_image_once(size: int) -> None:
    table = filled(IMAGES, image_rows([jpeg(seed) for seed in range(3)]))
    found = list(batches(table, size, {}))
    assert [row for batch in found for row in batch.rows] == [0, 1, 2]
    assert max(len(batch.rows) for batch in found) == min(size, 3)
    assert list(batches(table.slice(0, 0), size, {})) == []


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


def test_only_the_batch_size_counts_for_fingerprints() -> None:
    assert fingerprinted(InferenceConfig(model="x", threads=4)) == {"batch_size": 16}
