"""Spam and file names vary; hostile texts are what they claim to be."""

from __future__ import annotations

import random
import re

from stages.scenes.texts import HOSTILE, LONG_TEXT_WORDS, file_name, hostile, spam, words


def test_spam_and_file_names_vary_and_their_words_are_known() -> None:
    rng = random.Random(0)
    slogans = {spam(rng) for _ in range(300)}
    names = {file_name(rng) for _ in range(300)}
    assert len(slogans) > 100
    assert len(names) > 290
    assert all(re.fullmatch(r"[a-z]+[-_ ]\d{4}\.(jpg|jpeg|png|gif)", name) for name in names)
    assert {w for text in slogans | names for w in re.findall("[a-z]+", text)} <= set(words())


def test_hostile_texts_begin_with_the_long_one_and_go_round() -> None:
    assert len(hostile(0).split()) == LONG_TEXT_WORDS
    assert [hostile(i) for i in range(1, len(HOSTILE) + 1)] == list(HOSTILE)
    assert hostile(len(HOSTILE) + 1) == hostile(0)


def test_hostile_texts_hold_what_breaks_programs() -> None:
    assert "" in HOSTILE
    assert any("<script>" in text for text in HOSTILE)
    assert any("\u202e" in text for text in HOSTILE)
    assert any("🔴" in text for text in HOSTILE)
    for text in HOSTILE:
        assert text.encode("utf-8").decode("utf-8") == text
