"""The picture of a scene, and how pictures change when a web passes them on.

A picture is a function of (scene, config, key): the key stirs place, size, tilt, colour and the
soft pattern over the picture, so that two pictures of one scene are never the same bytes.
"""

from __future__ import annotations

import colorsys
import io
import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

from stages.scenes.config import SceneConfig
from stages.scenes.scene import Scene, Thing

_OVERSAMPLING = 4
_PATTERN_CELLS = 16

_RGB: dict[str, tuple[int, int, int]] = {
    "red": (222, 24, 32),
    "green": (26, 152, 54),
    "blue": (38, 88, 245),
    "yellow": (250, 226, 10),
    "purple": (146, 34, 178),
    "orange": (255, 136, 0),
    "cyan": (0, 212, 226),
    "pink": (255, 128, 190),
    "white": (244, 244, 244),
    "black": (14, 14, 14),
    "gray": (126, 126, 126),
    "brown": (98, 60, 28),
    "navy": (16, 26, 98),
    "beige": (226, 204, 164),
}
_SINGLE_OFFSET = 0.23
_DOUBLE_OFFSET = 0.25
_DOUBLE_SIZE = 0.8
_MAX_TILT = 8.0

Point = tuple[float, float]


def render(scene: Scene, config: SceneConfig, key: str) -> Image.Image:
    """RGB picture of ``config.image_size`` pixels square."""
    rng = random.Random(key)
    size = config.image_size * _OVERSAMPLING
    picture = Image.new("RGB", (size, size), _colour(scene.background, config, rng))
    draw = ImageDraw.Draw(picture)
    single = len(scene.things) == 1
    for thing in scene.things:
        _draw_thing(draw, thing, config, single, rng)
    picture = picture.reduce(_OVERSAMPLING)
    return _with_pattern(picture, config.texture, rng) if config.texture else picture


def encode(picture: Image.Image, suffix: str, quality: int = 90) -> bytes:
    """``picture`` as a file: suffix is png or jpg."""
    buffer = io.BytesIO()
    if suffix == "png":
        picture.save(buffer, "PNG", compress_level=1)
    else:
        picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def near_duplicate(picture: Image.Image, key: str) -> bytes:
    """The same picture as JPEG after one change, as other sites show it: re-encoded, resized,
    brightened or cropped a little."""
    rng = random.Random(key)
    change = rng.choice(("re-encoded", "resized", "brightened", "cropped"))
    width, height = picture.size
    if change == "resized":
        scale = rng.choice((0.75, 0.9, 1.25, 1.5))
        changed = (round(width * scale), round(height * scale))
        picture = picture.resize(changed, Image.Resampling.BICUBIC)
    elif change == "brightened":
        picture = ImageEnhance.Brightness(picture).enhance(rng.choice((0.93, 1.06)))
    elif change == "cropped":
        margin = max(1, round(width * 0.015))
        picture = picture.crop((margin, margin, width - margin, height - margin))
    return encode(picture, "jpg", quality=rng.randint(78, 92))


def _draw_thing(
    draw: ImageDraw.ImageDraw, thing: Thing, config: SceneConfig, single: bool, rng: random.Random
) -> None:
    size = config.image_size * _OVERSAMPLING
    offset = _SINGLE_OFFSET if single else _DOUBLE_OFFSET
    column = ("left" in thing.place.split()) * -1 + ("right" in thing.place.split())
    row = ("top" in thing.place.split()) * -1 + ("bottom" in thing.place.split())
    jitter = config.jitter
    x = 0.5 + offset * column + rng.uniform(-jitter, jitter)
    y = 0.5 + offset * row + rng.uniform(-jitter, jitter)
    diameter = config.shape_size * (1 if single else _DOUBLE_SIZE)
    radius = diameter / 2 * (1 + rng.uniform(-2, 2) * jitter)
    tilt = math.radians(rng.uniform(-_MAX_TILT, _MAX_TILT)) if jitter else 0.0
    fill = _colour(thing.colour, config, rng)
    center = (x * size, y * size)
    if thing.shape in ("circle", "ring"):
        _draw_round(draw, thing.shape, center, radius * size, fill)
        return
    outline = [
        (
            center[0] + radius * size * (px * math.cos(tilt) - py * math.sin(tilt)),
            center[1] + radius * size * (px * math.sin(tilt) + py * math.cos(tilt)),
        )
        for px, py in _OUTLINES[thing.shape]
    ]
    draw.polygon(outline, fill=fill)


def _draw_round(
    draw: ImageDraw.ImageDraw,
    shape: str,
    center: Point,
    radius: float,
    fill: tuple[int, int, int],
) -> None:
    x, y = center
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "ring":
        draw.ellipse(box, outline=fill, width=round(radius * 0.42))
    else:
        draw.ellipse(box, fill=fill)


def _colour(name: str, config: SceneConfig, rng: random.Random) -> tuple[int, int, int]:
    """The named colour, its hue, saturation and value astray by a third of the jitter."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(part / 255 for part in _RGB[name]))
    astray = [rng.uniform(-config.jitter, config.jitter) / 3 for _ in range(3)]
    clipped = (min(1.0, max(0.0, saturation + astray[1])), min(1.0, max(0.0, value + astray[2])))
    red, green, blue = colorsys.hsv_to_rgb((hue + astray[0]) % 1.0, *clipped)
    return (round(red * 255), round(green * 255), round(blue * 255))


def _with_pattern(picture: Image.Image, amplitude: float, rng: random.Random) -> Image.Image:
    """``picture`` under soft light and dark spots of at most ``amplitude`` of 255."""
    cells = np.frombuffer(rng.randbytes(_PATTERN_CELLS**2), dtype=np.uint8)
    grid = Image.fromarray(cells.reshape(_PATTERN_CELLS, _PATTERN_CELLS))
    spots = np.asarray(grid.resize(picture.size, Image.Resampling.BICUBIC), dtype=np.float32)
    light = (
        np.asarray(picture, dtype=np.float32) + ((spots - 127.5) * (amplitude / 127.5))[..., None]
    )
    return Image.fromarray(np.clip(np.rint(light), 0, 255).astype(np.uint8))


def _regular(count: int, radii: tuple[float, ...], start: float) -> list[Point]:
    """``count`` corners around the centre, their radii by turns from ``radii``."""
    angles = [start + 2 * math.pi * corner / count for corner in range(count)]
    return [
        (radii[i % len(radii)] * math.cos(angle), radii[i % len(radii)] * math.sin(angle))
        for i, angle in enumerate(angles)
    ]


def _cross(arm: float) -> list[Point]:
    quarter = [(-arm, -1.0), (arm, -1.0), (arm, -arm)]
    outline: list[Point] = []
    for _ in range(4):
        outline += quarter
        quarter = [(-y, x) for x, y in quarter]
    return outline


def _heart() -> list[Point]:
    outline = []
    for step in range(48):
        t = 2 * math.pi * step / 48
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        outline.append((x / 16, -(y + 2.5) / 14.5))
    return outline


# Corners around (0, 0) in units of the radius, y downwards; scaled so that areas are similar.
_OUTLINES: dict[str, list[Point]] = {
    "square": _regular(4, (1.2,), math.pi / 4),
    "diamond": [(0.0, -1.1), (0.72, 0.0), (0.0, 1.1), (-0.72, 0.0)],
    "triangle": [(x * 1.15, y * 1.15 + 0.15) for x, y in _regular(3, (1.0,), -math.pi / 2)],
    "star": _regular(10, (1.15, 0.5), -math.pi / 2),
    "cross": _cross(0.36),
    "heart": _heart(),
}
