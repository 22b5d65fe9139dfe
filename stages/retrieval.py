"""Recall at k of image-text retrieval, as BLIP measures it (train_retrieval.py, ``itm_eval``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

RECALL_AT = (1, 5, 10)

Scores = npt.NDArray[np.floating]
Ranks = npt.NDArray[np.int64]


class RetrievalRanks(NamedTuple):
    """Where the right answer stands in each query's list, 0 being the first place."""

    text: Ranks
    """(I,): for each image, the best rank among its own texts (text retrieval, TR)."""
    image: Ranks
    """(T,): for each text, the rank of its image (image retrieval, IR)."""


def retrieval_ranks(
    scores_i2t: Scores, scores_t2i: Scores, text_to_image: Sequence[int]
) -> RetrievalRanks:
    """Ranks from scores, higher being better.

    - ``scores_i2t``: (I, T), each image against all texts; ``scores_t2i``: (T, I), each text
      against all images. They differ after re-ranking, which rescores each query's best alone.
    - ``text_to_image``: (T,) the index of each text's image. Every image needs a text.

    Equal scores count against the right answer, so a model that scores everything alike gets the
    worst rank rather than one that the order of the items decides. So do scores that are NaN, of
    right answers and of wrong ones.
    """
    images, texts = scores_i2t.shape
    owner = np.asarray(text_to_image, dtype=np.int64)
    assert scores_t2i.shape == (texts, images) and owner.shape == (texts,)
    assert len(np.unique(owner)) == images, "every image needs a text"
    own = scores_t2i[np.arange(texts), owner]
    # Not ">=": no comparison with NaN is true, and nothing would stand before a NaN.
    image_rank = (~(scores_t2i < own[:, None])).sum(axis=1) - 1
    # The image's other texts are no wrong answers: only the best of them has to be beaten.
    is_own = owner[None, :] == np.arange(images)[:, None]
    best = np.where(is_own, scores_i2t, -np.inf).max(axis=1)
    text_rank = (~(scores_i2t < best[:, None]) & ~is_own).sum(axis=1)
    return RetrievalRanks(text_rank.astype(np.int64), image_rank.astype(np.int64))


def recalls(ranks: RetrievalRanks) -> dict[str, float]:
    """``tr_at_k`` and ``ir_at_k`` for k of `RECALL_AT`, shares from 0 to 1."""
    sides = (("tr", ranks.text), ("ir", ranks.image))
    return {f"{side}_at_{k}": float((r < k).mean()) for side, r in sides for k in RECALL_AT}
