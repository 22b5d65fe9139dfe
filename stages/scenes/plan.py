"""The plan of a miniature web: which URL shows which scene, with which fault and which text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import PurePosixPath
from typing import Literal

from stages.scenes import language, texts
from stages.scenes.config import FaultConfig, WorldConfig
from stages.scenes.scene import Scene, Scenes, distinct_scenes

DOMAIN = "scenes.example"
Fault = Literal[
    "ok",
    "redirect",
    "slow",
    "pixel",
    "not_found",
    "gone",
    "refused",
    "opt_out",
    "corrupt",
    "html",
]
DuplicateKind = Literal["none", "exact", "near"]
TextKind = Literal["right", "near_miss", "other", "spam", "file_name", "hostile"]


@dataclass(frozen=True)
class WebImage:
    """What lies at one URL."""

    url: str
    scene: Scene | None
    """What the picture shows, or would show if it could be had; None for a tracking pixel."""
    fault: Fault
    key: str
    """Stirs the picture, see `render`."""
    suffix: str
    original: str | None
    """URL of the picture that this one repeats."""
    duplicate_kind: DuplicateKind
    duplicate_group: int
    """Equal for exact and near duplicates of one picture."""


@dataclass(frozen=True)
class WebRow:
    """One line of the web table."""

    image: WebImage
    text: str
    kind: TextKind


def plan_web(config: WorldConfig) -> list[WebRow]:
    """The rows of the web table, in their order: a pure function of ``config``."""
    rng = random.Random(f"web of {config.seed}")
    faults = config.faults
    repeated = round(faults.repeated_row * config.web_rows)
    another = round(faults.another_text * config.web_rows)
    images = _plan_images(config, config.web_rows - repeated - another, rng)
    sound = [image for image in images if image.fault in ("ok", "redirect")]
    shown = [*images, *rng.sample(sound, min(another, len(sound)))]
    kinds = _plan_kinds(config, len(shown), rng)
    writer = _Writer(config, [image.scene for image in images if image.scene is not None], rng)
    rows = [writer.row(image, kind) for image, kind in zip(shown, kinds, strict=True)]
    loud = {image.url for image in sound}
    repeatable = [row for row in rows if row.image.url in loud and row.kind != "hostile"]
    rows += [rng.choice(repeatable) for _ in range(config.web_rows - len(rows))]
    rng.shuffle(rows)
    return rows


def annotated_scenes(config: WorldConfig) -> list[Scene]:
    """The scenes of the test probe, the development probe and the human set, in this order. They
    are distinct, and the web never shows one of them."""
    scenes = Scenes(config.scenes, config.seed)
    return [scenes[number] for number in range(config.annotated_images)]


def _plan_images(config: WorldConfig, count: int, rng: random.Random) -> list[WebImage]:
    roles = _plan_roles(config.faults, config.web_rows, count, rng)
    scenes = Scenes(config.scenes, config.seed)
    reserved, available = config.annotated_images, distinct_scenes(config.scenes)
    images: list[WebImage] = []
    for number, role in enumerate(roles):
        if role == "exact" or role == "near":  # noqa: PLR1714 - mypy narrows only this form
            continue
        # Where scenes run out the web starts over, but never enters those of the annotated sets.
        scene = scenes[reserved + number % (available - reserved)]
        images.append(_plan_original(number, role, scene, rng))
    originals = [image for image in images if image.fault == "ok"]
    copies = [
        _plan_copy(number, role, rng.choice(originals))
        for number, role in enumerate(roles)
        if role == "exact" or role == "near"  # noqa: PLR1714
    ]
    return images + copies


Role = Fault | Literal["exact", "near"]


def _plan_roles(faults: FaultConfig, rows: int, count: int, rng: random.Random) -> list[Role]:
    shares: list[tuple[Role, float]] = [
        ("exact", faults.exact_duplicate),
        ("near", faults.near_duplicate),
        ("not_found", faults.not_found),
        ("gone", faults.gone),
        ("refused", faults.refused),
        ("opt_out", faults.opt_out),
        ("corrupt", faults.corrupt),
        ("html", faults.html),
        ("redirect", faults.redirect),
    ]
    roles: list[Role] = [role for role, share in shares for _ in range(round(share * rows))]
    roles.extend(repeat("slow", faults.slow))
    roles.extend(repeat("pixel", faults.pixel))
    roles.extend(repeat("ok", count - len(roles)))
    rng.shuffle(roles)
    return roles


_HOSTS: dict[Fault, str] = {"slow": "slow", "refused": "dead", "redirect": "go", "pixel": "stats"}


def _plan_original(number: int, fault: Fault, scene: Scene, rng: random.Random) -> WebImage:
    suffix = "jpg" if rng.random() < 0.3 and fault != "pixel" else "png"
    host = _HOSTS.get(fault, "images")
    return WebImage(
        url=f"http://{host}.{DOMAIN}/{number:06}.{suffix}",
        scene=None if fault == "pixel" else scene,
        fault=fault,
        key=f"picture {number}",
        suffix=suffix,
        original=None,
        duplicate_kind="none",
        duplicate_group=number,
    )


def _plan_copy(number: int, kind: Literal["exact", "near"], original: WebImage) -> WebImage:
    """A copy keeps the file's name on another host, as mirrors do: names do not identify."""
    name = PurePosixPath(original.url).stem
    host, suffix = ("mirror", original.suffix) if kind == "exact" else ("thumbs", "jpg")
    return WebImage(
        url=f"http://{host}.{DOMAIN}/{number:06}/{name}.{suffix}",
        scene=original.scene,
        fault="ok",
        key=original.key if kind == "exact" else f"copy {number}",
        suffix=suffix,
        original=original.url,
        duplicate_kind=kind,
        duplicate_group=original.duplicate_group,
    )


def _plan_kinds(config: WorldConfig, count: int, rng: random.Random) -> list[TextKind]:
    """Kinds of ``count`` texts in the configured shares, shuffled."""
    mix, wrong = config.wrong_mix, round(config.wrong * count)
    kinds: list[TextKind] = []
    kinds.extend(repeat("hostile", min(config.faults.hostile, wrong)))
    rest = wrong - len(kinds)
    kinds.extend(repeat("spam", round(mix.spam * rest)))
    kinds.extend(repeat("file_name", round(mix.file_name * rest)))
    kinds.extend(repeat("other", round(mix.other * rest)))
    kinds = kinds[:wrong]
    kinds.extend(repeat("near_miss", wrong - len(kinds)))
    kinds.extend(repeat("right", count - wrong))
    rng.shuffle(kinds)
    return kinds


@dataclass
class _Writer:
    """Writes a text of the wanted kind for an image, never the same one twice for one URL."""

    config: WorldConfig
    scenes: Sequence[Scene]
    rng: random.Random
    hostile_count: int = 0
    written: set[tuple[str, str]] = field(default_factory=set)

    def row(self, image: WebImage, kind: TextKind) -> WebRow:
        if image.scene is None and kind in ("right", "near_miss", "other"):
            kind = "spam"
        text = self._text(image.scene, kind)
        while (image.url, text) in self.written:
            text = self._text(image.scene, kind)
        self.written.add((image.url, text))
        return WebRow(image, text, kind)

    def _text(self, scene: Scene | None, kind: TextKind) -> str:
        if kind == "hostile":
            self.hostile_count += 1
            return texts.hostile(self.hostile_count - 1)
        if kind == "spam" or scene is None:
            return texts.spam(self.rng)
        if kind == "file_name":
            return texts.file_name(self.rng)
        if kind == "other":
            return self._caption_of_another(scene)
        caption = self._caption(scene)
        return caption if kind == "right" else language.near_miss(scene, caption, self.rng)

    def _caption(self, scene: Scene) -> str:
        brief = self.rng.random() < self.config.brief
        return self.rng.choice(
            language.brief_captions(scene) if brief else language.full_captions(scene)
        )

    def _caption_of_another(self, scene: Scene) -> str:
        text = self._caption(self.rng.choice(self.scenes))
        while language.is_true(scene, text):
            text = self._caption(self.rng.choice(self.scenes))
        return text
