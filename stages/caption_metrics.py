"""BLEU and CIDEr of captions, number for number those of the COCO caption evaluation.

`bleu` is pycocoevalcap's ``Bleu`` (Papineni et al. 2002, reference length the closest), `cider`
its ``Cider``, which is CIDEr-D (Vedantam et al. 2015, section 5): clipped counts, a Gaussian
penalty on the length, document frequencies from the references at hand, times 10.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

MAX_ORDER = 4
CIDER_SIGMA = 6.0

_WORD = re.compile(r"\w+(?:[-'’]\w+)*")

Ngram = tuple[str, ...]


def words(text: str) -> list[str]:
    """``text`` in lower case, split into words, punctuation dropped.

    Stands in for COCO's PTBTokenizer, a Java program; both agree on plain captions.
    """
    return _WORD.findall(text.lower())


def ngrams(tokens: Sequence[str], order: int = MAX_ORDER) -> Counter[Ngram]:
    """How often each run of 1 to ``order`` words occurs."""
    return Counter(
        tuple(tokens[start : start + length])
        for length in range(1, order + 1)
        for start in range(len(tokens) - length + 1)
    )


def bleu(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], order: int = MAX_ORDER
) -> float:
    """BLEU-``order`` of a whole corpus, 0 to 1: one caption and its references for each item."""
    assert len(hypotheses) == len(references)
    guessed, correct = [0] * order, [0] * order
    length = reference_length = 0
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        tokens = words(hypothesis)
        known = [words(text) for text in texts]
        length += len(tokens)
        reference_length += min((abs(len(r) - len(tokens)), len(r)) for r in known)[1]
        most: Counter[Ngram] = Counter()
        for reference in known:
            most |= ngrams(reference, order)
        for ngram, count in ngrams(tokens, order).items():
            correct[len(ngram) - 1] += min(count, most[ngram])
        for size in range(order):
            guessed[size] += max(0, len(tokens) - size)
    # The original's constants against division by zero, kept so that the figures are equal.
    tiny, small = 1e-15, 1e-9
    product = math.prod((c + tiny) / (g + small) for c, g in zip(correct, guessed, strict=True))
    ratio = (length + tiny) / (reference_length + small)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return float(product ** (1 / order)) * penalty


def cider(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each item, 0 to 10; a corpus's CIDEr is their mean.

    An n-gram counts the more, the fewer items have it in their references, so the value of one
    item depends on all items.
    """
    assert len(hypotheses) == len(references)
    counted = [[ngrams(words(text)) for text in texts] for texts in references]
    frequency: Counter[Ngram] = Counter()
    for item in counted:
        frequency.update({ngram for reference in item for ngram in reference})
    items = math.log(len(counted)) if counted else 0.0
    rarity = {ngram: items - math.log(count) for ngram, count in frequency.items()}
    return [
        _cider_of(_Vector(ngrams(words(hypothesis)), rarity, items), item, rarity, items)
        for hypothesis, item in zip(hypotheses, counted, strict=True)
    ]


class _Vector:
    """TF-IDF weights of a caption's n-grams, their norm for each n, and the caption's length."""

    def __init__(
        self, counts: Mapping[Ngram, int], rarity: Mapping[Ngram, float], unseen: float
    ) -> None:
        self.weights = {n: count * rarity.get(n, unseen) for n, count in counts.items()}
        squares = [0.0] * MAX_ORDER
        for ngram, weight in self.weights.items():
            squares[len(ngram) - 1] += weight * weight
        self.norms = [math.sqrt(square) for square in squares]
        # The original counts bigrams, not words; only differences of lengths matter.
        self.length = sum(count for ngram, count in counts.items() if len(ngram) == 2)


def _cider_of(
    caption: _Vector,
    references: Sequence[Mapping[Ngram, int]],
    rarity: Mapping[Ngram, float],
    unseen: float,
) -> float:
    total = 0.0
    for counts in references:
        reference = _Vector(counts, rarity, unseen)
        products = [0.0] * MAX_ORDER
        for ngram, weight in caption.weights.items():
            theirs = reference.weights.get(ngram, 0.0)
            products[len(ngram) - 1] += min(weight, theirs) * theirs
        norms = [a * b for a, b in zip(caption.norms, reference.norms, strict=True)]
        cosines = sum(p / n if n else p for p, n in zip(products, norms, strict=True))
        distance = caption.length - reference.length
        total += cosines / MAX_ORDER * math.exp(-(distance**2) / (2 * CIDER_SIGMA**2))
    return 10.0 * total / len(references)
