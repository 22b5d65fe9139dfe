"""Measured facts about a run on a sample world: possible because the world's truth is known."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import pyarrow as pa

from stages.ids import sample_id
from stages.scenes.language import is_true
from stages.scenes.scene import Scene


class Fact(NamedTuple):
    """One figure. Shares are 0 to 1, and NaN where ``n`` is 0."""

    metric: str
    value: float
    n: int
    """Over how many texts, or pairs of images, it was computed."""


@dataclass(frozen=True)
class _Judged:
    """One pair of the run."""

    source: str
    right: bool
    """Of its own picture, which is what the filter saw."""
    right_in_use: bool
    """Of the picture that it is trained with."""
    passed: bool
    used: bool
    """Kept, or merged onto the survivor of its cluster."""


def audit(truth: pa.Table, pairs: pa.Table, clusters: pa.Table) -> list[Fact]:
    """What a run made of a world. A pure function; rows of URLs outside the world are left out.

    Args:
        truth: `world.TRUTH`.
        pairs: every pair of the round: ``url``, ``source``, ``text``, ``state`` (schemas.PAIRS),
            and ``passed`` (bool, null counts as false): whether the filter let the text pass,
            whatever deduplication did with it later. With ``carried_by`` (sample_id or null),
            a merged text is held against the picture that carries it in the end, so that merging
            different pictures costs what it costs.
        clusters: every downloaded web image: ``url``, ``cluster_id``.

    Returns:
        Of texts: ``wrong_before`` (web texts of downloaded images), ``wrong_after`` (kept and
        merged, web and synthetic), ``wrong_after_web``, ``wrong_after_synthetic``,
        ``filter_precision`` and ``filter_recall`` (of right texts, web only),
        ``synthetic_right_before`` and ``synthetic_right_after`` the filter.

        Of pairs of images: `duplicate_facts`.
    """
    scenes = _scenes(truth)
    return text_facts(scenes, pairs) + duplicate_facts(truth, clusters)


def text_facts(scenes: Mapping[str, Scene | None], pairs: pa.Table) -> list[Fact]:
    """The facts of texts among those of `audit`; ``scenes`` maps a URL to what it shows."""
    judged = _judge(scenes, pairs)
    web = [pair for pair in judged if pair.source == "web"]
    synthetic = [pair for pair in judged if pair.source == "synthetic"]
    return [
        _share("wrong_before", (not pair.right for pair in web)),
        _share("wrong_after", (not pair.right_in_use for pair in judged if pair.used)),
        _share("wrong_after_web", (not pair.right_in_use for pair in web if pair.used)),
        _share("wrong_after_synthetic", (not pair.right_in_use for pair in synthetic if pair.used)),
        _share("filter_precision", (pair.right for pair in web if pair.passed)),
        _share("filter_recall", (pair.passed for pair in web if pair.right)),
        _share("synthetic_right_before", (pair.right for pair in synthetic)),
        _share("synthetic_right_after", (pair.right for pair in synthetic if pair.passed)),
    ]


def duplicate_facts(truth: pa.Table, clusters: pa.Table) -> list[Fact]:
    """Pairs of downloaded images, counted.

    ``duplicate_recall`` is the share of true duplicate pairs that lie in one cluster, also for
    ``_exact`` (equal bytes) and ``_near`` pairs alone; ``duplicates_found`` and
    ``duplicates_missed`` are their numbers. ``wrongly_merged`` is the number of pairs in one
    cluster that show different scenes, of all pairs in one cluster.
    """
    known = {row["url"]: row for row in truth.to_pylist()}
    cluster_of = {row["url"]: row["cluster_id"] for row in clusters.to_pylist()}
    images = [(known[url], cluster) for url, cluster in cluster_of.items() if url in known]
    exact = [(row, cluster) for row, cluster in images if row["duplicate_kind"] != "near"]
    every = _pairs(row["duplicate_group"] for row, _ in images)
    found = _pairs((cluster, row["duplicate_group"]) for row, cluster in images)
    every_exact = _pairs(row["duplicate_group"] for row, _ in exact)
    found_exact = _pairs((cluster, row["duplicate_group"]) for row, cluster in exact)
    merged = _pairs(cluster for _, cluster in images)
    alike = _pairs((cluster, row["scene"]) for row, cluster in images)
    return [
        _ratio("duplicate_recall", found, every),
        _ratio("duplicate_recall_exact", found_exact, every_exact),
        _ratio("duplicate_recall_near", found - found_exact, every - every_exact),
        Fact("duplicates_found", found, every),
        Fact("duplicates_missed", every - found, every),
        Fact("wrongly_merged", merged - alike, merged),
    ]


def _scenes(truth: pa.Table) -> dict[str, Scene | None]:
    return {
        url: None if scene is None else Scene.from_json(scene)
        for url, scene in zip(truth["url"].to_pylist(), truth["scene"].to_pylist(), strict=True)
    }


def _judge(scenes: Mapping[str, Scene | None], pairs: pa.Table) -> list[_Judged]:
    url_of_sample = {sample_id(url): url for url in scenes}
    judged = []
    for row in pairs.to_pylist():
        if row["url"] not in scenes or row["source"] not in ("web", "synthetic"):
            continue
        carrier = url_of_sample.get(row.get("carried_by"), row["url"])
        judged.append(
            _Judged(
                source=row["source"],
                right=_right(scenes[row["url"]], row["text"]),
                right_in_use=_right(scenes[carrier], row["text"]),
                passed=bool(row["passed"]),
                used=row["state"] in ("kept", "merged"),
            )
        )
    return judged


@lru_cache(maxsize=1 << 16)
def _right(scene: Scene | None, text: str | None) -> bool:
    return scene is not None and text is not None and is_true(scene, text)


def _pairs(keys: Iterable[Hashable]) -> int:
    """How many unordered pairs of items have equal keys."""
    return sum(count * (count - 1) // 2 for count in Counter(keys).values())


def _share(metric: str, held: Iterable[bool]) -> Fact:
    values = list(held)
    return _ratio(metric, sum(values), len(values))


def _ratio(metric: str, count: int, n: int) -> Fact:
    return Fact(metric, count / n if n else math.nan, n)
