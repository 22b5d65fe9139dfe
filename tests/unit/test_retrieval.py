"""Recall at k against the original's own numbers, and where scores are equal."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages.retrieval import recalls, retrieval_ranks

REFERENCE = Path(__file__).parent.parent / "fixtures" / "reference"
CASES: list[dict[str, Any]] = json.loads((REFERENCE / "blip_text_and_retrieval.json").read_text())[
    "retrieval_metrics"
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{len(case['scores_i2t'])} images")
def test_recalls_are_the_originals(case: dict[str, Any]) -> None:
    i2t, t2i = np.array(case["scores_i2t"]), np.array(case["scores_t2i"])
    found = recalls(retrieval_ranks(i2t, t2i, case["text_to_image"]))
    for side, theirs in (("tr", "txt"), ("ir", "img")):
        for k in (1, 5, 10):
            expected = case["metrics"][f"{theirs}_r{k}"] / 100
            assert found[f"{side}_at_{k}"] == pytest.approx(expected, abs=1e-12)


def test_the_best_of_an_images_texts_counts() -> None:
    i2t = np.array([[0.1, 0.9, 0.5], [0.8, 0.7, 0.2]])
    ranks = retrieval_ranks(i2t, i2t.T, [0, 0, 1])
    assert ranks.text.tolist() == [0, 2]
    assert ranks.image.tolist() == [1, 0, 1]


def test_a_model_that_tells_nothing_apart_gets_the_worst_rank() -> None:
    flat = np.zeros((4, 8))
    found = recalls(retrieval_ranks(flat, flat.T, [0, 0, 1, 1, 2, 2, 3, 3]))
    assert found["tr_at_1"] == found["ir_at_1"] == 0
    assert found["tr_at_5"] == 0


def test_a_model_that_scores_nan_gets_the_worst_rank() -> None:
    texts, owner = 8, [0, 0, 1, 1, 2, 2, 3, 3]
    broken = np.full((4, texts), np.nan)
    ranks = retrieval_ranks(broken, broken.T, owner)
    assert ranks.text.tolist() == [6] * 4 and ranks.image.tolist() == [3] * texts
    # Alone among numbers: its own right answer goes last, and it stands before others'.
    i2t = np.array([[0.9, 0.8, 0.1], [0.1, 0.2, np.nan]])
    text, image = retrieval_ranks(i2t, i2t.T, [0, 0, 1])
    assert (text.tolist(), image.tolist()) == ([0, 2], [0, 0, 1])
    i2t = np.array([[0.9, 0.8, np.nan], [0.1, 0.2, 0.9]])
    text, image = retrieval_ranks(i2t, i2t.T, [0, 0, 1])
    assert (text.tolist(), image.tolist()) == ([1, 0], [0, 0, 1])
