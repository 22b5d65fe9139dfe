"""Near-miss texts for the filter: a human caption with one word exchanged.

A filter trained on other images' texts learns to reject gross mismatches and passes near misses.
The exchange needs no model and no truth beyond the human captions: a word may be replaced by
another one that stands between the same two neighbours in some other caption. Words that seem to
mean the same are never exchanged: where captions of one image say one of them or the other, but
rarely both at once. Not part of BLIP; off unless asked for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SYNONYM_SHARE = 0.5
"""Two words are taken for synonyms where, of the images whose captions hold both, more than this
share never have them in one caption."""

Tokens = npt.NDArray[np.int64]


class WordSwaps:
    """Exchanges learnt from captions as token ids.

    - ``captions``: one array of ids each, special tokens included; these are never exchanged, nor
      are pieces of words (``inner``: ids of word pieces that continue a word).
    - ``images``: the image of each caption, to find out which words mean the same.
    """

    def __init__(
        self,
        captions: Sequence[Tokens],
        images: Sequence[int],
        special: frozenset[int],
        inner: frozenset[int] = frozenset(),
    ) -> None:
        self._special, self._inner = special, inner
        between: dict[tuple[int, int], set[int]] = defaultdict(set)
        for caption in captions:
            ids = caption.tolist()
            for place in self._places(ids):
                between[ids[place - 1], ids[place + 1]].add(ids[place])
        same = _synonyms(captions, images, special)
        self._choices: dict[tuple[int, int, int], Tokens] = {}
        for (before, after), found in between.items():
            for word in found:
                others = sorted(other for other in found if (word, other) not in same)
                others.remove(word)
                if others:
                    self._choices[before, word, after] = np.array(others, dtype=np.int64)

    def _places(self, ids: Sequence[int]) -> list[int]:
        """Where a whole word stands between two tokens."""
        return [
            place
            for place in range(1, len(ids) - 1)
            if ids[place] not in self._special
            and ids[place] not in self._inner
            and ids[place + 1] not in self._inner
        ]

    def swapped(self, caption: Tokens, random: np.random.Generator) -> Tokens | None:
        """``caption`` with one word exchanged, or None where none can be."""
        ids = caption.tolist()
        found = [
            (place, choices)
            for place in self._places(ids)
            if (choices := self._choices.get((ids[place - 1], ids[place], ids[place + 1])))
            is not None
        ]
        if not found:
            return None
        place, choices = found[int(random.integers(len(found)))]
        result = caption.copy()
        result[place] = choices[int(random.integers(len(choices)))]
        return result


def _synonyms(
    captions: Sequence[Tokens], images: Sequence[int], special: frozenset[int]
) -> set[tuple[int, int]]:
    """Ordered pairs of words that stand for each other; every word with itself left out."""
    of_image: dict[int, list[set[int]]] = defaultdict(list)
    for caption, image in zip(captions, images, strict=True):
        of_image[image].append(set(caption.tolist()) - special)
    both: dict[tuple[int, int], int] = defaultdict(int)
    apart: dict[tuple[int, int], int] = defaultdict(int)
    for texts in of_image.values():
        words = sorted(set().union(*texts))
        for index, word in enumerate(words):
            with_word = [text for text in texts if word in text]
            for other in words[index + 1 :]:
                both[word, other] += 1
                apart[word, other] += not any(other in text for text in with_word)
    found = {pair for pair, count in both.items() if apart[pair] > SYNONYM_SHARE * count}
    return found | {(b, a) for a, b in found}
