"""Figures that can be counted by hand."""

from __future__ import annotations

import math

import pyarrow as pa

from stages.ids import sample_id
from stages.scenes.audit import audit
from stages.scenes.scene import Scene, Thing
from stages.scenes.world import TRUTH

RED = Scene((Thing("red", "circle", "left"),), "white")
BLUE = Scene((Thing("blue", "star", "top"),), "black")


def truth_of(*images: tuple[str, Scene | None, int, str]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {
                "url": url,
                "caption": "",
                "is_true": False,
                "text_kind": "spam",
                "scene": scene and scene.to_json(),
                "fault": "ok",
                "duplicate_group": group,
                "duplicate_kind": kind,
            }
            for url, scene, group, kind in images
        ],
        schema=TRUTH,
    )


def pairs_of(*pairs: tuple[str, str, str, bool | None, str, str | None]) -> pa.Table:
    names = ("url", "source", "text", "passed", "state", "carried_by")
    kinds = (pa.string(), pa.string(), pa.string(), pa.bool_(), pa.string(), pa.string())
    schema = pa.schema(list(zip(names, kinds, strict=True)))
    return pa.Table.from_pylist([dict(zip(names, pair, strict=True)) for pair in pairs], schema)


def clusters_of(**cluster_of: str) -> pa.Table:
    return pa.table({"url": list(cluster_of), "cluster_id": list(cluster_of.values())})


TRUTH_TABLE = truth_of(
    ("a", RED, 1, "none"),
    ("b", RED, 1, "exact"),
    ("c", RED, 1, "near"),
    ("d", BLUE, 2, "none"),
    ("p", None, 3, "none"),
)
PAIRS_TABLE = pairs_of(
    ("a", "web", "a red circle", True, "kept", None),
    ("b", "web", "a red circle on white", True, "merged", sample_id("a")),
    ("c", "web", "a red circle on a white background", True, "duplicate", None),
    ("d", "web", "a blue star on black", False, "rejected", None),
    ("d", "web", "free pills", True, "kept", None),
    ("p", "web", "a red circle", None, "failed", None),
    ("a", "synthetic", "a green circle", True, "kept", None),
    ("d", "synthetic", "a blue star", True, "merged", sample_id("a")),
    ("b", "synthetic", "red circle", True, "kept", None),
    ("c", "synthetic", "a blue circle", False, "rejected", None),
    ("c", "synthetic", None, None, "failed", None),
    (None, "human", "a red circle", None, "kept", None),
    ("elsewhere", "web", "a photo of a cat", True, "kept", None),
)
CLUSTERS_TABLE = clusters_of(a="1", b="1", c="2", d="1", p="3", elsewhere="4")


def test_texts_are_judged_against_the_picture_that_carries_them() -> None:
    facts = {f.metric: f for f in audit(TRUTH_TABLE, PAIRS_TABLE, CLUSTERS_TABLE)}
    assert facts["wrong_before"][1:] == (2 / 6, 6)
    # Web: two of three used texts are right. Synthetic: the star was merged onto the circle.
    assert facts["wrong_after_web"][1:] == (1 / 3, 3)
    assert facts["wrong_after_synthetic"][1:] == (2 / 3, 3)
    assert facts["wrong_after"][1:] == (3 / 6, 6)


def test_the_filter_is_judged_on_the_picture_of_the_text_itself() -> None:
    facts = {f.metric: f for f in audit(TRUTH_TABLE, PAIRS_TABLE, CLUSTERS_TABLE)}
    assert facts["filter_precision"][1:] == (3 / 4, 4)
    assert facts["filter_recall"][1:] == (3 / 4, 4)
    assert facts["synthetic_right_before"][1:] == (2 / 5, 5)
    assert facts["synthetic_right_after"][1:] == (2 / 3, 3)


def test_duplicate_pairs_found_missed_and_wrongly_merged() -> None:
    facts = {f.metric: f for f in audit(TRUTH_TABLE, PAIRS_TABLE, CLUSTERS_TABLE)}
    assert facts["duplicate_recall"][1:] == (1 / 3, 3)
    assert facts["duplicate_recall_exact"][1:] == (1.0, 1)
    assert facts["duplicate_recall_near"][1:] == (0.0, 2)
    assert facts["duplicates_found"][1:] == (1, 3)
    assert facts["duplicates_missed"][1:] == (2, 3)
    # Cluster 1 holds a, b and d: a-b is right, a-d and b-d are not.
    assert facts["wrongly_merged"][1:] == (2, 3)


def test_images_that_were_not_downloaded_are_no_missed_duplicates() -> None:
    facts = {f.metric: f for f in audit(TRUTH_TABLE, PAIRS_TABLE, clusters_of(a="1", d="2"))}
    assert facts["duplicates_missed"][1:] == (0, 0)


def test_shares_of_nothing_are_not_numbers() -> None:
    facts = audit(TRUTH_TABLE, PAIRS_TABLE.slice(0, 0), CLUSTERS_TABLE.slice(0, 0))
    assert all(math.isnan(f.value) == (f.metric.split("_")[0] in SHARES) for f in facts)


SHARES = ("wrong", "filter", "synthetic", "duplicate")


def test_without_carried_by_a_text_is_judged_on_its_own_picture() -> None:
    pairs = PAIRS_TABLE.drop_columns(["carried_by"])
    facts = {f.metric: f for f in audit(TRUTH_TABLE, pairs, CLUSTERS_TABLE)}
    assert facts["wrong_after_synthetic"][1:] == (1 / 3, 3)
