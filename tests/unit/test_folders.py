import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BlipForImageTextRetrieval

from stages.errors import CheckpointError
from stages.models.captioner import Captioner
from stages.models.config import TextConfig, VisionConfig
from stages.models.embedder import Embedder
from stages.models.folders import ModelFolder
from stages.models.matcher import Matcher
from stages.models.vision import VisionTransformer
from tests import tiny_models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.save_blip(tiny_models.matcher_model(), tmp_path / "model")


def rewrite(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    """Put tensors into the folder's weights, or take those out that are None."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in change.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        Matcher(folder)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


def test_sizes_are_read_with_transformers_defaults(folder: Path) -> None:
    vision, text, width = ModelFolder.open(folder).blip()
    assert vision == VisionConfig(
        image_size=32, patch_size=8, width=48, layers=2, heads=4, mlp_width=96, eps=1e-5
    )
    assert isinstance(text, TextConfig) and (text.layers, text.vision_width) == (3, 48)
    assert width == 24
    (folder / "config.json").write_text('{"model_type": "blip"}')
    vision, text, _ = ModelFolder.open(folder).blip()
    assert (vision.image_size, vision.width, text.heads, text.vocab_size) == (384, 768, 8, 30524)


def test_sharded_weights(folder: Path) -> None:
    expected = Matcher(folder).vision.state_dict()
    BlipForImageTextRetrieval.from_pretrained(folder).save_pretrained(
        folder, max_shard_size="50KB"
    )  # fmt: skip
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    found = Matcher(folder).vision.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_that_names_nothing(folder: Path, index: dict[str, object]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json names no files of weights" in refusal(folder)


def test_old_buffers_and_poolers_do_no_harm(folder: Path) -> None:
    rewrite(
        folder,
        {
            "text_encoder.embeddings.position_ids": torch.arange(40)[None],
            "text_encoder.pooler.dense.weight": torch.zeros(32, 32),
        },
    )
    Matcher(folder)


def test_a_part_takes_no_random_numbers(folder: Path) -> None:
    opened = ModelFolder.open(folder)
    vision = opened.blip()[0]
    state = torch.get_rng_state()
    part = opened.part(lambda: VisionTransformer(vision), "vision_model.")
    assert torch.equal(torch.get_rng_state(), state)
    assert not part.training and not any(p.requires_grad for p in part.parameters())


def test_what_is_no_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")
    assert "no such folder" in refusal("./nowhere")
    (tmp_path / "file").write_text("x")
    assert "no such folder" in refusal(tmp_path / "file")
    assert "no config.json" in refusal(tmp_path)


def test_a_hub_id_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "not to be had from the hub" in refusal("nobody/nothing")
    assert "not to be had from the hub" in refusal("nobody/nothing@v1.0")


def test_another_kind_of_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert"}')
    message = refusal(folder)
    assert "found model_type 'bert', need a BLIP matcher" in message
    (folder / "config.json").write_text("not json")
    assert "cannot read config.json" in refusal(folder)
    (folder / "config.json").write_text("[]")
    assert "does not hold a JSON object" in refusal(folder)


def test_a_config_that_makes_no_sense(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for part, key, value, message in [
        ("vision_config", "patch_size", 5, "image_size 32 is not a multiple of patch_size 5"),
        ("text_config", "num_attention_heads", 5, "width 32 is not a multiple of heads 5"),
        ("text_config", "hidden_act", "relu", "hidden_act 'relu', only 'gelu'"),
        ("text_config", "hidden_size", "abc", "hidden_size"),
    ]:
        changed = {**config, part: {**config[part], key: value}}
        (folder / "config.json").write_text(json.dumps(changed))
        assert message in refusal(folder)


def test_weights_that_do_not_fit(folder: Path) -> None:
    name = "text_encoder.encoder.layer.1.output.dense.weight"
    rewrite(folder, {name: torch.zeros(32, 63)})
    assert f"misshapen tensor {name} (32, 63), needs (32, 64)" in refusal(folder)
    rewrite(folder, {name: None})
    assert f"no tensor {name} (1 such)" in refusal(folder)
    rewrite(folder, {name: torch.zeros(32, 64), "text_encoder.extra": torch.zeros(1)})
    assert "unexpected tensor text_encoder.extra" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "found", "needed"),
    [
        ("itm_head.weight", (2, 31), (2, 32)),
        ("itm_head.weight", (1, 32), (2, 32)),
        ("itm_head.weight", (32,), (2, 32)),
        ("vision_proj.weight", (24, 47), (24, 48)),
        ("text_proj.weight", (23, 32), (24, 32)),
        ("text_proj.bias", (23,), (24,)),
    ],
)
def test_heads_that_do_not_fit(
    folder: Path, name: str, found: tuple[int, ...], needed: tuple[int, ...]
) -> None:
    rewrite(folder, {name: torch.zeros(found)})
    told = f"misshapen tensor {name} {found}, needs {needed} (1 such); the weights do not fit"
    assert told in refusal(folder)
    if not name.startswith("itm_head."):
        with pytest.raises(CheckpointError, match=re.escape(told)):
            Embedder(folder).embed_texts(["a cat"])


def test_a_contrastive_space_of_another_width_than_the_config_says(folder: Path) -> None:
    change = {f"{side}_proj.bias": torch.zeros(23) for side in ("vision", "text")}
    widths = (("vision", 48), ("text", 32))
    change |= {f"{side}_proj.weight": torch.zeros(23, width) for side, width in widths}
    rewrite(folder, change)
    told = "misshapen tensor vision_proj.weight (23, 48), needs (24, 48)"
    assert told in refusal(folder)
    with pytest.raises(CheckpointError, match=re.escape(told)):
        Embedder(folder)


@pytest.mark.parametrize("name", ["stray", "temperature", "lm_head.weight", "vision_modelx.weight"])
def test_a_tensor_of_no_part_is_refused(folder: Path, name: str) -> None:
    rewrite(folder, {name: torch.zeros(1)})
    assert f"unexpected tensor {name} (1 such), need a BLIP matcher" in refusal(folder)
    with pytest.raises(CheckpointError, match=f"unexpected tensor {name}"):
        Embedder(folder)


@pytest.mark.parametrize(
    "name",
    [
        "text_decoder.extra",
        "text_decoder.bertx.w",
        "text_decoder.bert.extra",
        "text_decoder.cls.seq_relationship.weight",
        "text_decoder.cls.predictions.extra",
        "vision_model.extra",
    ],
)
def test_a_tensor_that_a_captioner_does_not_read_is_refused(tmp_path: Path, name: str) -> None:
    folder = tiny_models.save_blip(tiny_models.captioner_model(), tmp_path / "captioner")
    rewrite(folder, {name: torch.zeros(1)})
    with pytest.raises(CheckpointError, match=f"unexpected tensor {name} "):
        Captioner(folder)


@pytest.mark.parametrize(
    "name",
    ["text_decoder.extra", "vision_model.extra", "vision_proj.extra", "text_proj.extra",
     "itm_head.extra", "text_encoder.strange_position_ids"],
)  # fmt: skip
def test_a_tensor_that_a_matcher_does_not_read_is_refused(folder: Path, name: str) -> None:
    rewrite(folder, {name: torch.zeros(1)})
    assert f"unexpected tensor {name} " in refusal(folder)


def test_what_captioners_hold_besides_is_let_pass(tmp_path: Path) -> None:
    model = tiny_models.captioner_model()
    folder = tiny_models.save_blip(model, tmp_path / "captioner")
    words = model.text_decoder.bert.embeddings.word_embeddings.weight.detach()
    bias = load_file(folder / "model.safetensors")["text_decoder.cls.predictions.bias"]
    rewrite(
        folder,
        {
            "text_decoder.bert.embeddings.position_ids": torch.arange(40)[None],
            "text_decoder.bert.pooler.dense.weight": torch.zeros(32, 32),
            "text_decoder.cls.predictions.decoder.weight": words.clone(),
            "text_decoder.cls.predictions.decoder.bias": bias.clone(),
            "text_encoder.embeddings.position_ids": torch.arange(40)[None],
            "itm_head.weight": torch.zeros(2, 32),
            "vision_proj.weight": torch.zeros(24, 48),
        },
    )
    Captioner(folder)


def test_what_released_checkpoints_hold_besides_is_let_pass(folder: Path) -> None:
    names = ["temp", "image_queue", "text_queue", "queue_ptr", "image_id_queue",
             "vision_model_m.x", "text_encoder_m.x", "vision_proj_m.bias", "text_proj_m.bias",
             "text_decoder.bert.x"]  # fmt: skip
    rewrite(folder, {name: torch.zeros(1) for name in names})
    Matcher(folder)


def test_pickled_weights_are_never_opened(folder: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "exploded",)  # type: ignore[return-value]

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert "pickled weights are never opened" in refusal(folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    assert "model.safetensors is not safetensors" in refusal(folder)
    assert not (tmp_path / "exploded").exists()


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    larger = tiny_models.tokenizer()
    larger.add_tokens(["zebra"])
    larger.save_pretrained(folder)
    count = len(larger)
    assert f"the tokenizer has {count} tokens, config.json says {count - 1}" in refusal(folder)


def test_image_settings(folder: Path) -> None:
    opened = ModelFolder.open(folder)
    assert opened.preprocessing(32, crop=False).shortest_edge is None
    nested = {"image_processor": {"image_mean": [0.1, 0.2, 0.3]}}
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps(nested))
    assert opened.preprocessing(32, crop=False).mean == (0.1, 0.2, 0.3)
    (folder / "preprocessor_config.json").write_text('{"image_mean": "grey"}')
    assert "image processor config" in refusal(folder)
