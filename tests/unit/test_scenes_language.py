"""What is true of a scene, and what is not."""

from __future__ import annotations

import random
import re

import pytest

from stages.scenes.config import SceneConfig
from stages.scenes.language import (
    SYNONYMS,
    WORDS,
    brief_captions,
    captions,
    full_captions,
    is_true,
    near_miss,
    near_misses,
)
from stages.scenes.scene import Scene, Scenes, Thing
from stages.scenes.texts import HOSTILE, file_name, hostile, spam

SCENES = [Scenes(SceneConfig(two_shapes=0.4), 11)[i] for i in range(150)]
ONE = Scene((Thing("red", "circle", "top left"),), "white")
BESIDE = Scene((Thing("red", "circle", "left"), Thing("blue", "square", "right")), "navy")
STACKED = Scene((Thing("orange", "ring", "top"), Thing("orange", "star", "bottom")), "gray")


def test_every_caption_is_true_short_and_in_the_vocabulary() -> None:
    for scene in SCENES:
        texts = captions(scene)
        assert len(set(texts)) == len(texts) == 7
        for text in texts:
            assert is_true(scene, text), (scene, text)
            assert len(text.split()) <= 14
            assert set(text.split()) <= set(WORDS)
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text)


def test_full_captions_are_true_of_no_other_scene_with_as_many_shapes() -> None:
    for scene in SCENES:
        alike = [other for other in SCENES if len(other.things) == len(scene.things)]
        for text in full_captions(scene):
            assert [other for other in alike if is_true(other, text)] == [scene]


def test_a_caption_of_two_shapes_is_never_true_of_one() -> None:
    ones = [scene for scene in SCENES if scene.relation is None]
    texts = [text for scene in SCENES if scene.relation for text in captions(scene)]
    assert not any(is_true(scene, text) for scene in ones for text in texts)


def test_brief_captions_are_true_of_some_other_scene() -> None:
    other = Scene((Thing("red", "circle", "bottom"),), "white")
    assert any(is_true(other, text) for text in brief_captions(ONE))


def test_every_other_word_makes_a_caption_wrong() -> None:
    for scene in SCENES:
        for text in full_captions(scene):
            words = text.split()
            for at, word in enumerate(words):
                for group in SYNONYMS:
                    for other in group if word in group else ():
                        changed = " ".join([*words[:at], other, *words[at + 1 :]])
                        assert is_true(scene, changed) == (other == word), (scene, changed)


def test_near_misses_differ_in_one_word_besides_articles() -> None:
    rng = random.Random(0)
    for scene in SCENES:
        for text in captions(scene):
            missed = near_miss(scene, text, rng)
            assert not is_true(scene, missed)
            pairs = zip(text.split(), missed.split(), strict=True)
            assert sum(a != b for a, b in pairs if a not in ("a", "an")) == 1


def test_near_misses_are_well_formed() -> None:
    text = "a red circle at the top left on a white background"
    assert near_misses(ONE, text, 0) == []
    assert near_misses(ONE, text, 5) == ["a red circle at the bottom left on a white background"]
    assert near_misses(ONE, text, 6) == ["a red circle at the top right on a white background"]
    assert "an orange circle at the top left on a white background" in near_misses(ONE, text, 1)


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (ONE, "A red circle, at the Top-Left; on a white background."),
        (ONE, "red circle"),
        (ONE, "red circle white"),
        (ONE, "a picture of a red circle in the upper left corner of a white picture"),
        (ONE, "a a red circle at the the top left"),
        (ONE, "white background and a red circle"),
        (BESIDE, "a blue square to the right of the red circle"),
        (BESIDE, "a red circle at the left and a blue square at the right on navy"),
        (BESIDE, "at the right a blue square and at the left there is a red circle"),
        (BESIDE, "a red circle at the left side of the picture"),
        (BESIDE, "a circle left of a blue square"),
        (STACKED, "an orange star under an orange ring"),
    ],
)
def test_loose_wordings_are_read(scene: Scene, text: str) -> None:
    assert is_true(scene, text)


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        (ONE, "a circle at the top left on a white background"),
        (ONE, "a red shape"),
        (ONE, "red"),
        (ONE, "a red circle at the top"),
        (ONE, "a red circle on a red background"),
        (ONE, "a white circle on a red background"),
        (ONE, "a red circle and a red circle"),
        (ONE, "a red circle and a circle"),
        (ONE, "a red circle left of a red circle"),
        (ONE, "a red circle red circle at the top left"),
        (ONE, "a red circle on a white background on a black background"),
        (ONE, "a red circle at the top left at the bottom right"),
        (ONE, "a red circle at the top left or at the bottom right"),
        (ONE, "not a red circle"),
        (ONE, "a red circle at the top left left"),
        (ONE, "a red red circle"),
        (ONE, "a red blue circle"),
        (ONE, "a red circle " + "on a white background " * 20),
        (ONE, "a red circle" + " " * 1000),
        (BESIDE, "a white circle and a blue square"),
        (BESIDE, "a navy circle and a blue square"),
        (BESIDE, "a blue square left of a red circle"),
        (BESIDE, "a red circle above a blue square"),
        (BESIDE, "a red square left of a blue circle"),
        (BESIDE, "a red circle and a red circle"),
        (BESIDE, "a red circle at the right"),
        (BESIDE, "a red circle left of a blue square left of a red circle"),
        (BESIDE, "at the left a blue square and at the right a red circle"),
        (STACKED, "an orange ring and an orange ring"),
        (STACKED, "an orange ring on top of an orange star"),
        (STACKED, "an orange star above an orange ring"),
    ],
)
def test_false_unreadable_and_contradicting_texts_get_no_credit(scene: Scene, text: str) -> None:
    assert not is_true(scene, text)


def test_spam_file_names_and_hostile_texts_are_wrong() -> None:
    rng = random.Random(1)
    texts = [*HOSTILE, hostile(0), *(spam(rng) for _ in range(50))]
    texts += [file_name(rng) for _ in range(50)]
    assert not any(is_true(scene, text) for scene in SCENES for text in texts)


def test_any_soup_of_words_has_an_answer() -> None:
    rng = random.Random(2)
    for _ in range(5000):
        text = " ".join(rng.choices(WORDS, k=rng.randrange(30)))
        assert is_true(ONE, text) in (True, False)
