"""Checkpoints of the original BLIP release (``.pth``) as transformers folders.

A file of the release is a dict whose ``model`` maps names to tensors. What its tensors suffice for
is written: a pretraining checkpoint becomes ``captioner``, ``filter`` and ``med``, a captioning
checkpoint ``captioner`` alone, a retrieval checkpoint ``filter`` alone. Sizes are read off the
tensors; the number of heads, which no tensor tells, is that of ViT-B, ViT-L and BERT-base: 64 wide.
"""

from __future__ import annotations

import math
import pickle
import shutil
import struct
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError
from torch import Tensor

from stages.errors import CheckpointError
from stages.models.checkpoints import (
    CAPTION,
    FILTER,
    MED,
    TIED_IN_HEAD,
    TRAINING,
    FolderKind,
    resized_positions,
    save_folder,
    save_momentum,
    shared_names,
)
from stages.models.config import MedConfig, TextConfig, VisionConfig
from stages.models.folders import check_tensors, one_line
from stages.models.med import NO_IMAGE_ID, Med
from stages.models.text import fitted_to, load_tokenizer
from stages.models.vision import shapes_only

if TYPE_CHECKING:
    from transformers import BertTokenizer

BERT = "bert-base-uncased"
HEAD_WIDTH = 64

_KINDS = {"captioner": CAPTION, "filter": FILTER, "med": MED}
_NEED = "need a .pth as BLIP released it: a dict whose 'model' maps names to tensors"
_FIT = "these are not the weights of a BLIP model"
# All that unpickling ran into, over thousands of files with a few bytes changed.
_DAMAGED = (
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
)
# From our names, which are transformers', to the original's; all other parts are named alike.
_VISION_NAMES = (
    ("vision_model", "visual_encoder"),
    (".embeddings.class_embedding", ".cls_token"),
    (".embeddings.position_embedding", ".pos_embed"),
    (".embeddings.patch_embedding.", ".patch_embed.proj."),
    (".post_layernorm.", ".norm."),
    (".encoder.layers.", ".blocks."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
)
_POSITIONS = ("visual_encoder.pos_embed", "visual_encoder_m.pos_embed")
_HEAD = "text_decoder.cls.predictions"
_QUEUES = ("image_queue", "text_queue", "queue_ptr")
_IMAGE_IDS = "image_id_queue"  # the original's pretraining has none


@dataclass(frozen=True)
class Imported:
    """What `import_checkpoint` wrote."""

    config: MedConfig
    folders: Mapping[str, Path]
    """Of captioner, filter and med, those that were written."""
    notes: tuple[str, ...]
    """What was not written, or not as it stood in the file, and why: a line each."""


def original_name(name: str) -> str:
    """What the original calls the tensor that transformers, and `Med`, call ``name``."""
    if name.startswith("vision_model"):
        for ours, theirs in _VISION_NAMES:
            name = name.replace(ours, theirs, 1)
    return name


def import_checkpoint(
    file: Path,
    out: Path,
    *,
    tokenizer: str = BERT,
    image_size: int | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> Imported:
    """Write the models in ``file`` as folders below ``out``, which appears whole or not at all.

    Args:
        tokenizer: folder or hub id of the BERT tokenizer that the model was trained with.
        image_size: pixels for which position embeddings are resized; None = as in the file.
        vision_heads, text_heads: None = the tower's width / 64.

    Raises:
        CheckpointError: not such a file, tensors are missing or misshapen, the tokenizer is
            another, or ``out`` is in use. Pickled code is never run.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists and is not empty; give a new folder")
    tensors, source = _read(file), str(file)
    kinds, notes = _claimed(tensors, source)
    config = _config(tensors, source, kinds, vision_heads, text_heads)
    words = _words(tokenizer, config.text.vocab_size, source)
    config = config.model_copy(update={"text": fitted_to(config.text, words)})
    state = _state(tensors, source, config, kinds)
    if "med" in kinds and (apart := _apart(state)):
        del kinds["med"]
        notes.append(f"no med: encoder and decoder do not share {apart}")
    if image_size is not None:
        config = config.model_copy(update={"vision": _resized(config.vision, image_size)})
        for name in filter(lambda name: original_name(name) in _POSITIONS, state):
            state[name] = resized_positions(state[name], 1 + config.vision.patches)
    with _whole(out) as scratch:
        for name, kind in kinds.items():
            save_folder(kind, config, state, words, scratch / name)
        if _IMAGE_IDS in state and "med" in kinds:
            save_momentum(state, scratch / "med")
    return Imported(config, {name: out / name for name in kinds}, tuple(notes))


def _read(file: Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, floats in single precision, without running its pickle."""
    try:
        # A file that torch 1.6 or newer wrote is mapped, so that only what is used is read.
        mapped = zipfile.is_zipfile(file)
        with warnings.catch_warnings(action="ignore"):  # of what it refuses next
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file; {_NEED}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file}: holds other pickled objects than tensors, which are never loaded, or is no "
            f"checkpoint; {_NEED}"
        ) from error
    except _DAMAGED as error:
        raise CheckpointError(f"{file}: cannot be read: {one_line(error)}; {_NEED}") from error
    if not isinstance(content, dict) or "model" not in content:
        raise CheckpointError(f"{file}: no 'model' in it; {_NEED}")
    model = content["model"]
    named = isinstance(model, dict) and all(isinstance(name, str) for name in model)
    if not named or not all(isinstance(tensor, Tensor) for tensor in model.values()):
        raise CheckpointError(f"{file}: 'model' is no dict of named tensors; {_NEED}")
    tensors = {n: t.float() if t.is_floating_point() else t for n, t in model.items()}
    return {n: t for n, t in tensors.items() if not n.endswith(".position_ids")}


def _claimed(tensors: dict[str, Tensor], source: str) -> tuple[dict[str, FolderKind], list[str]]:
    """The folders that the file has every part of, and why not the others."""
    lacking: dict[str, str] = {}
    for name, kind in _KINDS.items():
        parts = (original_name(part) for part in kind.parts if part != "temp")
        gone = [part for part in parts if not any(tensor.startswith(part) for tensor in tensors)]
        if gone:
            lacking[name] = f"no {name}: the file has no {gone[0]}*"
    kinds = {name: kind for name, kind in _KINDS.items() if name not in lacking}
    # Models for other tasks have an encoder without these heads; what their decoder looks at is
    # no image, though its tensors have the shapes of a captioner's.
    other = any(n.startswith("text_encoder.") for n in tensors) and "filter" in lacking
    if other or not kinds:
        raise CheckpointError(
            f"{source}: holds neither captioner nor filter "
            f"({'; '.join(lacking.values())}); need a checkpoint of pretraining, captioning or "
            "retrieval"
        )
    return kinds, [*lacking.values(), *_untied(tensors)]


def _untied(tensors: dict[str, Tensor]) -> Iterator[str]:
    """Leave each tied tensor of the LM head under one name; says where they were not equal."""
    weight, bias = (tensors.pop(name, None) for name in TIED_IN_HEAD)
    if bias is not None:
        # Of the two biases this is the one that the original adds to the scores.
        tensors[f"{_HEAD}.bias"] = bias
    words = tensors.get("text_decoder.bert.embeddings.word_embeddings.weight")
    if weight is not None and words is not None and not torch.equal(weight, words):
        yield "captioner: the LM head differs from the word embeddings, which take its place"


class _Shapes:
    """The shapes in a checkpoint; what is not as expected is refused by name."""

    def __init__(self, tensors: Mapping[str, Tensor], source: str) -> None:
        self._tensors, self._source = tensors, source

    def of(self, name: str, dimensions: int) -> Sequence[int]:
        if name not in self._tensors:
            raise CheckpointError(f"{self._source}: no tensor {name}; {_FIT}")
        found = self._tensors[name].shape
        if len(found) != dimensions or 0 in found:
            raise CheckpointError(
                f"{self._source}: misshapen tensor {name} {tuple(found)}, needs {dimensions} "
                f"dimensions; {_FIT}"
            )
        return found

    def layers(self, prefix: str) -> int:
        rest = (name.removeprefix(prefix) for name in self._tensors if name.startswith(prefix))
        return len({name.partition(".")[0] for name in rest})

    def vision(self, heads: int | None) -> VisionConfig:
        tower = "visual_encoder."
        patches = self.of(f"{tower}pos_embed", 3)[1] - 1
        width, _, patch, _ = self.of(f"{tower}patch_embed.proj.weight", 4)
        side = math.isqrt(patches)
        if side * side != patches:
            raise ValueError(f"{tower}pos_embed has {patches} patches, no square; {_FIT}")
        return VisionConfig(
            image_size=side * patch,
            patch_size=patch,
            width=width,
            layers=self.layers(f"{tower}blocks."),
            heads=_heads("vision", width, heads),
            mlp_width=self.of(f"{tower}blocks.0.mlp.fc1.weight", 2)[0],
        )

    def text(self, stack: str, vision_width: int, heads: int | None) -> TextConfig:
        vocabulary, width = self.of(f"{stack}embeddings.word_embeddings.weight", 2)
        return TextConfig(
            vocab_size=vocabulary,
            width=width,
            layers=self.layers(f"{stack}encoder.layer."),
            heads=_heads("text", width, heads),
            mlp_width=self.of(f"{stack}encoder.layer.0.intermediate.dense.weight", 2)[0],
            max_positions=self.of(f"{stack}embeddings.position_embeddings.weight", 2)[0],
            vision_width=vision_width,
        )


def _config(
    tensors: Mapping[str, Tensor],
    source: str,
    kinds: Collection[str],
    vision_heads: int | None,
    text_heads: int | None,
) -> MedConfig:
    """All sizes, as the tensors have them."""
    shapes = _Shapes(tensors, source)
    stack = "text_encoder." if "filter" in kinds else "text_decoder.bert."
    try:
        vision = shapes.vision(vision_heads)
        config = MedConfig(vision=vision, text=shapes.text(stack, vision.width, text_heads))
    except ValueError as error:
        raise CheckpointError(f"{source}: {_reason(error)}") from error
    sizes = {}
    if "filter" in kinds:
        sizes["projection_dim"] = shapes.of("vision_proj.weight", 2)[0]
    if _QUEUES[0] in tensors:
        sizes["queue_size"] = shapes.of(_QUEUES[0], 2)[1]
    return config.model_copy(update=sizes)


def _reason(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    field = "".join(f"{part}: " for part in first["loc"])
    return field + first["msg"].removeprefix("Value error, ")


def _heads(tower: str, width: int, given: int | None) -> int:
    if given is None and width % HEAD_WIDTH:
        raise ValueError(
            f"the {tower} tower is {width} wide, no multiple of {HEAD_WIDTH} as in the released "
            f"sizes, and no tensor tells its number of heads; give --{tower}-heads"
        )
    return width // HEAD_WIDTH if given is None else given


def _words(tokenizer: str, size: int, source: str) -> BertTokenizer:
    words = load_tokenizer(tokenizer)
    if len(words) != size:
        raise CheckpointError(
            f"{source}: the model has {size} tokens, tokenizer {tokenizer} {len(words)}; "
            "give --tokenizer, the one that it was trained with"
        )
    return words


def _state(
    tensors: Mapping[str, Tensor], source: str, config: MedConfig, kinds: Mapping[str, FolderKind]
) -> dict[str, Tensor]:
    """The tensors that ``kinds`` hold, under our names, every one there and of the right shape."""
    with shapes_only():
        whole = Med(config).state_dict()
    parts = {part for kind in kinds.values() for part in kind.parts}
    # A file out of which copies or queues were taken still is a MED to train on, from equal copies.
    copies = any(name.startswith("visual_encoder_m.") for name in tensors)
    trained = "med" in kinds and copies and all(name in tensors for name in _QUEUES)
    parts |= set(TRAINING if trained else ()) - {_IMAGE_IDS}
    ours = [name for name in whole if name.startswith(tuple(parts)) and name not in TIED_IN_HEAD]
    if "temp" not in tensors:
        ours = [name for name in ours if name != "temp"]
    theirs = tuple(map(original_name, parts))
    given = {name: tensor for name, tensor in tensors.items() if name.startswith(theirs)}
    check_tensors(source, given, {original_name(name): whole[name] for name in ours}, _FIT)
    state = {name: tensors[original_name(name)] for name in ours}
    if trained:
        state[_IMAGE_IDS] = torch.full((config.queue_size,), NO_IMAGE_ID)
    return state


def _apart(state: Mapping[str, Tensor]) -> str | None:
    """A tensor that encoder and decoder of a MED share, and these do not."""
    for name, twin in shared_names(state):
        if not torch.equal(state[name], state[twin]):
            return name
    return None


def _resized(vision: VisionConfig, image_size: int) -> VisionConfig:
    try:
        return VisionConfig.model_validate(vision.model_dump() | {"image_size": image_size})
    except ValidationError as error:
        raise CheckpointError(
            f"--image-size {image_size}: must be a multiple of the patch size {vision.patch_size}"
        ) from error


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``out`` when the block ends without an error."""
    scratch = out.with_name(f"{out.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
