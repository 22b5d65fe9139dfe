"""One-word exchanges that make a caption wrong."""

import numpy as np

from stages.training.swaps import WordSwaps

WORDS = "[PAD] [CLS] [SEP] a red blue green circle square on the left right disc ##s cir".split()  # noqa: SIM905
SPECIAL = frozenset((0, 1, 2))
INNER = frozenset((WORDS.index("##s"),))


def ids(text: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array([1, *(WORDS.index(word) for word in text.split()), 2], dtype=np.int64)


def text(tokens: np.ndarray[tuple[int], np.dtype[np.int64]]) -> str:
    return " ".join(WORDS[i] for i in tokens if i not in SPECIAL)


def swapped(captions: list[str], images: list[int], caption: str, draws: int = 100) -> set[str]:
    swaps = WordSwaps([ids(c) for c in captions], images, SPECIAL, INNER)
    found = set()
    for seed in range(draws):
        result = swaps.swapped(ids(caption), np.random.Generator(np.random.Philox(key=seed)))
        if result is not None:
            found.add(text(result))
    return found


def test_a_word_gives_way_to_others_seen_in_its_place() -> None:
    captions = ["a red circle on the left", "a blue circle on the right", "a green square"]
    assert swapped(captions, [0, 1, 2], "a red circle on the left") == {
        "a blue circle on the left",
        "a red circle on the right",
    }


def test_nothing_is_made_up() -> None:
    assert swapped(["a red circle", "the blue square"], [0, 1], "a red circle") == set()
    assert swapped(["a red circle"], [0], "") == set()


def test_words_that_mean_the_same_are_not_exchanged() -> None:
    captions = ["a red circle", "a red disc", "a red square", "a blue circle"]
    found = swapped(captions, [0, 0, 1, 2], "a red circle")
    assert found == {"a red square", "a blue circle"}


def test_words_of_one_caption_are_not_synonyms() -> None:
    captions = ["red on blue", "red on blue", "a red circle", "a blue circle"]
    assert swapped(captions, [0, 1, 2, 3], "a red circle") == {"a blue circle"}


def test_pieces_of_words_stay_whole() -> None:
    captions = ["a red circle", "a red cir ##s", "a blue cir ##s"]
    assert swapped(captions, [0, 1, 2], "a red cir ##s") == {"a blue cir ##s"}
    assert "a red cir" not in swapped(captions, [0, 1, 2], "a red circle")


def test_padding_is_left_alone_and_the_caption_too() -> None:
    swaps = WordSwaps([ids("a red circle"), ids("a blue circle")], [0, 1], SPECIAL)
    padded = np.concatenate([ids("a red circle"), [0, 0, 0]])
    before = padded.copy()
    result = swaps.swapped(padded, np.random.Generator(np.random.Philox(key=0)))
    assert result is not None and result.tolist() == [*ids("a blue circle"), 0, 0, 0]
    assert np.array_equal(padded, before)
