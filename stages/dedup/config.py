"""What counts as the same picture, and how hard to look for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator, model_validator

from stages.base import Config, WholeRoundConfig, operational

MOST_BITS = 24
"""Planes that part the images of a table, at most."""


class SearchConfig(Config):
    """The search for close embeddings. Up to ``exhaustive_below`` images every pair is looked at;
    beyond, those that share a bucket of one of several tables (`stages.dedup.sketches`)."""

    exhaustive_below: int = Field(20_000, ge=0)
    bits: int | None = Field(None, ge=0, le=MOST_BITS)
    """Planes that part the images of a table into buckets. None: as many as cost the least."""
    tables: int | None = Field(None, ge=1)
    """Tables of buckets to begin with. None: as many as it takes to find pairs of just the least
    cosine more often than ``recall`` asks for."""
    max_tables: int = Field(512, ge=1)
    """``tables`` are doubled up to this where too few pairs are found. Each takes 4 bytes an image
    of the disk that holds temporary files."""
    recall: float = Field(0.995, ge=0, le=1)
    """Of the close pairs of a sample of images, at least this share must be found."""
    sample: int = Field(2_000, ge=1)
    """Images that are compared with all others to measure the recall."""
    gpus: float = operational(0.0, ge=0, le=1)
    """GPU, or share of one, that each part of an exhaustive search is given; 0: it runs on CPUs.
    What a GPU finds is looked at again on a CPU, so the outcome is the same."""

    @model_validator(mode="after")
    def _may_begin(self) -> SearchConfig:
        if self.tables is not None and self.tables > self.max_tables:
            raise ValueError(f"tables {self.tables} exceeds max_tables {self.max_tables}")
        return self

    @property
    def device(self) -> str:
        """Of the search's matrix products."""
        return "cuda" if self.gpus else "cpu"


class SharingConfig(WholeRoundConfig):
    """Which images share one captioning and one scoring."""

    perceptual_distance: int | None = None
    """As in `DedupConfig`; None: only images of equal pixels."""
    perceptual_cosine: float | None = None
    cohorts: tuple[str, ...] = ()
    """The first shard of each round that brought new ones, ascending."""


class DedupConfig(WholeRoundConfig):
    """When two images are the same picture. The ``resources`` are also those of the search for
    images that share captions.

    Of the labelled pairs of real photos that the defaults were read from, ``same_picture`` lie at
    a Hamming distance of 0 to 44 (one at 90), and ``different`` pairs at 86 or more.
    """

    before_caption: Literal["exact", "perceptual", "off"] = operational("exact")
    """Which images share one captioning and one scoring, their texts carried along: those of equal
    pixels, also those that the perceptual net ties, or none. No later net looks at it."""
    perceptual_distance: int | None = Field(32, ge=0, le=256)
    """At most so many of the 256 bits of two perceptual hashes may differ. None: net off."""
    perceptual_cosine: float | None = Field(0.9, ge=-1, le=1)
    """Perceptual closeness counts only where the embeddings' cosine is at least this. None: close
    hashes are enough, embeddings or not."""
    semantic_cosine: float | None = Field(0.97, ge=-1, le=1)
    """A cosine of at least this is enough alone. None: net off."""
    cluster_cosine: float | None = Field(0.85, ge=-1, le=1)
    """Guard against chains: each image of a cluster has at least this cosine to the one in its
    middle, or the cluster is parted. Never stricter than the nets. None: no guard."""
    evaluation: tuple[str, ...] = ()
    """Evaluation sets whose pictures must not be trained on: folders and tars of images, or
    Parquet files with a column ``embedding`` made by the run's embedder. The run's own dev and
    test probes are always among them."""
    max_contaminated: float = operational(0.5, ge=0, le=1)
    """If a larger share of the web images, or of the human ones, shows evaluation pictures, the
    run stops: training data was given as an evaluation set."""
    search: SearchConfig = SearchConfig()

    @field_validator("before_caption", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value  # as YAML reads it without quotes

    @model_validator(mode="after")
    def _knows_a_distance(self) -> DedupConfig:
        if self.before_caption == "perceptual" and self.perceptual_distance is None:
            raise ValueError(
                "before_caption: 'perceptual' needs perceptual_distance; give one, or use exact"
            )
        return self

    def sharing(self, cohorts: Sequence[str]) -> SharingConfig:
        """What `before_caption` asks for; ``cohorts`` as in `SharingConfig`."""
        if self.before_caption != "perceptual":
            return SharingConfig(cohorts=tuple(cohorts), resources=self.resources)
        return SharingConfig(
            perceptual_distance=self.perceptual_distance,
            perceptual_cosine=self.perceptual_cosine,
            cohorts=tuple(cohorts),
            resources=self.resources,
        )

    @property
    def guard(self) -> float | None:
        """The least cosine to a cluster's middle: what one tie allows, the guard must."""
        if self.cluster_cosine is None or (
            self.perceptual_distance is not None and self.perceptual_cosine is None
        ):
            return None
        ties = [self.semantic_cosine]
        if self.perceptual_distance is not None:
            ties.append(self.perceptual_cosine)
        return min([self.cluster_cosine, *(tie for tie in ties if tie is not None)])
