"""MED's towers from a ViT and a BERT of their own: how the paper's pretraining begins.

The image encoder starts from a ViT or DeiT, the text stack and the LM head from BERT; what neither
has (cross-attention, projections, the ITM head, ``[DEC]`` and ``[ENC]``) starts fresh (BLIP,
section 4.1; models/blip_pretrain.py). Folders are read by tensor name, as the hub has them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from stages.base import Config
from stages.errors import CheckpointError
from stages.models.blocks import LMHead, TextStack
from stages.models.checkpoints import resized_positions
from stages.models.config import TextConfig, VisionConfig
from stages.models.folders import ModelFolder, check_tensors, config_errors, one_line
from stages.models.med import Med
from stages.models.text import load_tokenizer
from stages.models.vision import VisionTransformer, shapes_only

if TYPE_CHECKING:
    from transformers import BertTokenizer

_ADVICE = "the weights do not fit config.json, give another folder or hub id"
_POSITIONS = "embeddings.position_embedding"
_WORDS = "embeddings.word_embeddings.weight"
_TEXT_POSITIONS = "embeddings.position_embeddings.weight"
_TOKEN_TYPES = "embeddings.token_type_embeddings.weight"
_NEW_TOKENS = 2  # [DEC] and [ENC]
_VIT_NAMES = (
    ("embeddings.class_embedding", "embeddings.cls_token"),
    (_POSITIONS, "embeddings.position_embeddings"),
    ("embeddings.patch_embedding.", "embeddings.patch_embeddings.projection."),
    ("post_layernorm.", "layernorm."),
    ("encoder.layers.", "encoder.layer."),
    (".layer_norm1.", ".layernorm_before."),
    (".layer_norm2.", ".layernorm_after."),
    (".self_attn.projection.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)


class TextStart(NamedTuple):
    """What BERT knows of MED's text side, by the names within `TextStack` and `LMHead`."""

    stack: dict[str, Tensor]
    """Without cross-attention; word embeddings as many as BERT has."""
    head: dict[str, Tensor]
    """``transform.*`` and ``bias``; empty where the folder has no LM head."""


def start_towers(
    med: Med,
    tokenizer: BertTokenizer,
    vision: str | Path | None = None,
    text: str | Path | None = None,
) -> None:
    """Load a ViT folder or hub id, and a BERT one, into a fresh ``med``, momentum copies too.

    Raises:
        CheckpointError: as `vision_start` and `text_start`.
    """
    config = med.config
    if vision is not None:
        med.vision_model.load_state_dict(vision_start(vision, config.vision))
    if text is not None:
        stack, head = text_start(text, config.text, tokenizer)
        predictions = med.text_decoder.cls.predictions
        with torch.no_grad():
            for ours, theirs in (
                (med.text_encoder.embeddings.word_embeddings.weight, stack.pop(_WORDS)),
                *([(predictions.bias, head.pop("bias"))] if head else []),
            ):
                ours[: len(theirs)] = theirs
        for bert in (med.text_encoder, med.text_decoder.bert):
            bert.load_state_dict(stack, strict=False)
        predictions.load_state_dict(head, strict=False)
    med.reset_momentum()


def vision_start(source: str | Path, config: VisionConfig) -> dict[str, Tensor]:
    """`VisionTransformer`'s state from a transformers ViT or DeiT, float32.

    Position embeddings are resized to ``config.image_size``; DeiT's distillation token goes.
    LayerNorm's epsilon stays ``config``'s.

    Raises:
        CheckpointError: no such model, or its sizes are not ``config``'s.
    """
    folder = _opened(source, ("vit", "deit"), "an image transformer")
    theirs = _config(folder)
    _require_sizes(
        folder,
        "vision",
        config,
        patch_size=theirs.patch_size,
        width=theirs.hidden_size,
        layers=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        mlp_width=theirs.intermediate_size,
    )
    tensors = _tensors(folder, "embeddings.cls_token", ("", "vit.", "deit."))
    with shapes_only():
        wanted = VisionTransformer(config).state_dict()
    found = {name: _of_vit(folder, tensors, name) for name in wanted}
    positions = found[_POSITIONS]
    if "embeddings.distillation_token" in tensors:
        positions = torch.cat([positions[:, :1], positions[:, 2:]], dim=1)
    if positions.dim() != 3 or math.isqrt(positions.shape[1] - 1) ** 2 != positions.shape[1] - 1:
        raise CheckpointError(
            f"{source}: position embeddings {tuple(positions.shape)} are of no square grid; need "
            "a ViT for square images"
        )
    found[_POSITIONS] = resized_positions(positions, 1 + config.patches)
    check_tensors(folder.source, found, wanted, _ADVICE)
    return found


def text_start(source: str | Path, config: TextConfig, tokenizer: BertTokenizer) -> TextStart:
    """What a transformers BERT (with or without its heads) gives to `TextStack` and `LMHead`.

    BERT adds the embedding of token type 0 to every position; MED has no types, so that it is
    part of the positions here, and the text encoder computes what BERT does. (The original drops
    it.) The LM head is taken where there is one.

    Raises:
        CheckpointError: no such model, its sizes are not ``config``'s, or ``tokenizer`` is not
            its own with ``[DEC]`` and ``[ENC]``.
    """
    folder = _opened(source, ("bert",), "a BERT")
    theirs = _config(folder)
    _require_sizes(
        folder,
        "text",
        config,
        width=theirs.hidden_size,
        layers=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        mlp_width=theirs.intermediate_size,
        max_positions=theirs.max_position_embeddings,
    )
    _require_tokenizer(folder, theirs.vocab_size, tokenizer)
    config = config.model_copy(update={"vocab_size": theirs.vocab_size})
    with shapes_only():
        stack = TextStack(config)
        head = LMHead(config, stack.embeddings.word_embeddings).state_dict()
    tensors = _tensors(folder, _WORDS, ("", "bert."))
    wanted = {n: t for n, t in stack.state_dict().items() if ".crossattention." not in n}
    found = {name: _taken(folder, tensors, name) for name in wanted}
    found[_TEXT_POSITIONS] = found[_TEXT_POSITIONS] + _taken(folder, tensors, _TOKEN_TYPES)[0]
    check_tensors(folder.source, found, wanted, _ADVICE)
    predictions = "cls.predictions."
    given = _renamed(folder.tensors(predictions))
    if not any(name.startswith("transform.") for name in given):
        return TextStart(found, {})
    head = {name: tensor for name, tensor in head.items() if not name.startswith("decoder.")}
    given = {name: tensor for name, tensor in given.items() if name in head}
    check_tensors(folder.source, given, head, _ADVICE, predictions)
    return TextStart(found, given)


def _opened(source: str | Path, kinds: tuple[str, ...], needed: str) -> ModelFolder:
    folder = ModelFolder.open(source)
    if folder.kind not in kinds:
        raise CheckpointError(
            f"{source}: found model_type '{folder.kind}', need {needed} (model_type "
            f"{' or '.join(map(repr, kinds))}); give its folder or hub id"
        )
    return folder


def _config(folder: ModelFolder) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder.path)
    except config_errors() as error:
        raise CheckpointError(f"{folder.source}: config.json: {one_line(error)}") from error
    if config.hidden_act != "gelu":
        raise CheckpointError(
            f"{folder.source}: hidden_act '{config.hidden_act}', only 'gelu' is known; "
            "give another folder or hub id"
        )
    return config


def _require_sizes(folder: ModelFolder, tower: str, config: Config, **sizes: object) -> None:
    """Refuse a folder whose sizes are not the config's, which no tensor may overrule."""
    apart = [
        f"{name} {size}, model.{tower}.{name} is {getattr(config, name)}"
        for name, size in sizes.items()
        if size != getattr(config, name)
    ]
    if apart:
        raise CheckpointError(
            f"{folder.source}: does not fit: {'; '.join(apart)}; set model.{tower} to the "
            "folder's sizes or give another folder"
        )


def _require_tokenizer(folder: ModelFolder, size: int, tokenizer: BertTokenizer) -> None:
    added = len(tokenizer) - size
    own = (folder.path / "vocab.txt").is_file() or (folder.path / "tokenizer.json").is_file()
    if not 0 <= added <= _NEW_TOKENS or (
        own and load_tokenizer(folder.path).get_vocab() != tokenizer.get_vocab()
    ):
        raise CheckpointError(
            f"{folder.source}: was trained on other words ({size}) than the tokenizer has "
            f"({len(tokenizer)} with [DEC] and [ENC]); set tokenizer to this model's own"
        )


def _tensors(folder: ModelFolder, landmark: str, prefixes: tuple[str, ...]) -> Mapping[str, Tensor]:
    """The tower's tensors by the names that they have without a head on it."""
    for prefix in prefixes:
        if prefix + landmark in folder.names:
            return _renamed(folder.tensors(prefix))
    raise CheckpointError(f"{folder.source}: no tensor {landmark}; {_ADVICE}")


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32, under today's names: the oldest files, bert-base-uncased's among them, have
    ``gamma`` and ``beta``."""
    return {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        ): tensor.float()
        for name, tensor in tensors.items()
    }


def _of_vit(folder: ModelFolder, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """`VisionTransformer`'s tensor ``name`` out of a ViT's."""
    for ours, theirs in _VIT_NAMES:
        name = name.replace(ours, theirs, 1)
    if ".self_attn.qkv." not in name:
        return _taken(folder, tensors, name)
    # One matrix of ours is three of theirs.
    parts = (f".attention.attention.{part}." for part in ("query", "key", "value"))
    names = [name.replace(".self_attn.qkv.", part) for part in parts]
    return torch.cat([_taken(folder, tensors, part) for part in names])


def _taken(folder: ModelFolder, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{folder.source}: no tensor {name}; {_ADVICE}")
    return tensors[name]
