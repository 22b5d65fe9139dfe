"""Folders that we write, opened by plain transformers and by ourselves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoProcessor,
    BertTokenizer,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    CLIPConfig,
)

from stages.errors import CheckpointError, ConfigError
from stages.models.checkpoints import (
    load_med,
    resized_positions,
    save_captioner,
    save_filter,
    save_med,
    weights_hash,
)
from stages.models.config import MedConfig, TextConfig, VisionConfig
from stages.models.med import Med
from stages.models.preprocessing import Preprocessing
from stages.models.text import encode_texts, fitted_to, load_tokenizer, word_tokenizer

TEXTS = ["a red dog on the grass", "two cats"]


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    return word_tokenizer(TEXTS, min_count=1)


def tiny(tokenizer: BertTokenizer, seed: int = 0, **changes: object) -> Med:
    torch.manual_seed(seed)
    text = TextConfig(
        width=32, layers=2, heads=2, mlp_width=64, max_positions=40, vision_width=48, dropout=0.0
    )
    config = MedConfig(
        vision=VisionConfig(image_size=32, patch_size=8, width=48, layers=2, heads=4, mlp_width=96),
        text=fitted_to(text, tokenizer),
        projection_dim=24,
        queue_size=16,
    )
    med = Med(config.model_copy(update=changes)).eval()
    with torch.no_grad():
        for parameter in med.parameters():
            parameter.normal_(std=0.2)
    return med


@pytest.fixture(scope="module")
def med(tokenizer: BertTokenizer) -> Med:
    return tiny(tokenizer)


@pytest.fixture(scope="module")
def folder(med: Med, tokenizer: BertTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("med")
    save_med(med, tokenizer, path)
    return path


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def match_scores(med: Med, pixels: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Our ITM logits and cosines, of each text with the one image."""
    tokens = med.vision_model(pixels)
    states = med.text_encoder(ids, mask, image_kv=med.text_encoder.cross_kv(tokens))
    image = torch.nn.functional.normalize(med.vision_proj(tokens[:, 0]), dim=-1)
    text = torch.nn.functional.normalize(med.text_proj(med.text_encoder(ids, mask)[:, 0]), dim=-1)
    return med.itm_head(states[:, 0]), image @ text.T


@torch.no_grad()
def assert_same_matcher(path: Path, med: Med, tokenizer: BertTokenizer) -> None:
    theirs, info = BlipForImageTextRetrieval.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    pixels = torch.randn(1, 3, 32, 32)
    ids, mask = encode_texts(tokenizer, TEXTS, 30)
    ours = match_scores(med, pixels, ids, mask)
    wide = pixels.expand(2, -1, -1, -1)
    logits = theirs(input_ids=ids, pixel_values=wide, attention_mask=mask).itm_score
    cosine = theirs(input_ids=ids, pixel_values=pixels, attention_mask=mask, use_itm_head=False)
    torch.testing.assert_close(ours[0], logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], cosine.itm_score, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def assert_same_captioner(path: Path, med: Med, tokenizer: BertTokenizer) -> None:
    theirs, info = BlipForConditionalGeneration.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    pixels = torch.randn(2, 3, 32, 32)
    ids, mask = encode_texts(tokenizer, TEXTS, 30)
    ids[:, 0] = tokenizer.bos_token_id
    kv = med.text_encoder.cross_kv(med.vision_model(pixels))
    states = med.text_decoder.bert(ids, mask, causal=True, image_kv=kv)
    logits = theirs(input_ids=ids, pixel_values=pixels, attention_mask=mask).logits
    valid = mask.bool()
    torch.testing.assert_close(
        med.text_decoder.cls.predictions(states)[valid], logits[valid], rtol=1e-5, atol=1e-5
    )
    generated = theirs.generate(pixels, max_new_tokens=3)
    assert generated[:, 0].tolist() == [tokenizer.bos_token_id] * 2


def test_one_folder_serves_both_classes(folder: Path, med: Med, tokenizer: BertTokenizer) -> None:
    assert_same_matcher(folder, med, tokenizer)
    assert_same_captioner(folder, med, tokenizer)


def test_single_purpose_folders_hold_nothing_else(
    med: Med, tokenizer: BertTokenizer, tmp_path: Path
) -> None:
    save_filter(med, tokenizer, tmp_path / "filter")
    save_captioner(med, tokenizer, tmp_path / "captioner")
    assert_same_matcher(tmp_path / "filter", med, tokenizer)
    assert_same_captioner(tmp_path / "captioner", med, tokenizer)
    for name, kind in (
        ("filter", BlipForImageTextRetrieval),
        ("captioner", BlipForConditionalGeneration),
    ):
        _, info = kind.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["unexpected_keys"]
        assert not (tmp_path / name / "momentum.safetensors").exists()


def test_auto_processor_prepares_what_we_prepare(
    folder: Path, tokenizer: BertTokenizer, photo: Image.Image
) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    batch = processor(images=photo, text=TEXTS, padding=True, return_tensors="pt")
    ids, mask = encode_texts(tokenizer, TEXTS, 30)
    assert torch.equal(batch["input_ids"], ids)
    assert torch.equal(batch["attention_mask"], mask)
    torch.testing.assert_close(batch["pixel_values"], Preprocessing(size=32)([photo]))


def test_med_comes_back_whole(folder: Path, med: Med) -> None:
    found = load_med(folder, med.config)
    assert found.config == med.config
    saved = med.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in found.state_dict().items())
    words = found.text_encoder.embeddings.word_embeddings.weight
    assert found.text_decoder.cls.predictions.decoder.weight is words
    assert load_med(folder).config.text == med.config.text


def test_without_momentum_the_copies_start_equal(
    med: Med, tokenizer: BertTokenizer, tmp_path: Path
) -> None:
    save_med(med, tokenizer, tmp_path, momentum=False)
    found = load_med(tmp_path, med.config)
    copies = found.vision_model_m.state_dict()
    assert all(torch.equal(v, copies[n]) for n, v in found.vision_model.state_dict().items())
    torch.testing.assert_close(found.image_queue.norm(dim=0), torch.ones(16))


def test_queues_of_another_size_start_anew(folder: Path, med: Med) -> None:
    found = load_med(folder, med.config.model_copy(update={"queue_size": 8}))
    assert found.image_queue.shape == (24, 8)
    assert found.queue_ptr.item() == 0
    assert torch.equal(found.text_proj_m.weight, med.text_proj_m.weight)


def test_positions_are_resized_as_transformers_does(
    folder: Path, med: Med, tokenizer: BertTokenizer
) -> None:
    vision = med.config.vision.model_copy(update={"image_size": 48})
    found = load_med(folder, med.config.model_copy(update={"vision": vision})).eval()
    pixels = torch.randn(1, 3, 48, 48)
    theirs = BlipForImageTextRetrieval.from_pretrained(folder).vision_model.eval()
    with torch.no_grad():
        expected = theirs(pixels, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(found.vision_model(pixels), expected, rtol=1e-4, atol=1e-4)
    positions = torch.randn(1, 17, 6)
    assert resized_positions(positions, 17) is positions


def test_stochastic_depth_is_the_configs_and_no_folder_holds_it(
    med: Med, tokenizer: BertTokenizer, tmp_path: Path
) -> None:
    config = med.config
    vision = config.vision.model_copy(update={"drop_path": 0.1})
    save_med(Med(config.model_copy(update={"vision": vision})), tokenizer, tmp_path / "med")
    assert "drop_path" not in (tmp_path / "med" / "config.json").read_text()
    BlipForImageTextRetrieval.from_pretrained(tmp_path / "med")
    assert load_med(tmp_path / "med").config.vision.drop_path == 0
    again = load_med(tmp_path / "med", config.model_copy(update={"vision": vision}))
    for tower in (again.vision_model, again.vision_model_m):  # the original's too, in train mode
        assert tower.layers[0].drop_path == 0
        assert tower.layers[-1].drop_path == 0.1
        assert tower.layers[-1].training


def test_hash_follows_the_contents_only(
    folder: Path, med: Med, tokenizer: BertTokenizer, tmp_path: Path
) -> None:
    save_med(med, tokenizer, tmp_path / "again")
    assert weights_hash(tmp_path / "again") == weights_hash(folder)
    # A tokenizer that was itself loaded from a folder writes the same files.
    save_med(med, load_tokenizer(folder), tmp_path / "reloaded")
    assert weights_hash(tmp_path / "reloaded") == weights_hash(folder)
    save_med(tiny(tokenizer, seed=1), tokenizer, tmp_path / "other")
    assert weights_hash(tmp_path / "other") != weights_hash(folder)


def complaint(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        load_med(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_folders_that_are_no_med_are_refused_in_one_line(
    folder: Path, med: Med, tokenizer: BertTokenizer, tmp_path: Path
) -> None:
    assert "config.json" in complaint(tmp_path)
    CLIPConfig().save_pretrained(tmp_path / "clip")
    assert "clip" in complaint(tmp_path / "clip")
    save_captioner(med, tokenizer, tmp_path / "captioner")
    assert "text_encoder" in complaint(tmp_path / "captioner")
    save_med(med, tokenizer, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "model.safetensors" in complaint(tmp_path / "cut")
    weights.unlink()
    torch.save({}, tmp_path / "cut" / "pytorch_model.bin")
    assert "model.safetensors" in complaint(tmp_path / "cut")


def test_weights_that_do_not_fit_their_config_are_refused(
    med: Med, tokenizer: BertTokenizer, tmp_path: Path
) -> None:
    save_med(med, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 80
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "shape" in complaint(tmp_path)
    save_med(med, tokenizer, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["itm_head.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert "no tensor itm_head.bias" in complaint(tmp_path)
    save_med(med, tokenizer, tmp_path)
    name = "text_encoder.encoder.layer.7.output.dense.bias"
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {name: torch.zeros(8)}, tmp_path / "model.safetensors")
    assert f"unexpected tensor {name} (1 such)" in complaint(tmp_path)
    spare = {"text_encoder.pooler.dense.bias": torch.zeros(8)}
    spare["text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    save_file(tensors | spare, tmp_path / "model.safetensors")
    load_med(tmp_path)


def test_an_encoder_and_a_decoder_that_do_not_share_are_refused(
    med: Med, tokenizer: BertTokenizer, tmp_path: Path
) -> None:
    """Either could be meant, so neither is taken."""
    save_med(med, tokenizer, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "text_decoder.bert.encoder.layer.0.output.dense.bias"
    tensors[name] = tensors[name] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    message = complaint(tmp_path)
    assert name in message and name.replace("text_decoder.bert", "text_encoder") in message


def test_an_image_size_of_no_whole_patches_is_refused(folder: Path, med: Med) -> None:
    patch = med.config.vision.patch_size
    vision = VisionConfig().model_copy(update={"image_size": 3 * patch + 1})
    config = med.config.model_copy(update={"vision": vision})
    with pytest.raises(ConfigError, match=f"image_size {3 * patch + 1} is no multiple of the"):
        load_med(folder, config)
