"""Scenes are numbered, distinct, and survive a trip through JSON."""

from __future__ import annotations

import pytest

from stages.scenes.config import SceneConfig
from stages.scenes.scene import COLOURS, PLACES, SHAPES, Scene, Scenes, distinct_scenes


def test_the_first_scenes_are_all_distinct() -> None:
    config = SceneConfig()
    count = distinct_scenes(config)
    scenes = Scenes(config, seed=3)
    assert count > 4000
    assert len({scenes[i] for i in range(count)}) == count


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_scenes_with_two_shapes_holds_in_every_stretch(share: float) -> None:
    scenes = Scenes(SceneConfig(two_shapes=share), seed=0)
    for start in (0, 100, 777):
        double = sum(scenes[i].relation is not None for i in range(start, start + 100))
        assert double == pytest.approx(100 * share, abs=1)


def test_a_scene_is_a_function_of_seed_and_index() -> None:
    config = SceneConfig()
    first, again, other = Scenes(config, 1), Scenes(config, 1), Scenes(config, 2)
    assert [first[i] for i in range(50)] == [again[i] for i in range(50)]
    assert [first[i] for i in range(50)] != [other[i] for i in range(50)]


def test_a_smaller_world_uses_fewer_words() -> None:
    config = SceneConfig(shapes=3, colours=2, places=5, backgrounds=4)
    things = [thing for i in range(100) for thing in Scenes(config, 0)[i].things]
    assert {thing.shape for thing in things} == set(SHAPES[:3])
    assert {thing.colour for thing in things} == set(COLOURS[:2])
    assert {thing.place for thing in things} <= set(PLACES[:5])


def test_of_two_shapes_places_and_relation_agree() -> None:
    scenes = Scenes(SceneConfig(two_shapes=1), 0)
    seen = {(s.relation, *(t.place for t in s.things)) for s in (scenes[i] for i in range(60))}
    assert seen == {("left of", "left", "right"), ("above", "top", "bottom")}
    assert all(scenes[i].things[0] != scenes[i].things[1] for i in range(60))


def test_json_there_and_back() -> None:
    scenes = Scenes(SceneConfig(), 5)
    for i in range(40):
        assert Scene.from_json(scenes[i].to_json()) == scenes[i]
