"""The web has the faults and the noise that its config says."""

from __future__ import annotations

from collections import Counter

import pytest

from stages.scenes.config import FaultConfig, MixConfig, SceneConfig, WorldConfig
from stages.scenes.language import is_true
from stages.scenes.plan import WebRow, annotated_scenes, plan_web

CONFIG = WorldConfig(web_rows=1000, human_images=200, dev_images=100, test_images=100)
ROWS = plan_web(CONFIG)


def wrong(row: WebRow) -> bool:
    return row.image.scene is None or not is_true(row.image.scene, row.text)


def test_rows_urls_and_repetitions_add_up() -> None:
    assert len(ROWS) == 1000
    assert len({row.image.url for row in ROWS}) == 970
    assert len({(row.image.url, row.text) for row in ROWS}) == 990


def test_half_of_the_texts_are_wrong_and_kinds_tell_the_truth() -> None:
    assert sum(map(wrong, ROWS)) / len(ROWS) == pytest.approx(0.5, abs=0.02)
    assert all(wrong(row) == (row.kind != "right") for row in ROWS)


def test_the_mix_of_wrong_texts_holds() -> None:
    kinds = Counter(row.kind for row in ROWS if wrong(row))
    assert kinds["hostile"] == 11
    rest = kinds.total() - kinds["hostile"]
    for kind, share in CONFIG.wrong_mix.model_dump().items():
        assert kinds[kind] / rest == pytest.approx(share, abs=0.03)


def test_faults_come_in_the_configured_numbers() -> None:
    images = {row.image.url: row.image for row in ROWS}.values()
    assert Counter(image.fault for image in images if image.fault != "ok") == {
        "not_found": 20,
        "gone": 5,
        "refused": 5,
        "opt_out": 15,
        "corrupt": 15,
        "html": 15,
        "redirect": 30,
        "slow": 6,
        "pixel": 4,
    }
    assert Counter(image.duplicate_kind for image in images) == {
        "none": 830,
        "exact": 60,
        "near": 80,
    }


def test_a_duplicate_shares_group_and_scene_with_a_sound_original() -> None:
    images = {row.image.url: row.image for row in ROWS}
    for image in images.values():
        if image.original is not None:
            original = images[image.original]
            assert (original.fault, original.duplicate_kind) == ("ok", "none")
            assert image.duplicate_group == original.duplicate_group
            assert image.scene == original.scene
    originals = [i.duplicate_group for i in images.values() if i.duplicate_kind == "none"]
    assert len(set(originals)) == len(originals)


def test_web_and_annotated_scenes_are_distinct() -> None:
    annotated = annotated_scenes(CONFIG)
    assert len(set(annotated)) == len(annotated) == 400
    images = {row.image.url: row.image for row in ROWS}.values()
    shown = [i.scene for i in images if i.duplicate_kind == "none" and i.scene is not None]
    assert len(set(shown)) == len(shown)
    assert not set(shown) & set(annotated)


def test_a_web_larger_than_its_world_repeats_scenes_but_never_annotated_ones() -> None:
    scenes = SceneConfig(shapes=3, colours=3, places=3, backgrounds=2, two_shapes=0)
    config = WorldConfig(web_rows=400, human_images=10, dev_images=8, test_images=8, scenes=scenes)
    shown = {row.image.scene for row in plan_web(config)}
    assert not shown & set(annotated_scenes(config))


def test_the_plan_is_a_function_of_the_config() -> None:
    assert plan_web(CONFIG) == ROWS
    assert plan_web(CONFIG.model_copy(update={"seed": 1})) != ROWS


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_web_of_only_right_or_only_wrong_texts(share: float) -> None:
    config = WorldConfig(
        web_rows=100,
        wrong=share,
        wrong_mix=MixConfig(near_miss=0, other=1, spam=0, file_name=0),
        faults=FaultConfig(slow=0, pixel=0, hostile=0),
    )
    assert {wrong(row) for row in plan_web(config)} == {share == 1.0}
