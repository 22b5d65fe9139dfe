"""Web texts, cleaned and measured."""

from __future__ import annotations

import os
import time
import unicodedata
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.texts import Language, clean_text, identify_language, score_text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a cat", "a cat"),
        ("  a\t\ncat\u00a0 \u3000here ", "a cat here"),
        ("Tom &amp; Jerry&#39;s", "Tom & Jerry's"),
        ("&lt;b&gt;bold&lt;/b&gt; text", "bold text"),
        ("a <b>red</b> dog<br/>runs", "a red dog runs"),
        ("<script>alert('x')</script>a cat<style>p {}</style>", "a cat"),
        ("<script>never closed", ""),
        ("a<!-- hidden -->b", "a b"),
        ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"),
        ("I <3 cats", "I <3 cats"),
        ("e\u0301te\u0301", "été"),
        ("bad\x00null\x1b[31mred", "bad null [31mred"),
        ("\u202eevil\u202c \ufeffx\u200by", "evil xy"),
        ("👨\u200d👩\u200d👧 family", "👨\u200d👩\u200d👧 family"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("half \ud83d", "half"),
        ("a&#" + "9" * 5_000 + ";b", "a\ufffdb"),
        ("a&#" + "9" * 4_000 + ";b", "a\ufffdb"),
        ("שלום 🐈", "שלום 🐈"),
        ("", ""),
    ],
)
def test_texts_are_cleaned(text: str, clean: str) -> None:
    assert clean_text(text) == clean


@given(st.text(max_size=200) | st.text("&ltgamp;#x<>/!-bscript \u202e\u0301", max_size=80))
def test_any_text_comes_out_clean(text: str) -> None:
    clean = clean_text(text)
    assert clean == " ".join(clean.split())
    assert unicodedata.is_normalized("NFC", clean)
    assert not any(unicodedata.category(c) in {"Cc", "Cs", "Co"} for c in clean)
    clean.encode()
    scores = score_text(clean)
    assert 0 <= scores.text_letters <= 1
    assert 0 <= scores.text_repetition < 1


def test_hostile_texts_cost_little() -> None:
    for text in ("<script>" * 100_000, "<" * 1_000_000, "&amp;" * 500_000, "<!--" * 300_000):
        assert len(clean_text(text)) <= 10_000


@pytest.mark.parametrize(
    "text",
    [
        *("(" * 10_000, "1" * 10_000, "-" * 10_000, "( " * 5_000, "_1" * 5_000, "\u0301" * 10_000),
        *("img" + "-" * 9_900 + "x", "loading" + "!" * 9_900 + "x", "http://" + "!" * 9_900 + " x"),
        *("click here " + "!" * 9_900 + "\nx", "no" + " " * 9_900 + "x", "©" * 9_900 + "x\ny"),
        *(
            "&#" + "9" * 9_900,
            "&" * 10_000,
            "</script " * 1_100,
            "<script" + " " * 9_900,
            "<!" * 5_000,
        ),
    ],
    ids=lambda text: text[:8],
)
def test_no_text_costs_quadratic_time(text: str) -> None:
    started = time.process_time()
    score_text(text)
    score_text(clean_text(text))
    assert time.process_time() - started < 0.5  # a quadratic pattern takes seconds


@pytest.mark.parametrize(
    ("text", "words", "letters", "repetition", "boilerplate"),
    [
        ("", 0, 0, 0, False),
        ("a red dog", 3, 1, 0, False),
        ("buy buy Buy now", 4, 1, 0.5, False),
        ("1234 5678", 2, 0, 0, False),
        ("ab12", 1, 0.5, 0, False),
        ("IMG_1234", 1, 3 / 8, 0, True),
        ("IMG_1234.JPG", 2, 6 / 12, 0, True),
        ("screenshot 12", 2, 10 / 12, 0, True),
        ("image not available", 3, 1, 0, True),
        ("((photo-1) 2.jpg)", 4, None, 0, True),
        ("().jpg", 1, None, 0, True),
        ("a red dog.jpg", 4, None, 0, False),
        ("loading...", 1, None, 0, True),
        ("- ©2020 someone", 2, None, 0, True),
        ("Photo of a dog", 4, 1, 0, False),
        ("click here to enlarge", 4, 1, 0, True),
        ("https://a.test/x", 4, None, 0, True),
        ("ילד משחק", 2, 1, 0, False),
    ],
)
def test_texts_are_measured(
    text: str, words: int, letters: float | None, repetition: float, boilerplate: bool
) -> None:
    scores = score_text(text)
    assert scores.text_words == words
    assert letters is None or scores.text_letters == pytest.approx(letters)
    assert scores.text_repetition == repetition
    assert scores.text_boilerplate == boilerplate


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("a dog runs on the beach", "en"),
        ("A DOG RUNS ON THE BEACH", "en"),
        ("ein Hund läuft am Strand entlang", "de"),
        ("un chien court sur la plage", "fr"),
        ("собака бежит по пляжу", "ru"),
        ("一只狗在沙滩上奔跑", "zh"),
        ("ילד משחק בכדור", "he"),
    ],
)
def test_languages_are_identified(text: str, language: str) -> None:
    found = identify_language(text)
    assert found.text_language == language
    assert found.text_language_score is not None
    assert 0.3 < found.text_language_score <= 1


@pytest.mark.parametrize("text", ["", "1234 5678", "!?", "🐈"])
def test_a_text_without_letters_has_no_language(text: str) -> None:
    assert identify_language(text) == Language(None, None)


@given(st.text(max_size=400))
def test_any_text_has_one_language_or_none(text: str) -> None:
    clean = clean_text(text)
    code, score = identify_language(clean)
    assert (code is None) == (score is None) == (not any(map(str.isalpha, clean)))
    assert score is None or 0 <= score <= 1
    assert identify_language(clean) == (code, score)


@pytest.mark.skipif("CAPFILT_TEST_DATA" not in os.environ, reason="CAPFILT_TEST_DATA is unset")
def test_real_alt_texts_stay_readable() -> None:
    path = Path(os.environ["CAPFILT_TEST_DATA"]) / "alt_text" / "img2dataset_test_1000.parquet"
    texts = pq.read_table(path)["TEXT"].to_pylist()
    cleaned = [clean_text(text or "") for text in texts]
    assert sum(bool(text) for text in cleaned) > 0.98 * len(texts)
    assert sum(score_text(text).text_boilerplate for text in cleaned) < 0.1 * len(texts)
    changed = [(a, b) for a, b in zip(texts, cleaned, strict=True) if a != b]
    assert len(changed) < 0.2 * len(texts)
    languages = [identify_language(text).text_language for text in cleaned]
    assert languages.count("en") > 0.8 * len(texts)  # the set is LAION's English part
