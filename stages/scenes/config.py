"""How large a sample world is, what it shows, and how bad its web is."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from stages.base import Config


class SceneConfig(Config):
    """What the pictures show. Fewer shapes, colours, places or backgrounds are learned sooner."""

    image_size: int = Field(64, ge=16, le=1024)
    """Width and height of a picture, pixels."""
    shapes: int = Field(8, ge=2, le=8)
    """Use the first so many of `scene.SHAPES`; likewise below."""
    colours: int = Field(8, ge=2, le=8)
    places: int = Field(9, ge=2, le=9)
    backgrounds: int = Field(6, ge=2, le=6)
    two_shapes: float = Field(0.25, ge=0, le=1)
    """Share of scenes with two shapes."""
    shape_size: float = Field(0.54, gt=0, le=0.6)
    """Diameter of a single shape over the width; each of two shapes has 0.8 of it. Shapes much
    smaller than a patch of the vision transformer are hardly learned."""
    jitter: float = Field(0.03, ge=0, le=0.1)
    """How far a place, size or colour strays from its mean, as a share of the full range."""
    texture: float = Field(12.0, ge=0, le=64)
    """Amplitude of the soft pattern that lies over a picture, of 255. It tells pictures of equal
    layout apart, as in real photos, for a perceptual hash too."""


class MixConfig(Config):
    """Shares of the kinds of wrong text; they sum to 1."""

    near_miss: float = Field(0.4, ge=0, le=1)
    """A true caption of the picture with one word changed."""
    other: float = Field(0.35, ge=0, le=1)
    """A true caption of another picture."""
    spam: float = Field(0.15, ge=0, le=1)
    file_name: float = Field(0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        total = self.near_miss + self.other + self.spam + self.file_name
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the shares must sum to 1, they sum to {total:g}")
        return self


class FaultConfig(Config):
    """Shares of all web rows, except where a count is said."""

    exact_duplicate: float = Field(0.06, ge=0, le=0.5)
    """The same bytes under another URL."""
    near_duplicate: float = Field(0.08, ge=0, le=0.5)
    """The same picture re-encoded, resized, brightened or cropped a little."""
    not_found: float = Field(0.02, ge=0, le=0.5)
    gone: float = Field(0.005, ge=0, le=0.5)
    refused: float = Field(0.005, ge=0, le=0.5)
    opt_out: float = Field(0.015, ge=0, le=0.5)
    """Answers with ``X-Robots-Tag: noai``."""
    corrupt: float = Field(0.015, ge=0, le=0.5)
    html: float = Field(0.015, ge=0, le=0.5)
    """A page where an image should be, with status 200."""
    redirect: float = Field(0.03, ge=0, le=0.5)
    repeated_row: float = Field(0.01, ge=0, le=0.5)
    """The same URL with the same text."""
    another_text: float = Field(0.02, ge=0, le=0.5)
    """The same URL with another text."""
    slow: int = Field(6, ge=0)
    """Rows whose server never answers; each costs a timeout."""
    pixel: int = Field(4, ge=0)
    """Rows that are tracking pixels of 1 x 1."""
    hostile: int = Field(11, ge=0)
    """Rows with an empty, enormous or dangerous text, in place of other wrong texts."""

    @model_validator(mode="after")
    def _leaves_sound_rows(self) -> Self:
        shares = sum(v for v in self.model_dump().values() if isinstance(v, float))
        if shares > 0.75:
            raise ValueError(f"the shares sum to {shares:g}; at most 0.75, the rest is sound")
        return self


class WorldConfig(Config):
    """A world is a function of this alone."""

    seed: int = Field(0, ge=0)
    web_rows: int = Field(2400, ge=40)
    """Rows of the web table, whatever becomes of them."""
    wrong: float = Field(0.5, ge=0, le=1)
    """Share of the web rows whose text is not true of the picture."""
    brief: float = Field(0.25, ge=0, le=1)
    """Share of web captions that leave an attribute out."""
    human_images: int = Field(800, ge=1)
    human_captions: int = Field(1, ge=1, le=4)
    """Captions of each human-annotated image, all in full; likewise below."""
    dev_images: int = Field(300, ge=1)
    test_images: int = Field(300, ge=1)
    probe_captions: int = Field(2, ge=1, le=4)
    """Captions of each probe image, and near misses of them."""
    scenes: SceneConfig = SceneConfig()
    wrong_mix: MixConfig = MixConfig()
    faults: FaultConfig = FaultConfig()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        from stages.scenes.scene import distinct_scenes

        reserved, available = self.annotated_images, distinct_scenes(self.scenes)
        if reserved * 2 > available:
            raise ValueError(
                f"human_images, dev_images and test_images need {reserved} scenes that the web "
                f"does not show; at most half of the {available} that `scenes` allows"
            )
        counted = self.faults.slow + self.faults.pixel + self.faults.hostile
        if counted * 4 > self.web_rows:
            raise ValueError(
                f"faults: slow, pixel and hostile are {counted} rows together; at most a quarter "
                f"of web_rows={self.web_rows}"
            )
        return self

    @property
    def annotated_images(self) -> int:
        """Images with trusted captions, all sets together."""
        return self.human_images + self.dev_images + self.test_images
