"""Cleaning and tokenizing; equality with BLIP's own cleaning is in test_reference.py."""

import json
import time
from pathlib import Path

import pytest
from transformers import BertTokenizer

from stages.errors import CheckpointError
from stages.models.config import TextConfig
from stages.models.text import (
    BERT_TOKENS,
    clean_caption,
    encode_texts,
    fitted_to,
    load_tokenizer,
    with_blip_tokens,
    word_tokenizer,
)

WORDS = ("a", "picture", "of", "red", "dog", "##s", "cat")


def vocabulary_folder(folder: Path) -> Path:
    (folder / "vocab.txt").write_text("\n".join([*BERT_TOKENS, *WORDS]) + "\n")
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path) -> BertTokenizer:
    return load_tokenizer(vocabulary_folder(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\x00\x01\x1b[31m\x7f",
        "\u202eright to left\u202c שלום العربية",
        "🐈‍⬛ 👩🏽‍🚀 \U0010ffff",
        "half a pair: \ud83d",
        "<script>alert('x')</script>",
        "\n\r\t\v\f\u2028\u3000" * 50,
        "İ" * 100,
    ],
)
def test_any_string_is_cleaned_tokenized_and_stored(text: str, tokenizer: BertTokenizer) -> None:
    cleaned = clean_caption(text)
    assert cleaned.encode("utf-8").decode("utf-8") == cleaned
    for given in (text, cleaned):
        ids, mask = encode_texts(tokenizer, [given], 30)
        assert 2 <= ids.shape[1] <= 30
        assert mask.all()


def test_huge_texts_are_cut_quickly(tokenizer: BertTokenizer) -> None:
    start = time.perf_counter()
    cleaned = clean_caption("Dog, " * 10_000)
    assert cleaned == " ".join(["dog,"] * 30)
    for text in ("word " * 10_000, "w" * 100_000, "\t".join("word" for _ in range(10_000))):
        ids, _ = encode_texts(tokenizer, [clean_caption(text)], 30)
        assert ids.shape[1] <= 30
    assert time.perf_counter() - start < 5


def test_dec_and_enc_are_added_once(tmp_path: Path, tokenizer: BertTokenizer) -> None:
    size = len(BERT_TOKENS) + len(WORDS)
    assert tokenizer.bos_token_id == size
    assert tokenizer.convert_tokens_to_ids("[ENC]") == size + 1
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(with_blip_tokens(again)) == size + 2


def test_bert_tokens_are_found_by_name(tokenizer: BertTokenizer) -> None:
    fitted = fitted_to(TextConfig(), tokenizer)
    ids = (fitted.pad_token_id, fitted.cls_token_id, fitted.sep_token_id)
    assert ids == (0, 2, 3)
    assert (fitted.dec_token_id, fitted.enc_token_id, fitted.vocab_size) == (12, 13, 14)


def test_texts_are_padded_to_the_longest_and_cut(tokenizer: BertTokenizer) -> None:
    ids, mask = encode_texts(tokenizer, ["a red dog", "dogs", ""], 30)
    assert ids.tolist() == [[2, 5, 8, 9, 3], [2, 9, 10, 3, 0], [2, 3, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]
    cut, _ = encode_texts(tokenizer, ["a red dog a red dog"], 4)
    assert cut.tolist() == [[2, 5, 8, 3]]
    assert encode_texts(tokenizer, [], 30)[0].shape[0] == 0


def test_special_tokens_cannot_be_written_into_a_text(tokenizer: BertTokenizer) -> None:
    special = {0, 2, 3, 12, 13}
    ids, _ = encode_texts(tokenizer, ["a [SEP] dog [ENC] [PAD] [DEC] [CLS] cat"], 30)
    assert not special & set(ids[0, 1:-1].tolist())


def test_word_tokenizer_is_a_function_of_the_texts(tmp_path: Path) -> None:
    texts = ["A red dog.", "a blue dog!", "a DOG and a zebra", "red \ud83d"]
    tokenizer = word_tokenizer(texts)
    # By count, then alphabet: a 4, dog 3, red 2; words that occur once are unknown.
    assert tokenizer.convert_ids_to_tokens([5, 6, 7]) == ["a", "dog", "red"]
    assert len(tokenizer) == 5 + 3 + 2
    assert word_tokenizer(reversed(texts)).get_vocab() == tokenizer.get_vocab()
    ids, _ = encode_texts(tokenizer, ["A red zebra"], 30)
    assert ids.tolist() == [[2, 5, 7, 1, 3]]
    assert len(word_tokenizer(texts, min_count=1, max_words=4)) == 5 + 4 + 2
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()


def one_line(error: pytest.ExceptionInfo[CheckpointError], folder: Path) -> str:
    message = str(error.value)
    assert str(folder) in message
    assert "need a BERT tokenizer" in message
    assert "\n" not in message
    return message


def test_folder_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(tmp_path)
    assert "no tokenizer.json and no vocab.txt" in one_line(error, tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(tmp_path / "nothing")
    assert "no such folder" in one_line(error, tmp_path / "nothing")


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    bpe = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    bpe.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(tmp_path)
    one_line(error, tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(tmp_path)
    one_line(error, tmp_path)


def test_hub_is_not_reached_offline() -> None:
    with pytest.raises(CheckpointError) as error:
        load_tokenizer("nobody/no-such-model")
    one_line(error, Path("nobody/no-such-model"))
