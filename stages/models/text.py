"""Texts on their way into the model: caption cleaning, BLIP's tokenizer, and batches of ids."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stages.errors import CheckpointError

# Stages that only clean texts do not wait for torch.
if TYPE_CHECKING:
    from torch import Tensor
    from transformers import BertTokenizer

    from stages.models.config import TextConfig

DECODE_TOKEN = "[DEC]"
ENCODE_TOKEN = "[ENC]"
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

_DROPPED = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")


def clean_caption(text: str, max_words: int = 30) -> str:
    """``text`` as BLIP trains on it: lower case, without ``.!"()*#:;~``, ``max_words`` at most.

    Equal to ``pre_caption`` in data/utils.py of the original, for any string. Half a surrogate
    pair, which no UTF-8 file can hold, becomes a replacement character.
    """
    text = _SPACES.sub(" ", _DROPPED.sub(" ", text.lower())).rstrip("\n").strip(" ")
    words = text.split(" ", max_words)
    if len(words) > max_words:
        text = " ".join(words[:max_words])
    return encodable(text)


def encodable(text: str) -> str:
    """``text`` with a replacement character for each half of a surrogate pair, which tokenizers
    refuse."""
    return text.encode("utf-8", "replace").decode("utf-8") if not text.isascii() else text


def load_tokenizer(source: str | Path) -> BertTokenizer:
    """BLIP's tokenizer from a folder or a hub id, ``[DEC]`` and ``[ENC]`` added where missing.

    ``[DEC]`` is its ``bos_token`` (models/blip.py, ``init_tokenizer``). Raises `CheckpointError`
    where there is no BERT tokenizer.
    """
    from transformers import BertTokenizer

    needed = "need a BERT tokenizer (tokenizer.json or vocab.txt)"
    if Path(source).is_dir():
        if not any((Path(source) / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
            raise CheckpointError(f"{source}: no tokenizer.json and no vocab.txt; {needed}")
    elif Path(source).is_absolute():
        raise CheckpointError(f"{source}: no such folder; {needed}, or a hub id")
    try:
        tokenizer = BertTokenizer.from_pretrained(str(source))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{source}: {_first_line(error)}; {needed}") from error
    # transformers makes a BERT tokenizer of any vocabulary, or of the special tokens alone.
    words = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    if len(words) <= len(BERT_TOKENS) or not words.keys() >= set(BERT_TOKENS[:4]):
        raise CheckpointError(
            f"{source}: found a vocabulary of {len(words)} without {', '.join(BERT_TOKENS[:4])} "
            f"and words; {needed}"
        )
    return with_blip_tokens(tokenizer)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def with_blip_tokens(tokenizer: BertTokenizer) -> BertTokenizer:
    """Add ``[DEC]`` as bos token and ``[ENC]``, in this order, unless they are there."""
    if tokenizer.bos_token != DECODE_TOKEN:
        tokenizer.add_special_tokens({"bos_token": DECODE_TOKEN})
    if ENCODE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [ENCODE_TOKEN]})
    return tokenizer


def word_tokenizer(
    texts: Iterable[str], min_count: int = 2, max_words: int = 30_000
) -> BertTokenizer:
    """A tokenizer of whole words for a small world, where no BERT vocabulary is at hand.

    Keeps the ``max_words`` most frequent words that occur ``min_count`` times, ties in alphabetic
    order, so that the same texts give the same ids. Other words become ``[UNK]``.
    """
    from tokenizers import normalizers, pre_tokenizers
    from transformers import BertTokenizer

    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    counts = Counter(
        word
        for text in texts
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(encodable(text)))
    )
    frequent = sorted((-count, word) for word, count in counts.items() if count >= min_count)
    words = [*BERT_TOKENS, *(word for _, word in frequent[:max_words])]
    return with_blip_tokens(BertTokenizer(vocab={word: i for i, word in enumerate(words)}))


def fitted_to(config: TextConfig, tokenizer: BertTokenizer) -> TextConfig:
    """``config`` with the tokenizer's vocabulary size and special token ids."""
    vocabulary = tokenizer.get_vocab()
    return config.model_copy(
        update={
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "sep_token_id": tokenizer.sep_token_id,
            "cls_token_id": tokenizer.cls_token_id,
            "dec_token_id": vocabulary[DECODE_TOKEN],
            "enc_token_id": vocabulary[ENCODE_TOKEN],
        }
    )


def encode_texts(
    tokenizer: BertTokenizer, texts: Sequence[str], max_tokens: int
) -> tuple[Tensor, Tensor]:
    """Token ids and mask of ``texts``, both (N, L) int64, padded to the longest of them.

    L counts ``[CLS]`` and ``[SEP]`` and is at most ``max_tokens``. A text that spells out a
    special token, such as ``[SEP]``, gets ordinary tokens for it.
    """
    if not texts:
        import torch

        return torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.int64)
    batch = tokenizer(
        [encodable(text) for text in texts],
        padding="longest",
        truncation=True,
        max_length=max_tokens,
        return_token_type_ids=False,
        split_special_tokens=True,
        return_tensors="pt",
    )
    return batch["input_ids"], batch["attention_mask"]
