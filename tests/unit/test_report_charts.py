from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from pipeline.report.charts import (
    Scale,
    Series,
    histogram,
    interval,
    line_chart,
    swatch,
    tick_labels,
    ticks,
)

HOSTILE = '"><script>alert(1)</script>&'


def parsed(svg: Markup) -> ElementTree.Element:
    """Well-formed XML, or it raises."""
    return ElementTree.fromstring(str(svg))


def texts(svg: Markup) -> list[str]:
    return [node.text or "" for node in parsed(svg).iter("text")]


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 1.0]),
        (0.13, 0.47, [0.1, 0.2, 0.3, 0.4, 0.5]),
        (3.0, 3.0, [3.0, 4.0, 5.0, 6.0]),
        (-0.9, 7.9, [-2.5, 0.0, 2.5, 5.0, 7.5, 10.0]),
    ],
)
def test_ticks(low: float, high: float, marks: list[float]) -> None:
    assert ticks(low, high) == marks


def test_tick_labels_tell_the_ticks_apart() -> None:
    assert tick_labels([0.0, 0.25, 0.5], percent=True) == ["0%", "25%", "50%"]
    assert tick_labels([0.15, 0.155, 0.16], percent=False) == ["0.150", "0.155", "0.160"]
    assert tick_labels([2.0, 4.0], percent=False) == ["2", "4"]
    assert tick_labels([0.0, 0.025], percent=True) == ["0.0%", "2.5%"]


def test_a_scale_of_one_value_stays_in_the_middle() -> None:
    assert Scale(3, 3, 0, 100)(3) == 50


def test_a_chart_over_rounds() -> None:
    lines = [
        Series("MED", [(0, 0.2), (1, 0.9)], "c1"),
        Series("filter", [(0, 0.2), (1, 0.91)], "c2"),
    ]
    svg = line_chart("R@1", lines, True, (0, 1), {0: "round 0", 1: "round 1"})
    found = texts(svg)
    assert found[:5] == ["0%", "25%", "50%", "75%", "100%"]
    assert found[5:7] == ["round 0", "round 1"]
    assert sorted(found[7:]) == ["90%", "91%"]
    # Higher values stand higher, and the two last labels do not touch.
    root = parsed(svg)
    heights = [float(dot.get("cy", "")) for dot in root.iter("circle")]
    assert heights[0] > heights[1]
    labels = [float(t.get("y", "")) for t in root.iter("text") if "value" in t.get("class", "")]
    assert abs(labels[0] - labels[1]) >= 13


def test_a_chart_over_steps_with_a_reference() -> None:
    curve = Series("round 0", [(10, 0.64), (300, 0.5)], "raw", 0.5)
    svg = line_chart("ITM", [curve], x_title="steps", reference=(0.6365, "chance"))
    assert {"10", "300", "steps", "chance"} <= set(texts(svg))
    assert 'opacity="0.50"' in svg
    assert "chance" not in line_chart(
        "LM", [Series("r", [(1, 5), (2, 4)], "raw")], reference=(0.6, "chance")
    )


def test_nothing_to_draw() -> None:
    assert line_chart("x", [Series("a", [], "c1")]) == ""
    assert texts(line_chart("x", [Series("a", [(1, 2.0)], "c1")]))


def test_names_are_escaped() -> None:
    line = Series(HOSTILE, [(0, 1.0)], "c1")
    svg = line_chart(HOSTILE, [line], x_labels={0: HOSTILE}, reference=(1.0, HOSTILE))
    assert "<script" not in svg and parsed(svg).get("aria-label") == HOSTILE
    assert "<script" not in swatch(HOSTILE)


def test_a_histogram() -> None:
    svg = histogram("scores", [0, 4, 1, 0], "web", 0.5)
    bars = list(parsed(svg).iter("rect"))
    assert [float(bar.get("height", "")) for bar in bars] == [0.0, 96.0, 24.0, 0.0]
    assert ["pale" in bar.get("class", "") for bar in bars] == [True, True, False, False]
    assert "threshold 0.5" in texts(svg)
    assert "threshold" not in histogram("scores", [1], "web", None)


def test_an_interval_around_zero() -> None:
    svg = interval("difference", -0.1, 0.3, 0.1, promoted=True)
    zero, low, high = (
        float(re.search(rf'class="{kind}" x1="([\d.]+)" x2="([\d.]+)"', svg)[group])  # type: ignore[index]
        for kind, group in (("mark", 1), ("range", 1), ("range", 2))
    )
    assert low < zero < high and zero == 120
    assert 'class="bad"' in interval("difference", -0.3, -0.1, -0.2, promoted=False)
