"""Small random models in transformers' own folder format, for tests without big weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
)

from stages.models.text import with_blip_tokens

WORDS = """
    a an the picture of red blue green dark bright big small cat dog house tree car boat two on
    in under near with and man woman child street field sky water s t is sits stands runs x ##ing
    ##ed ##s ##er ##ly walk play jump photo sea hill road bird horse , - ' 1 2 3
"""


def tokenizer() -> BertTokenizer:
    """A WordPiece tokenizer of some sixty pieces, [DEC] and [ENC] added."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split()]
    return with_blip_tokens(BertTokenizer(vocab={name: i for i, name in enumerate(names)}))


def blip_config(image_size: int = 32) -> BlipConfig:
    ids = tokenizer()
    return BlipConfig(
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": image_size,
            "patch_size": 8,
            "initializer_range": 0.2,
        },
        text_config={
            "vocab_size": len(ids),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 40,
            "initializer_range": 0.2,
            "bos_token_id": ids.bos_token_id,
            "sep_token_id": ids.sep_token_id,
            "pad_token_id": ids.pad_token_id,
        },
        image_text_hidden_size=24,
        initializer_range=0.2,
    )


def save_blip(model: torch.nn.Module, folder: Path) -> Path:
    """``model`` with its tokenizer and image processor, as ``save_pretrained`` writes them."""
    size = model.config.vision_config.image_size
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    BlipImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)
    return folder


def captioner_model(seed: int = 0) -> BlipForConditionalGeneration:
    torch.manual_seed(seed)
    return _stirred(BlipForConditionalGeneration(blip_config())).eval()


def matcher_model(seed: int = 0) -> BlipForImageTextRetrieval:
    torch.manual_seed(seed)
    return _stirred(BlipForImageTextRetrieval(blip_config())).eval()


def _stirred(model: torch.nn.Module) -> torch.nn.Module:
    """Biases and norms are random too: zeros and ones would hide a swapped or forgotten one."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def clip_tokenizer() -> CLIPTokenizer:
    """A byte pair tokenizer of letters and digits, and one merge."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,!"
    names = ["<|startoftext|>", *letters, *(f"{letter}</w>" for letter in letters), "ca"]
    vocab = {name: i for i, name in enumerate([*names, "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[("c", "a")])


def clip_model(seed: int = 0) -> CLIPModel:
    torch.manual_seed(seed)
    ids = clip_tokenizer()
    config = CLIPConfig(
        text_config={
            "vocab_size": len(ids),
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 16,
            "bos_token_id": ids.bos_token_id,
            "eos_token_id": ids.eos_token_id,
            "pad_token_id": ids.pad_token_id,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
        },
        projection_dim=24,
        initializer_factor=5.0,
    )
    return _stirred(CLIPModel(config)).eval()


def save_clip(model: CLIPModel, folder: Path) -> Path:
    """``model`` with its tokenizer and image processor, as ``save_pretrained`` writes them."""
    size = model.config.vision_config.image_size
    model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    ).save_pretrained(folder)
    return folder
