"""What a picture shows: one or two coloured shapes in places on a background."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

from stages.scenes.config import SceneConfig

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
BACKGROUNDS = ("white", "black", "gray", "brown", "navy", "beige")
PLACES = (
    "center",
    "left",
    "right",
    "top",
    "bottom",
    "top left",
    "bottom right",
    "top right",
    "bottom left",
)
Relation = Literal["left of", "above"]
RELATIONS: tuple[Relation, Relation] = ("left of", "above")


@dataclass(frozen=True)
class Thing:
    """One shape."""

    colour: str
    shape: str
    place: str


@dataclass(frozen=True)
class Scene:
    """Equal scenes have equal true captions. Of two things the first is left of or above the
    second, and their places say so."""

    things: tuple[Thing, ...]
    background: str

    @property
    def relation(self) -> Relation | None:
        """How the first thing lies to the second; None where there is one only."""
        if len(self.things) == 1:
            return None
        return "left of" if self.things[0].place == "left" else "above"

    def to_json(self) -> str:
        """One line, keys in a fixed order: equal scenes give equal strings."""
        things = [[thing.colour, thing.shape, thing.place] for thing in self.things]
        return json.dumps({"things": things, "background": self.background})

    @staticmethod
    def from_json(text: str) -> Scene:
        """The inverse of `to_json`."""
        value = json.loads(text)
        return Scene(tuple(Thing(*thing) for thing in value["things"]), value["background"])


def _pair(first: tuple[str, str], second: tuple[str, str], relation: Relation) -> tuple[Thing, ...]:
    places = ("left", "right") if relation == "left of" else ("top", "bottom")
    return (Thing(*first, places[0]), Thing(*second, places[1]))


def distinct_scenes(config: SceneConfig) -> int:
    """How many indexes of `Scenes` are sure to give distinct scenes."""
    looks = config.colours * config.shapes
    single = looks * config.places * config.backgrounds
    double = looks * (looks - 1) * len(RELATIONS) * config.backgrounds
    limits = [single / (1 - config.two_shapes)] if config.two_shapes < 1 else []
    limits += [double / config.two_shapes] if config.two_shapes > 0 else []
    return int(min(limits))


class Scenes:
    """An endless sequence of scenes: a pure function of (config, seed, index).

    The first `distinct_scenes` of them are distinct; every stretch of it holds scenes with two
    things in the configured share.
    """

    def __init__(self, config: SceneConfig, seed: int) -> None:
        self._config = config
        self._seed = seed

    def __getitem__(self, index: int) -> Scene:
        share = self._config.two_shapes
        doubles = int(index * share)
        if int((index + 1) * share) > doubles:
            return self._double(doubles)
        return self._single(index - doubles)

    def _single(self, index: int) -> Scene:
        colour, shape, place, background = self._singles[index % len(self._singles)]
        return Scene((Thing(colour, shape, place),), background)

    def _double(self, index: int) -> Scene:
        looks, relations, backgrounds = self._looks, len(RELATIONS), self._config.backgrounds
        rest, background = divmod(self._doubles[index % len(self._doubles)], backgrounds)
        rest, relation = divmod(rest, relations)
        first, second = divmod(rest, len(looks) - 1)
        # Skipping the first look numbers the ordered pairs of two different ones without gaps.
        second += second >= first
        things = _pair(looks[first], looks[second], RELATIONS[relation])
        return Scene(things, BACKGROUNDS[background])

    @cached_property
    def _looks(self) -> Sequence[tuple[str, str]]:
        return list(product(COLOURS[: self._config.colours], SHAPES[: self._config.shapes]))

    @cached_property
    def _singles(self) -> Sequence[tuple[str, str, str, str]]:
        config = self._config
        every = list(
            product(
                COLOURS[: config.colours],
                SHAPES[: config.shapes],
                PLACES[: config.places],
                BACKGROUNDS[: config.backgrounds],
            )
        )
        random.Random(f"single scenes of {self._seed}").shuffle(every)
        return every

    @cached_property
    def _doubles(self) -> Sequence[int]:
        looks = len(self._looks)
        count = looks * (looks - 1) * len(RELATIONS) * self._config.backgrounds
        return random.Random(f"double scenes of {self._seed}").sample(range(count), count)
