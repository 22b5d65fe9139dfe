"""MED in transformers' folder format: written for every BLIP class, read back to train on.

A MED folder opens in plain transformers as `BlipForImageTextRetrieval` and as
`BlipForConditionalGeneration`: ``config.json``, ``model.safetensors``, the tokenizer, and
``preprocessor_config.json``. ``momentum.safetensors`` holds what only training needs: momentum
copies and queues. Nothing here reads or writes a pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.errors import CheckpointError, ConfigError
from stages.models.config import INITIALIZER_STD, MedConfig
from stages.models.folders import (
    CAPTIONER_PARTS,
    MATCHER_PARTS,
    MOMENTUM_PARTS,
    QUEUES,
    ModelFolder,
)
from stages.models.med import Med
from stages.models.preprocessing import Preprocessing
from stages.models.text import fitted_to, load_tokenizer

if TYPE_CHECKING:
    from transformers import BertTokenizer

WEIGHTS = "model.safetensors"
MOMENTUM = "momentum.safetensors"
MATCHER = "BlipForImageTextRetrieval"
CAPTIONER = "BlipForConditionalGeneration"

_POSITIONS = {
    "vision_model.embeddings.position_embedding",
    "vision_model_m.embeddings.position_embedding",
}
_UNUSED = re.compile(r"\.pooler\.|embeddings\.position_ids$")
"""Tensors that BLIP folders may hold and nothing reads."""
# Names that transformers ties on loading, so that a file must not hold them twice.
TIED_IN_HEAD = tuple(f"text_decoder.cls.predictions.decoder.{name}" for name in ("weight", "bias"))


@dataclass(frozen=True)
class FolderKind:
    """What one kind of model folder holds."""

    parts: tuple[str, ...]
    """Starts of the names of its tensors."""
    architecture: str
    """The class of transformers that opens it."""


MED = FolderKind((*MATCHER_PARTS, *CAPTIONER_PARTS, "temp"), MATCHER)
"""Opens as a matcher and as a captioner."""
CAPTION = FolderKind(CAPTIONER_PARTS, CAPTIONER)
FILTER = FolderKind(MATCHER_PARTS, MATCHER)
TRAINING = (*MOMENTUM_PARTS, *QUEUES)
"""Starts of the names of what only training needs."""


def resized_positions(positions: Tensor, count: int) -> Tensor:
    """Image position embeddings (1, 1 + P, D) for ``count`` positions, class token included.

    Bicubic over the square grid, as transformers' ``interpolate_pos_encoding`` does.
    """
    if positions.shape[1] == count:
        return positions
    old, new = math.isqrt(positions.shape[1] - 1), math.isqrt(count - 1)
    grid = positions[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def load_tensors(med: Med, tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Load a whole MED: a BLIP folder's tensors, and momentum copies and queues if they are there.

    Tied tensors may appear under the encoder's name, the decoder's, or both. Without momentum
    copies they start equal to the online weights; queues of another size keep their random start.
    """
    state = med.state_dict()
    has_momentum = any(name.startswith(MOMENTUM_PARTS) for name in tensors)
    queue = tensors.get("image_queue")
    same_queues = queue is not None and queue.shape == state["image_queue"].shape
    optional = ("temp", *QUEUES) if has_momentum else ("temp", *QUEUES, *MOMENTUM_PARTS)
    filled = {name: value for name, value in state.items() if name.startswith(optional)}
    filled |= {k: v for k, v in tensors.items() if same_queues or k not in QUEUES}
    for ours, theirs in shared_names(state):
        if ours not in tensors and theirs in tensors:
            filled[ours] = tensors[theirs]
        elif ours in tensors and theirs in tensors and not tensors[ours].equal(tensors[theirs]):
            raise CheckpointError(
                f"{source}: {ours} and {theirs} differ; MED's encoder and decoder share them"
            )
    for name in filled.keys() & _POSITIONS:
        filled[name] = resized_positions(filled[name], state[name].shape[1])
    for name in filled.keys() & state.keys():
        if filled[name].shape != state[name].shape:
            found, needed = list(filled[name].shape), list(state[name].shape)
            raise CheckpointError(f"{source}: {name} has shape {found}; need {needed}")
    wrong = med.load_state_dict(filled, strict=False)
    if wrong.missing_keys:
        raise CheckpointError(
            f"{source}: no tensor {wrong.missing_keys[0]} ({len(wrong.missing_keys)} missing); "
            "need a whole MED, text encoder, text decoder and heads"
        )
    stray = [name for name in wrong.unexpected_keys if not _UNUSED.search(name)]
    if stray:
        raise CheckpointError(
            f"{source}: unexpected tensor {stray[0]} ({len(stray)} such); the weights do not fit "
            "config.json, save the model again or give another"
        )
    if not has_momentum:
        med.reset_momentum()


def shared_names(state: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Both ways round, the two names of each tensor that encoder and decoder share."""
    for name in state:
        if name.startswith("text_decoder.bert.") and ".attention." not in name:
            twin = name.replace("text_decoder.bert.", "text_encoder.", 1)
            yield name, twin
            yield twin, name


def load_med(source: str | Path, config: MedConfig | None = None) -> Med:
    """The MED in a folder or hub id, ready to train.

    The folder decides the architecture and the tokenizer the token ids; ``config`` decides the
    image size (positions are resized), dropout, stochastic depth, queue and loss constants. None =
    the folder's image size and BLIP's constants.

    Raises:
        CheckpointError: it is not one whole MED whose tensors are those of its config.
        ConfigError: ``config``'s image size does not fit its patches.
    """
    folder = ModelFolder.open(source)
    folder.require("blip", (*MATCHER_PARTS, *CAPTIONER_PARTS), "a whole MED")
    vision, text, projection_dim = folder.blip()
    text = fitted_to(text, load_tokenizer(folder.path))
    if config is not None:
        check_patches(source, config.vision.image_size)
        ours = {name: getattr(config.vision, name) for name in ("image_size", "drop_path")}
        vision = vision.model_copy(update=ours)
        text = text.model_copy(update={"dropout": config.text.dropout})
    parts = {"vision": vision, "text": text, "projection_dim": projection_dim}
    med = Med((config or MedConfig()).model_copy(update=parts))
    tensors = folder.tensors("")
    if (folder.path / MOMENTUM).is_file():
        tensors |= load_file(folder.path / MOMENTUM)
    load_tensors(med, tensors, source)
    return med


def check_patches(source: str | Path, size: int) -> None:
    """Raises ConfigError where images of ``size`` pixels are not whole patches of the BLIP in
    ``source``."""
    patch = ModelFolder.open(source).blip()[0].patch_size
    if size % patch:
        raise ConfigError(
            f"image_size {size} is no multiple of the {patch} pixels of a patch of {source}"
        )


def save_med(
    med: Med,
    tokenizer: BertTokenizer,
    folder: Path,
    preprocessing: Preprocessing | None = None,
    *,
    momentum: bool = True,
) -> None:
    """Write MED as one folder that both BLIP classes of transformers open.

    Shared tensors are written under both names, since either class reads its own only.
    ``momentum`` also writes the copies and queues, with which fine-tuning goes on.
    """
    tensors = med.state_dict()
    save_folder(MED, med.config, tensors, tokenizer, folder, preprocessing)
    if momentum:
        save_momentum(tensors, folder)


def save_captioner(
    med: Med,
    tokenizer: BertTokenizer,
    folder: Path,
    preprocessing: Preprocessing | None = None,
) -> None:
    """Write what captions: a folder for exactly `BlipForConditionalGeneration`."""
    save_folder(CAPTION, med.config, med.state_dict(), tokenizer, folder, preprocessing)


def save_filter(
    med: Med,
    tokenizer: BertTokenizer,
    folder: Path,
    preprocessing: Preprocessing | None = None,
) -> None:
    """Write what matches images and texts: a folder for exactly `BlipForImageTextRetrieval`."""
    save_folder(FILTER, med.config, med.state_dict(), tokenizer, folder, preprocessing)


def save_folder(
    kind: FolderKind,
    config: MedConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: BertTokenizer,
    folder: Path,
    preprocessing: Preprocessing | None = None,
) -> None:
    """Write a folder of this kind from MED's ``tensors``, of which it takes its own.

    ``preprocessing``: None = BLIP's, at the model's image size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _save_tokenizer(tokenizer, folder)
    _write_json(folder / "config.json", _blip_config(config, kind.architecture))
    processor = _processor_config(preprocessing or Preprocessing(size=config.vision.image_size))
    _write_json(folder / "preprocessor_config.json", processor)
    _save_tensors(tensors, kind.parts, folder / WEIGHTS)


def save_momentum(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Add to a MED folder the momentum copies and queues that are among ``tensors``."""
    _save_tensors(tensors, TRAINING, folder / MOMENTUM)


def _save_tokenizer(tokenizer: BertTokenizer, folder: Path) -> None:
    # The last batch's padding and truncation would be saved with it, and the same tokenizer would
    # make two different folders.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(str(folder))
    file = folder / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    # So would where it was once loaded from.
    for volatile in ("is_local", "local_files_only", "name_or_path"):
        content.pop(volatile, None)
    _write_json(file, content)


def _save_tensors(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...], file: Path) -> None:
    wanted = {
        # A clone for each name: safetensors refuses names that share memory.
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
        if name.startswith(prefixes) and name not in TIED_IN_HEAD
    }
    save_file(wanted, file, metadata={"format": "pt"})


def _write_json(file: Path, content: Mapping[str, object]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _blip_config(config: MedConfig, architecture: str) -> dict[str, object]:
    """``config.json`` of transformers' `BlipConfig`, every size written out."""
    vision, text = config.vision, config.text
    return {
        "architectures": [architecture],
        "model_type": "blip",
        "image_text_hidden_size": config.projection_dim,
        "initializer_range": INITIALIZER_STD,
        "label_smoothing": config.label_smoothing,
        "vision_config": {
            "model_type": "blip_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "intermediate_size": vision.mlp_width,
            "layer_norm_eps": vision.eps,
            "initializer_range": INITIALIZER_STD,
        },
        "text_config": {
            "model_type": "blip_text_model",
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "intermediate_size": text.mlp_width,
            "max_position_embeddings": text.max_positions,
            "encoder_hidden_size": vision.width,
            "layer_norm_eps": text.eps,
            "hidden_dropout_prob": text.dropout,
            "attention_probs_dropout_prob": text.dropout,
            "initializer_range": INITIALIZER_STD,
            "label_smoothing": config.label_smoothing,
            "pad_token_id": text.pad_token_id,
            "bos_token_id": text.dec_token_id,
            "eos_token_id": text.sep_token_id,
            "sep_token_id": text.sep_token_id,
            "is_decoder": True,
        },
    }


def _processor_config(preprocessing: Preprocessing) -> dict[str, object]:
    size = {"height": preprocessing.size, "width": preprocessing.size}
    return {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "BlipProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": preprocessing.resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def weights_hash(folder: Path) -> str:
    """sha256 over everything in a model folder that decides its outputs, for fingerprints.

    Covers config, processor, tokenizer and weights files: their names and contents, in order.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".txt", ".safetensors"):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
