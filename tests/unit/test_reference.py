"""Three pretraining steps of the original BLIP release, replayed in double precision.

The numbers come from running the original on tiny random weights. Another folder with the same
kind of files (one .safetensors with its .json of the same stem) is taken from CAPFILT_REFERENCE.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stages.models.checkpoints import load_tensors
from stages.models.config import MedConfig, TextConfig, VisionConfig
from stages.models.med import Med
from stages.models.text import clean_caption

FOLDER = Path(
    os.environ.get("CAPFILT_REFERENCE", Path(__file__).parent.parent / "fixtures" / "reference")
)


def runs() -> list[tuple[Path, Path]]:
    """Each JSON that describes training steps, with its safetensors: of its name, or the only."""
    found = []
    weights = sorted(FOLDER.glob("*.safetensors"))
    for file in sorted(FOLDER.glob("*.json")):
        if "steps" in json.loads(file.read_text()):
            own = [path for path in weights if path.stem == file.stem] or weights
            assert len(own) == 1, f"which of {own} belongs to {file}?"
            found.append((file, own[0]))
    return found


def documents(key: str) -> list[Any]:
    """What the folder's JSON files hold under ``key``, one after the other."""
    contents = [json.loads(file.read_text()) for file in sorted(FOLDER.glob("*.json"))]
    dicts = [content for content in contents if isinstance(content, dict)]
    return [case for content in dicts for case in content.get(key, [])]


def test_the_folder_holds_a_reference() -> None:
    assert runs()


def med_of(facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Med:
    vision, text = facts["architecture"]["vision"], facts["architecture"]["text"]
    sizes = facts["architecture"]
    config = MedConfig(
        vision=VisionConfig(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["hidden_size"],
            layers=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            mlp_width=vision["intermediate_size"],
            eps=vision["layer_norm_eps"],
        ),
        text=TextConfig(
            vocab_size=text["vocab_size"],
            width=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            mlp_width=text["intermediate_size"],
            max_positions=text["max_position_embeddings"],
            vision_width=text["encoder_hidden_size"],
            eps=text["layer_norm_eps"],
            dropout=text["dropout"],
            pad_token_id=facts["pad_token_id"],
            dec_token_id=facts["bos_token_id"],
            enc_token_id=facts["enc_token_id"],
        ),
        projection_dim=sizes["projection_dim"],
        queue_size=sizes["queue_size"],
        momentum=sizes["momentum"],
        temperature=sizes["temperature_init"],
        label_smoothing=text["label_smoothing"],
        mask_same_image=False,
    )
    med = Med(config).double()
    weights = {name: value for name, value in tensors.items() if not name.startswith("step")}
    load_tensors(med, weights, FOLDER)
    return med.train()


@pytest.mark.parametrize("run", runs(), ids=lambda run: run[0].stem)
def test_losses_gradients_and_weights_are_the_originals(run: tuple[Path, Path]) -> None:
    facts, tensors = json.loads(run[0].read_text()), load_file(run[1])
    med = med_of(facts, tensors)
    options = {name: value for name, value in facts["optimizer"].items() if name != "name"}
    trained = [parameter for parameter in med.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, **options)
    for number, step in enumerate(facts["steps"]):
        med.begin_step()
        losses = med(
            tensors[f"step{number}.pixel_values"].double(),
            tensors[f"step{number}.input_ids"],
            tensors[f"step{number}.attention_mask"],
            step["alpha"],
            negatives=(
                torch.tensor(step["negative_image_index"]),
                torch.tensor(step["negative_text_index"]),
            ),
        )
        for name, value in zip(("itc", "itm", "lm"), losses, strict=True):
            assert value.item() == pytest.approx(step[f"loss_{name}"], rel=1e-9), (number, name)
        optimizer.zero_grad()
        losses.total.backward()
        assert gradient_norms(med) == pytest.approx(step["grad_norm"], rel=1e-9, abs=1e-12)
        optimizer.step()
        assert med.queue_ptr.item() == step["queue_ptr_after"]

    after = facts["after_3_steps"]
    state = med.state_dict()
    for name, fact in after.items():
        tensor = state[name].double()
        assert tensor.sum().item() == pytest.approx(fact["sum"], rel=1e-8, abs=1e-8), name
        assert tensor.norm().item() == pytest.approx(fact["l2"], rel=1e-8, abs=1e-8), name
    # A reference that leaves out a weight of ours would prove nothing about it.
    unnamed = set(state) - set(after) - {"image_id_queue"}
    assert not unnamed


def gradient_norms(med: Med) -> dict[str, float]:
    return {
        name: parameter.grad.norm().item()
        for name, parameter in med.named_parameters()
        if parameter.grad is not None
    }


def test_captions_are_cleaned_as_in_the_original() -> None:
    cases = documents("text_cleaning")
    assert len(cases) >= 60
    for case in cases:
        assert clean_caption(case["input"], case["max_words"]) == case["output"], case["input"]
