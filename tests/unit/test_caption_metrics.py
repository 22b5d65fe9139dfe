"""BLEU and CIDEr against numbers that pycocoevalcap itself gave."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages.caption_metrics import bleu, cider, words

REFERENCE = Path(__file__).parent.parent / "fixtures" / "reference"
CASES: list[dict[str, Any]] = json.loads((REFERENCE / "caption_metrics.json").read_text())[
    "caption_metrics"
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{len(case['hypotheses'])} captions")
def test_cider_is_pycocoevalcaps(case: dict[str, Any]) -> None:
    found = cider(case["hypotheses"], case["references"])
    assert found == pytest.approx(case["cider_items"], rel=1e-9, abs=1e-12)
    assert sum(found) / len(found) == pytest.approx(case["cider"], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{len(case['hypotheses'])} captions")
def test_bleu_is_pycocoevalcaps(case: dict[str, Any]) -> None:
    for order in (1, 2, 3, 4):
        found = bleu(case["hypotheses"], case["references"], order)
        assert found == pytest.approx(case["bleu"][order - 1], rel=1e-9, abs=1e-18)


def test_a_caption_that_repeats_its_reference_is_perfect() -> None:
    texts = ["a red circle on a table", "two dogs run along the beach", "a cat sleeps in the sun"]
    references = [[text] for text in texts]
    assert bleu(texts, references) == pytest.approx(1.0)
    assert cider(texts, references) == pytest.approx([10.0] * 3)


def test_case_and_punctuation_do_not_count() -> None:
    assert words("A dog, on the GRASS!  It's well-known.") == words(
        "a dog on the grass it's well-known"
    )
    assert words("… !?") == []
    assert words("رجل يركب دراجة") == ["رجل", "يركب", "دراجة"]
