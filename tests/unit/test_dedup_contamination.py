"""Images that show a picture of an evaluation set, from real files and a real embedder."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stages.base import LocalContext
from stages.dedup import EVALUATION, DedupConfig, DedupStage
from stages.errors import ConfigError, RunError, SourceError
from stages.keeper import ImageConfig, ImageKeeper
from stages.models.embedder import Embedder
from stages.models.images import decode
from stages.schemas import CONTAMINATED, DOWNLOAD, EMBEDDINGS
from tests.tables import filled
from tests.tiny_models import clip_model, save_clip

IMAGES = ImageConfig(image_size=64)


def picture(seed: int, size: int = 64) -> Image.Image:
    """Coloured fields, another picture for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format_: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(clip_model(), tmp_path_factory.mktemp("clip"))


def tables(folder: Path, embedder: Path, web: dict[str, bytes], human: dict[str, bytes]) -> Any:
    """What download and embed make of the images."""
    keep, model = ImageKeeper(IMAGES), Embedder(embedder)
    rows, vectors = [], []
    for source, images in (("web", web), ("human", human)):
        for sample, data in images.items():
            outcome = keep(data)
            assert outcome.image is not None
            known = {"sample_id": sample, "source": source, "status": "success"}
            names = ("sha256", "pixel_sha256", "phash")
            rows.append(known | {name: getattr(outcome, name) for name in names})
            vector = model.embed_images([decode(outcome.image)])[0]
            vectors.append({"sample_id": sample, "embedding": vector, "status": "success"})
    pq.write_table(filled(DOWNLOAD, rows), folder / "download.parquet")
    pq.write_table(filled(EMBEDDINGS, vectors, model="m"), folder / "embed.parquet")
    return {
        "download": [folder / "download.parquet"],
        "embeddings": [folder / "embed.parquet"],
        "embedder": [embedder],
    }


def run(
    folder: Path, inputs: Any, config: DedupConfig | None = None
) -> dict[str, tuple[str, str, float | None]]:
    DedupStage(config or DedupConfig(semantic_cosine=None), IMAGES).run(
        inputs, folder, LocalContext()
    )
    table = pq.read_table(folder / "contaminated.parquet")
    assert table.schema == CONTAMINATED
    return {
        row["sample_id"]: (row["collides_with"], row["net"], row["similarity"])
        for row in table.to_pylist()
    }


def test_every_net_finds_what_folders_and_tars_hold(tmp_path: Path, embedder: Path) -> None:
    web = {
        "file": encoded(picture(1)),
        "pixels": encoded(picture(2), "BMP"),
        "smaller": encoded(picture(3).resize((48, 48)), "JPEG", quality=80),
        "other": encoded(picture(4)),
    }
    human = {
        "annotated": encoded(picture(1)),
        "resaved": encoded(picture(3), "JPEG", quality=70),
        "also": encoded(picture(5)),
    }
    inputs = tables(tmp_path, embedder, web, human)
    (tmp_path / "test" / "deep").mkdir(parents=True)
    (tmp_path / "test" / "deep" / "one.png").write_bytes(encoded(picture(1)))
    (tmp_path / "test" / "two.png").write_bytes(encoded(picture(2)))
    (tmp_path / "test" / "broken.png").write_bytes(b"no image")
    (tmp_path / "test" / "deep").rename(tmp_path / "elsewhere")
    (tmp_path / "test" / "deep").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "test" / "captions.json").write_text("{}")
    with tarfile.open(tmp_path / "coco.tar", "w") as tar:
        info = tarfile.TarInfo("000001.jpg")
        data = encoded(picture(3), "JPEG", quality=95)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
    inputs[f"{EVALUATION}test"] = [tmp_path / "test"]
    inputs[f"{EVALUATION}coco"] = [tmp_path / "coco.tar"]
    # A random model's cosines say little; that they are asked for is what counts here.
    config = DedupConfig(
        semantic_cosine=None, perceptual_distance=60, perceptual_cosine=0.5, max_contaminated=1
    )
    found = run(tmp_path, inputs, config)
    assert set(found) == {"file", "pixels", "smaller", "annotated", "resaved"}
    assert found["file"] == found["annotated"] == ("test/deep/one.png", "exact", 1.0)
    assert found["pixels"] == ("test/two.png", "exact", 1.0)
    assert found["smaller"][:2] == ("coco/000001.jpg", "perceptual")
    assert found["resaved"][:2] == ("coco/000001.jpg", "perceptual")
    assert 0.5 <= (found["smaller"][2] or 0) < 1.0
    strict = config.model_copy(update={"perceptual_cosine": 1.0})
    assert set(run(tmp_path, inputs, strict)) == set(found) - {"smaller", "resaved"}
    measured = pq.read_table(tmp_path / "dedup.parquet").to_pylist()
    assert {"net": "contamination", "metric": "images", "value": 3.0} in measured


def test_a_picture_too_small_to_train_on_is_still_found(tmp_path: Path, embedder: Path) -> None:
    inputs = tables(tmp_path, embedder, {"large": encoded(picture(1, 128))}, {})
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "0.png").write_bytes(encoded(picture(1, 40)))
    inputs[f"{EVALUATION}test"] = [tmp_path / "test"]
    config = DedupConfig(semantic_cosine=None, perceptual_cosine=None, max_contaminated=1)
    stage = DedupStage(config, IMAGES.model_copy(update={"min_image_size": 64}))
    stage.run(inputs, tmp_path, LocalContext())
    (row,) = pq.read_table(tmp_path / "contaminated.parquet").to_pylist()
    assert (row["sample_id"], row["collides_with"]) == ("large", "test/0.png")


def test_embeddings_alone_are_enough(tmp_path: Path, embedder: Path) -> None:
    web = {name: encoded(picture(seed)) for seed, name in enumerate("abc", start=1)}
    inputs = tables(tmp_path, embedder, web, {})
    stored = pq.read_table(tmp_path / "embed.parquet")["embedding"].slice(1, 1)
    zero = pa.array([np.zeros(len(stored[0]), np.float16)], stored.type)
    column = pa.chunked_array([pa.nulls(1, stored.type), zero, *stored.chunks])
    pq.write_table(pa.table({"embedding": column}), tmp_path / "nocaps.parquet")
    inputs[f"{EVALUATION}nocaps"] = [tmp_path / "nocaps.parquet"]
    config = DedupConfig(semantic_cosine=0.99999)
    found = run(tmp_path, inputs, config)
    assert found == {"b": ("nocaps/2", "semantic", pytest.approx(1.0, abs=1e-3))}


def test_nothing_to_compare_with_contaminates_nothing(tmp_path: Path, embedder: Path) -> None:
    inputs = tables(tmp_path, embedder, {"a": encoded(picture(1))}, {})
    assert run(tmp_path, inputs) == {}
    inputs["embeddings"], inputs["download"] = [], []
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "a.png").write_bytes(encoded(picture(1)))
    assert run(tmp_path, inputs | {f"{EVALUATION}dev": [tmp_path / "dev"]}) == {}


@pytest.mark.parametrize("source", ["web", "human"])
def test_training_data_given_as_an_evaluation_set_stops_the_run(
    tmp_path: Path, embedder: Path, source: str
) -> None:
    images = {name: encoded(picture(seed)) for seed, name in enumerate("abc", start=1)}
    others = {f"other{seed}": encoded(picture(seed)) for seed in range(11, 18)}
    inputs = tables(tmp_path, embedder, *((images, others)[:: 1 if source == "web" else -1]))
    (tmp_path / "coco").mkdir()
    inputs[f"{EVALUATION}coco"] = [tmp_path / "coco"]
    (tmp_path / "coco" / "1.png").write_bytes(images["a"])
    assert set(run(tmp_path, inputs)) == {"a"}
    (tmp_path / "coco" / "2.png").write_bytes(images["b"])
    told = rf"^dedup\.evaluation: 2 of 3 {source} images .*\(2 of them of 'coco'\).* \(0\.5\): "
    with pytest.raises(ConfigError, match=told):
        run(tmp_path, inputs)
    lenient = DedupConfig(semantic_cosine=None, max_contaminated=0.7)
    assert set(run(tmp_path, inputs, lenient)) == {"a", "b"}


def test_sets_that_cannot_be_used_stop_the_run(tmp_path: Path, embedder: Path) -> None:
    inputs = tables(tmp_path, embedder, {"a": encoded(picture(1))}, {})
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("no tar")
    pq.write_table(pa.table({"vector": [[1.0]]}), tmp_path / "column.parquet")
    short = pa.table({"embedding": pa.array([[1.0, 0.0]], pa.list_(pa.float16()))})
    pq.write_table(short, tmp_path / "short.parquet")
    for name, error, message in (
        ("empty", SourceError, "no picture in it; give a folder or tar"),
        ("text.tar", SourceError, "cannot be read"),
        ("column.parquet", SourceError, "cannot be read"),
        ("short.parquet", RunError, "of length 2, the run's have"),
    ):
        with pytest.raises(error, match=message):
            run(tmp_path, inputs | {f"{EVALUATION}x": [tmp_path / name]})


def test_the_hash_of_pixels_does_not_see_the_file() -> None:
    keep = ImageKeeper(IMAGES)
    png, bmp = (keep(encoded(picture(1), kind)) for kind in ("PNG", "BMP"))
    assert png.sha256 != bmp.sha256
    assert png.pixel_sha256 == bmp.pixel_sha256 is not None
    assert png.pixel_sha256 != keep(encoded(picture(2))).pixel_sha256
    assert len(png.pixel_sha256) == len(hashlib.sha256().hexdigest())
