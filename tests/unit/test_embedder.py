from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from stages.errors import CheckpointError
from stages.models.embedder import Embedder
from stages.models.matcher import Matcher
from stages.models.preprocessing import Preprocessing
from tests import tiny_models

TEXTS = ["a cat", "two dogs, and 3 cars!", "", "x" * 100, "emoji 🙂 \u200f"]


def random_images(count: int, seed: int = 0) -> list[Image.Image]:
    generator = np.random.default_rng(seed)
    return [
        Image.fromarray(generator.integers(0, 256, (24 + i, 40, 3), dtype=np.uint8))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def model() -> CLIPModel:
    return tiny_models.clip_model()


@pytest.fixture(scope="module")
def clip(model: CLIPModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save_clip(model, tmp_path_factory.mktemp("models") / "clip")


@torch.inference_mode()
def test_clip_images_equal_transformers(clip: Path, model: CLIPModel) -> None:
    images = random_images(11)
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(images, return_tensors="pt")
    theirs = model.get_image_features(**pixels).pooler_output
    theirs = theirs / theirs.norm(dim=-1, keepdim=True)
    ours = Embedder(clip, batch_size=4)
    assert (ours.image_features(images) - theirs).abs().max() < 1e-5
    vectors = ours.embed_images(images)
    assert vectors.dtype == np.float16 and vectors.shape == (11, ours.dim) == (11, 24)
    assert np.abs(vectors - theirs.numpy()).max() < 1e-3
    assert np.linalg.norm(vectors.astype(float), axis=1) == pytest.approx(np.ones(11), abs=1e-2)
    assert (theirs[0] - theirs[1]).abs().max() > 0.01


@torch.inference_mode()
def test_clip_texts_equal_transformers(clip: Path, model: CLIPModel) -> None:
    ours = Embedder(clip, batch_size=1).text_features(TEXTS)  # four texts at a time
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    for vector, text in zip(ours, TEXTS, strict=True):
        batch = tokenizer([text], truncation=True, max_length=16, return_tensors="pt")
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        theirs = model.get_text_features(**inputs).pooler_output[0]
        assert (vector - theirs / theirs.norm()).abs().max() < 1e-5


@torch.inference_mode()
def test_blip_contrastive_head(tmp_path: Path) -> None:
    model = tiny_models.matcher_model()
    folder = tiny_models.save_blip(model, tmp_path / "med")
    embedder, images = Embedder(folder, batch_size=3), random_images(8)
    tokens = model.vision_model(Preprocessing(size=32)(images)).last_hidden_state
    theirs = torch.nn.functional.normalize(model.vision_proj(tokens[:, 0]), dim=-1)
    assert (embedder.image_features(images) - theirs).abs().max() < 1e-5
    scores = Matcher(folder).match(images, [TEXTS[:3]] * 8)
    cosines = embedder.image_features(images) @ embedder.text_features(TEXTS[:3]).T
    assert cosines.numpy() == pytest.approx(np.array(scores)[..., 1], abs=1e-5)
    assert embedder.dim == 24


def test_batches_do_not_matter_and_nothing_gives_nothing(clip: Path) -> None:
    embedder, images = Embedder(clip), random_images(9)
    one = Embedder(clip, batch_size=1)
    assert (embedder.image_features(images) - one.image_features(images)).abs().max() < 1e-6
    assert embedder.embed_images([]).shape == (0, 24)
    assert embedder.embed_texts([]).shape == (0, 24)
    assert embedder.embed_images([Image.new("RGB", (20_000, 10))]).shape == (1, 24)


def test_opening_leaves_the_global_generator_alone(clip: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    Embedder(clip)
    assert torch.equal(torch.rand(1), expected)


def test_images_need_no_tokenizer(clip: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((clip / name).read_bytes())
    embedder = Embedder(tmp_path)
    assert embedder.embed_images(random_images(1)).shape == (1, 24)
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        embedder.embed_texts(["a cat"])


def test_other_models_are_refused(tmp_path: Path) -> None:
    captioner = tiny_models.save_blip(tiny_models.captioner_model(), tmp_path / "captioner")
    with pytest.raises(CheckpointError, match=r"without any tensor 'vision_proj\."):
        Embedder(captioner)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="found model_type 'bert', need a CLIP model"):
        Embedder(tmp_path)


def test_int8_is_close(clip: Path, tmp_path: Path) -> None:
    blip = tiny_models.save_blip(tiny_models.matcher_model(), tmp_path / "blip")
    for folder in (clip, blip):
        whole, rounded = Embedder(folder), Embedder(folder, int8=True)
        images = random_images(6)
        cosines = (whole.image_features(images) * rounded.image_features(images)).sum(dim=1)
        assert cosines.min() > 0.99 and cosines.max() < 1 - 1e-7
        cosines = (whole.text_features(TEXTS) * rounded.text_features(TEXTS)).sum(dim=1)
        assert cosines.min() > 0.98


def test_bfloat16_is_close(clip: Path) -> None:
    images = random_images(5)
    whole, half = Embedder(clip), Embedder(clip, dtype=torch.bfloat16)
    assert (whole.image_features(images) * half.image_features(images)).sum(dim=1).min() > 0.99
    assert (whole.text_features(TEXTS) * half.text_features(TEXTS)).sum(dim=1).min() > 0.99


def test_half_a_surrogate_pair_harms_no_other_text(clip: Path) -> None:
    embedder = Embedder(clip)
    whole = embedder.text_features(["a", "b \ud800 c", "d"])
    assert (whole - embedder.text_features(["a", "b ? c", "d"])).abs().max() < 1e-6


def test_texts_that_do_not_fit_are_halved(clip: Path) -> None:
    embedder = Embedder(clip, batch_size=4)
    texts = [f"a red cat {number}" for number in range(13)]
    expected, read, tried = embedder.text_features(texts), embedder.towers.texts, []

    def small_machine(part: list[str]) -> torch.Tensor:
        tried.append(len(part))
        if len(part) > 8:
            raise MemoryError
        return read(part)

    embedder.towers.texts = small_machine
    assert (embedder.text_features(texts) - expected).abs().max() < 1e-5
    assert tried == [13, 8, 5]
