"""Worlds that cannot be built are refused in words."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from stages.scenes.config import FaultConfig, MixConfig, SceneConfig, WorldConfig


def test_the_default_world_has_two_thousand_source_urls() -> None:
    assert WorldConfig().web_rows >= 2000


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError, match="web_row\n"):
        WorldConfig.model_validate({"web_row": 100})


def test_shares_of_wrong_texts_must_sum_to_one() -> None:
    assert MixConfig(near_miss=1, other=0, spam=0, file_name=0).near_miss == 1
    with pytest.raises(ValidationError, match=r"sum to 1, they sum to 1\.1"):
        MixConfig(near_miss=0.5)


def test_most_rows_must_be_sound() -> None:
    with pytest.raises(ValidationError, match=r"at most 0\.75"):
        FaultConfig(corrupt=0.4, html=0.4)


def test_annotated_sets_may_not_eat_up_the_scenes() -> None:
    few = SceneConfig(shapes=2, colours=2, places=2, backgrounds=2, two_shapes=0)
    with pytest.raises(ValidationError, match="at most half of the 16"):
        WorldConfig(scenes=few, human_images=10, dev_images=5, test_images=2)
    assert WorldConfig(scenes=few, human_images=3, dev_images=3, test_images=2)


def test_a_small_web_needs_fewer_counted_faults() -> None:
    with pytest.raises(ValidationError, match="web_rows=60"):
        WorldConfig(web_rows=60)
    assert WorldConfig(web_rows=60, faults=FaultConfig(slow=1, pixel=1, hostile=3))
