"""Pictures show what their scenes say."""

from __future__ import annotations

import io

import imagehash
import numpy as np
import pytest
from PIL import Image

from stages.scenes.config import SceneConfig
from stages.scenes.render import encode, near_duplicate, render
from stages.scenes.scene import BACKGROUNDS, COLOURS, PLACES, SHAPES, Scene, Scenes, Thing

CONFIG = SceneConfig()
PLAIN = SceneConfig(texture=0, jitter=0)


def mask(scene: Scene, config: SceneConfig = PLAIN) -> np.ndarray:
    """Where the picture differs from its background."""
    pixels = np.asarray(render(scene, config, "key"), dtype=int)
    return np.abs(pixels - pixels[0, 0]).sum(axis=2) > 40


def hash_bits(image: Image.Image, size: int) -> np.ndarray:
    small = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(imagehash.phash(small, hash_size=16).hash).reshape(-1)


@pytest.mark.parametrize("place", PLACES)
def test_a_shape_lies_where_its_place_says(place: str) -> None:
    rows, columns = np.nonzero(mask(Scene((Thing("red", "circle", place),), "white")))
    row, column = rows.mean() / 63 - 0.5, columns.mean() / 63 - 0.5
    words = place.split()
    assert np.sign(round(row, 1)) == ("bottom" in words) - ("top" in words)
    assert np.sign(round(column, 1)) == ("right" in words) - ("left" in words)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_large_and_differ(shape: str) -> None:
    drawn = {name: mask(Scene((Thing("red", name, "center"),), "white")) for name in SHAPES}
    assert 0.06 < drawn[shape].mean() < 0.3
    for other in SHAPES:
        if other != shape:
            assert (drawn[shape] ^ drawn[other]).mean() > 0.02


def test_two_shapes_do_not_touch() -> None:
    for relation in (("left", "right"), ("top", "bottom")):
        for key in range(20):
            things = tuple(Thing("red", "square", place) for place in relation)
            pixels = np.asarray(render(Scene(things, "white"), CONFIG, str(key)), dtype=int)
            red = pixels[..., 0] - pixels[..., 1] > 100
            across = red.any(axis=0 if relation[0] == "left" else 1)
            assert np.diff(across.astype(int)).tolist().count(1) + across[0] == 2


def test_colours_stay_apart_under_jitter_and_pattern() -> None:
    def middle(colour: str, key: int) -> np.ndarray:
        scene = Scene((Thing(colour, "square", "center"),), "black")
        return np.asarray(render(scene, CONFIG, str(key)), dtype=float)[24:40, 24:40].mean((0, 1))

    means = {colour: middle(colour, 0) for colour in COLOURS}
    for colour in COLOURS:
        for key in range(1, 6):
            seen = middle(colour, key)
            nearest = min(COLOURS, key=lambda c: float(np.abs(means[c] - seen).sum()))
            assert nearest == colour


def test_every_colour_shows_on_every_background() -> None:
    for colour in COLOURS:
        for background in BACKGROUNDS:
            assert mask(Scene((Thing(colour, "circle", "center"),), background)).mean() > 0.1


def test_a_picture_is_a_function_of_its_key() -> None:
    scene = Scenes(CONFIG, 0)[3]
    first = encode(render(scene, CONFIG, "a"), "png")
    assert first == encode(render(scene, CONFIG, "a"), "png")
    assert first != encode(render(scene, CONFIG, "b"), "png")
    assert render(scene, SceneConfig(image_size=48), "a").size == (48, 48)


def test_near_duplicates_look_alike_and_other_pictures_do_not() -> None:
    scenes = Scenes(CONFIG, 0)
    pictures = [render(scenes[i], CONFIG, f"{i}") for i in range(120)]
    copies = [
        Image.open(io.BytesIO(near_duplicate(picture, f"{i}")))
        for i, picture in enumerate(pictures)
    ]
    assert all(copy.format == "JPEG" for copy in copies)
    originals = np.stack([hash_bits(picture, 32) for picture in pictures])
    distances = (originals[:, None] ^ np.stack([hash_bits(c, 32) for c in copies])[None]).sum(-1)
    own = np.diag(distances)
    others = distances[~np.eye(len(pictures), dtype=bool)]
    assert np.mean(own <= 32) > 0.85
    assert others.min() > 32
