"""The world's language: captions in several wordings, and whether a text is true of a scene.

`is_true` reads more than `captions` writes: articles and filling words may be missing or doubled,
claims may come in another order, attributes may be left out. It never guesses: a word that it does
not know, or an order that it cannot read, makes a text wrong.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

from stages.scenes.scene import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing

MAX_WORDS = 24
MAX_CHARACTERS = 400
"""Longer texts are wrong: no honest caption of so small a world needs more."""

_ARTICLES = frozenset(("a", "an", "the"))
_FILLING = frozenset(
    (*_ARTICLES, "of", "to", "in", "on", "at", "with", "is", "there", "it", "its", "side")
).union(("corner", "background", "image", "picture", "photo", "showing"))
_VERTICAL = {"top": "top", "upper": "top", "bottom": "bottom", "lower": "bottom"}
_HORIZONTAL = {"left": "left", "right": "right"}
_CENTER = {"center": "center", "centre": "center", "middle": "center"}
_PLACE_WORDS = _VERTICAL | _HORIZONTAL | _CENTER
_RELATIONS = {"above": "above", "over": "above", "below": "below", "under": "below"}

WORDS = tuple(
    sorted(
        {*COLOURS, *SHAPES, *BACKGROUNDS, *_FILLING, *_PLACE_WORDS, *_RELATIONS, "and"},
    )
)
"""Every word that `is_true` can read."""

SYNONYMS: tuple[tuple[str, ...], ...] = (
    COLOURS,
    SHAPES,
    BACKGROUNDS,
    ("center", "left", "right", "top", "bottom"),
    ("above", "below"),
)
"""Words that can stand in one another's place and say something else."""


def captions(scene: Scene) -> list[str]:
    """True captions in several wordings, at most 14 words each: those in full come first."""
    return full_captions(scene) + brief_captions(scene)


def full_captions(scene: Scene) -> list[str]:
    """Four wordings, each of which says everything: of the scenes with as many shapes, they are
    true of this one only."""
    back = scene.background
    if scene.relation is None:
        (thing,) = scene.things
        look, place = f"{thing.colour} {thing.shape}", thing.place
        return [
            _articles(text)
            for text in (
                f"a {look} at the {place} on a {back} background",
                f"a {look} on {back} at the {place}",
                f"{back} background with a {look} at the {place}",
                f"at the {place} there is a {look} on {back}",
            )
        ]
    first, second = (f"{thing.colour} {thing.shape}" for thing in scene.things)
    one, other = ("left of", "right of") if scene.relation == "left of" else ("above", "below")
    return [
        _articles(text)
        for text in (
            f"a {first} {one} a {second} on a {back} background",
            f"a {second} {other} a {first} on {back}",
            f"{back} background with a {first} {one} a {second}",
            f"there is a {second} {other} a {first} on {back}",
        )
    ]


def brief_captions(scene: Scene) -> list[str]:
    """Wordings that leave out the place or the background."""
    back = scene.background
    looks = [f"{thing.colour} {thing.shape}" for thing in scene.things]
    if scene.relation is None:
        texts = [
            f"a {looks[0]} on a {back} background",
            f"a {looks[0]} at the {scene.things[0].place}",
            f"{looks[0]} on {back}",
        ]
    else:
        texts = [
            f"a {looks[0]} and a {looks[1]} on a {back} background",
            f"a {looks[0]} {scene.relation} a {looks[1]}",
            f"{looks[1]} and {looks[0]} on {back}",
        ]
    return [_articles(text) for text in texts]


def _articles(text: str) -> str:
    """``text`` with "an" before a vowel and "a" elsewhere."""
    return re.sub(r"\ban? (?=(\w))", lambda m: "an " if m[1] in "aeiou" else "a ", text)


def near_miss(scene: Scene, caption: str, rng: random.Random) -> str:
    """A well-formed text that is not true of ``scene`` and differs from ``caption`` in one word,
    and in an article where the sound asks for it. Each word that can be changed is as likely.

    ``caption`` is one of ``captions(scene)``.
    """
    positions = list(range(len(caption.split())))
    rng.shuffle(positions)
    return next(rng.choice(wrong) for at in positions if (wrong := near_misses(scene, caption, at)))


def near_misses(scene: Scene, caption: str, at: int) -> list[str]:
    """Every text that `near_miss` draws from when it changes the word number ``at``."""
    words = caption.split()
    changed = (
        _articles(" ".join([*words[:at], other, *words[at + 1 :]]))
        for group in SYNONYMS
        if words[at] in group
        for other in group
        if other != words[at]
    )
    form = _form(caption)
    return [text for text in changed if _form(text) == form and not is_true(scene, text)]


@lru_cache(maxsize=1 << 16)
def _form(text: str) -> str:
    """The kinds of claims that a caption makes, in their order."""
    return _code(_tokens(text.split()) or ())


@dataclass(frozen=True)
class _Named:
    """A shape that a text names, with what is said of it."""

    colour: str | None
    shape: str
    places: frozenset[str]

    def fits(self, thing: Thing) -> bool:
        return (
            self.shape == thing.shape
            and self.colour in (None, thing.colour)
            and self.places <= {thing.place}
        )


@dataclass(frozen=True)
class _Claims:
    """All that a text says."""

    named: tuple[_Named, ...]
    relation: str | None
    """left of, right of, above or below, of the first named to the second; None if not said."""
    backgrounds: frozenset[str]


def is_true(scene: Scene, text: str) -> bool:
    """Whether ``text`` is a right caption of ``scene``.

    It must be readable to the last word, name the shape and the colour of at least one thing, and
    every claim in it must hold. A text that names two shapes claims that there are two. Total: any
    string has an answer.
    """
    claims = _parse(_clean(text)) if len(text) <= MAX_CHARACTERS else None
    if claims is None or not claims.backgrounds <= {scene.background}:
        return False
    return any(
        all(named.fits(thing) for named, thing in zip(claims.named, things, strict=True))
        and _relation_holds(claims.relation, things)
        for things in permutations(scene.things, len(claims.named))
    )


def _relation_holds(relation: str | None, things: Sequence[Thing]) -> bool:
    if relation is None:
        return True
    holding = {
        ("left", "right"): "left of",
        ("right", "left"): "right of",
        ("top", "bottom"): "above",
        ("bottom", "top"): "below",
    }
    return holding[things[0].place, things[1].place] == relation


def _clean(text: str) -> str:
    """Lower case, punctuation to spaces, spaces collapsed."""
    return " ".join(re.sub(r"[.,!?\"'()*#:;~\-]", " ", text.lower()).split())


# One letter a claim: O shape with colour, S shape alone, P place, B background, R relation, + and.
_SENTENCE = re.compile(r"[BP]*\+?[OS](?:\+?[PB])*(?:[R+]P*[OS](?:\+?[PB])*)?")

_Token = tuple[str, str]


@lru_cache(maxsize=1 << 16)
def _parse(text: str) -> _Claims | None:
    """What the cleaned ``text`` says, or None where it cannot be read."""
    words = text.split()
    tokens = _tokens(words) if len(words) <= MAX_WORDS else None
    code = _code(tokens or ())
    if tokens is None or "O" not in code or not _SENTENCE.fullmatch(code):
        return None
    return _claims(tokens)


def _code(tokens: Sequence[_Token]) -> str:
    return "".join(kind for kind, _ in tokens)


def _claims(tokens: Sequence[_Token]) -> _Claims:
    """Places belong to the shape before them in their clause, or to the first one that follows."""
    named: list[_Named] = []
    pending: set[str] = set()
    relation = None
    clause_open = False
    for position, (kind, value) in enumerate(tokens):
        if kind in "OS":
            colour, _, shape = value.rpartition(" ")
            named.append(_Named(colour or None, shape, frozenset(pending)))
            pending, clause_open = set(), True
        elif kind == "P" and clause_open:
            last = named.pop()
            named.append(_Named(last.colour, last.shape, last.places | {value}))
        elif kind == "P":
            pending.add(value)
        elif kind == "R":
            relation, clause_open = value, False
        elif kind == "+" and _shape_follows(tokens[position + 1 :]):
            clause_open = False
    backgrounds = frozenset(value for kind, value in tokens if kind == "B")
    return _Claims(tuple(named), relation, backgrounds)


def _shape_follows(tokens: Sequence[_Token]) -> bool:
    return any(kind in "OS" for kind, _ in tokens)


def _tokens(words: Sequence[str]) -> list[_Token] | None:
    """The claims of a text in their order; None where a word is not known or hangs loose."""
    tokens: list[_Token] = []
    position = 0
    while position < len(words):
        for reader in _READERS:
            read = reader(words, position)
            if read is not None:
                token, length = read
                break
        else:
            return None
        if token is not None:
            tokens.append(token)
        position += length
    return tokens


_Read = tuple[_Token | None, int] | None


def _read_filling(words: Sequence[str], at: int) -> _Read:
    return (None, 1) if words[at] in _FILLING else None


def _read_shape(words: Sequence[str], at: int) -> _Read:
    if words[at] in SHAPES:
        return ("S", words[at]), 1
    if words[at] in COLOURS and at + 1 < len(words) and words[at + 1] in SHAPES:
        return ("O", f"{words[at]} {words[at + 1]}"), 2
    return None


def _read_background(words: Sequence[str], at: int) -> _Read:
    # "a white circle" speaks of a shape's colour, and no shape is white.
    of_shape = at + 1 < len(words) and words[at + 1] in SHAPES
    return (("B", words[at]), 1) if words[at] in BACKGROUNDS and not of_shape else None


def _read_relation(words: Sequence[str], at: int) -> _Read:
    if words[at] in _RELATIONS:
        return ("R", _RELATIONS[words[at]]), 1
    if words[at] not in _HORIZONTAL or words[at + 1 : at + 2] != ["of"]:
        return None
    # "left of the picture" is a place, "left of the red circle" a relation.
    rest = [word for word in words[at + 2 :] if word not in _ARTICLES]
    if rest and (rest[0] in COLOURS or rest[0] in SHAPES):
        return ("R", f"{words[at]} of"), 2
    return None


def _read_place(words: Sequence[str], at: int) -> _Read:
    pair = [_PLACE_WORDS.get(word) for word in words[at : at + 2]]
    if len(pair) == 2 and pair[0] in ("top", "bottom") and pair[1] in ("left", "right"):
        return ("P", f"{pair[0]} {pair[1]}"), 2
    return (("P", pair[0]), 1) if pair[0] is not None else None


def _read_and(words: Sequence[str], at: int) -> _Read:
    return (("+", "and"), 1) if words[at] == "and" else None


_READERS: tuple[Callable[[Sequence[str], int], _Read], ...] = (
    _read_shape,
    _read_background,
    _read_relation,
    _read_place,
    _read_and,
    _read_filling,
)
