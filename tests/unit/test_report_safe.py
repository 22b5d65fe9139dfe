from __future__ import annotations

import time

import pytest

from pipeline.report.safe import MASK, masked, masked_tree, plain


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u202ecat\u202c", "acat"),
        ("\u2066\u2067a\u2068\u2069 \u200e\u200f\u061cb", "a b"),
        ("a\x1b[31mcat\x00\x9f", "a�[31mcat��"),
        ("two\r\n\tlines\u2028and\u00a0more", "two lines and more"),
        ("\ud800", "�"),
        ("soft\u00ad\ufeff\U000e0061", "soft"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("مرحبا بالعالم", "مرحبا بالعالم"),
    ],
)
def test_what_is_left_of_a_text(text: str, shown: str) -> None:
    assert plain(text) == shown


def test_a_long_text_is_cut() -> None:
    assert plain("x" * 300, 10) == "x" * 9 + "…"
    assert plain("a b " * 100, 10) == "a b a b a…"
    assert plain("x" * 10, 10) == "x" * 10
    # Nothing but characters that go: it was longer all the same.
    assert plain("\u202e" * 10_000 + "cat", 10) == "…"


def test_a_text_of_megabytes_costs_no_more_than_a_short_one() -> None:
    text = "\u202ex" * 20_000_000
    started = time.perf_counter()
    assert len(plain(text)) <= 280
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize(
    ("text", "secret", "left"),
    [
        ("s3://user:hunter2@bucket/run", "hunter2", f"s3://{MASK}@bucket/run"),
        ("https://me:p/a@ss@host/x.parquet", "p/a", f"https://{MASK}@host/x.parquet"),
        ("https://tok3n@host/x", "tok3n", f"https://{MASK}@host/x"),
        ("https://h/x?width=3&X-Amz-Signature=abc1&y=2", "abc1", "&y=2"),
        ("https://h/x?sig=abc2%3D&sv=2020", "abc2", "&sv=2020"),
        ("https://h/x?access_token=abc3#top", "abc3", "#top"),
        ("AccountName=me;AccountKey=abc4==;Protocol=https", "abc4", ";Protocol=https"),
        ("host=db password=abc5 user=me", "abc5", "user=me"),
        ("Authorization: Bearer abcdefgh12345", "abcdefgh12345", "Bearer"),
        ("model of hf_abcdefghijklmnopqrstuv", "hf_abcdefghij", "model of"),
        ("AKIAABCDEFGHIJKLMNOP", "AKIAABCDEFGHIJKLMNOP", MASK),
    ],
)
def test_secrets_in_a_text(text: str, secret: str, left: str) -> None:
    hidden = masked(text)
    assert secret not in hidden and MASK in hidden and left in hidden


@pytest.mark.parametrize(
    "text",
    [
        "/data/world/tokenizer",
        "s3://bucket/run/web.parquet",
        "https://host:8080/a/b.parquet?rows=3",
        "{world}/web.parquet",
        "a picture of ",
        "Salesforce/blip-itm-base-coco",
        "me@example.org",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert masked(text) == text


def test_secrets_by_the_name_of_their_field() -> None:
    config = {
        "storage": {
            "secretKey": "s1",
            "api_key": "s2",
            "Password": "s3",
            "AWS_SESSION_TOKEN": "s4",
        },
        "sources": [{"path": "s3://a:s5@b/c", "headers": ["authorization: Basic czY6czY6"]}],
        "tokens": {"max_tokens": 20, "tokenizer": "/some/tokenizer", "token": ""},
        "model": None,
        "https://u:s7@host": True,
    }
    found = masked_tree(config)
    assert not any(f"s{number}" in str(found) for number in (1, 2, 4, 5, 7))
    assert "czY6" not in str(found) and found["storage"]["Password"] == MASK
    assert found["tokens"] == {"max_tokens": 20, "tokenizer": "/some/tokenizer", "token": ""}
    assert found["model"] is None
