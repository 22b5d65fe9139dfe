"""Charts as inline SVG: no script, no library. Colours and fonts come from the page's style.

Every text is escaped here, since the result goes into the page as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 320, 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 44, 10, 24
_APART = 13
"""Least distance of two labels, in units of the drawing."""


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """(x, y), ascending in x."""
    style: str
    """Class that gives the colour."""
    strength: float = 1.0
    """Opacity, for lines that share a colour."""


@dataclass(frozen=True)
class Scale:
    """A linear map from values to the drawing."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        share = (value - self.low) / span if span else 0.5
        return round(self.start + share * (self.end - self.start), 1)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round values from at or below ``low`` to at or above ``high``, in steps of 1, 2, 2.5
    or 5."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def line_chart(
    title: str,
    series: Sequence[Series],
    percent: bool = False,
    bounds: tuple[float, float] | None = None,
    x_labels: Mapping[float, str] | None = None,
    x_title: str = "",
    reference: tuple[float, str] | None = None,
) -> Markup:
    """Lines over a common x.

    Args:
        title: read out in place of the drawing.
        percent: y is a share, and shown as such.
        bounds: what the axis of y must cover at least, e.g. 0 to 1; None fits the data.
        x_labels: the few places of x, which get dots and values; None for a continuous x.
        reference: (y, name) of a dashed line, drawn where it lies within the axis.
    """
    xs = [x for line in series for x, _ in line.points]
    values = [y for line in series for _, y in line.points]
    if not values:
        return Markup("")
    low, high = bounds or (min(values), max(values))
    marks = ticks(min(low, *values), max(high, *values))
    y = Scale(marks[0], marks[-1], _HEIGHT - _BOTTOM, _TOP)
    right = _WIDTH - (_RIGHT if x_labels else 6)
    x = Scale(min(xs), max(xs), _LEFT + (14 if x_labels else 0), right)
    parts = [
        _grid(marks, y, percent, right + (6 if x_labels else 0)),
        _x_axis(x, x_labels, x_title),
    ]
    if reference is not None and marks[0] <= reference[0] <= marks[-1]:
        parts.append(_reference(y(reference[0]), reference[1], right))
    parts += [_line(line, x, y, percent, bool(x_labels)) for line in series if line.points]
    if x_labels:
        parts.append(_end_labels(series, x, y, percent))
    return _svg(title, parts, _WIDTH, _HEIGHT)


def _svg(title: str, parts: Sequence[Markup], width: int, height: int) -> Markup:
    start = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">')
    return start.format(width, height, title) + Markup("").join(parts) + Markup("</svg>")


def tick_labels(marks: Sequence[float], percent: bool) -> list[str]:
    """The marks with no more decimals than tell them apart."""
    values = [100 * mark for mark in marks] if percent else list(marks)
    places = next(
        (n for n in range(6) if all(abs(round(v, n) - v) < 1e-9 * (1 + abs(v)) for v in values)), 6
    )
    return [f"{value:,.{places}f}{'%' if percent else ''}" for value in values]


def _shown(value: float, percent: bool) -> str:
    if percent:
        return f"{value:.0%}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:,.1f}"


def _grid(marks: Sequence[float], y: Scale, percent: bool, right: float) -> Markup:
    line = Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>')
    label = Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>')
    return Markup("").join(
        line.format(_LEFT, right, y(mark), y(mark)) + label.format(_LEFT - 7, y(mark) + 4, name)
        for mark, name in zip(marks, tick_labels(marks, percent), strict=True)
    )


def _x_axis(x: Scale, labels: Mapping[float, str] | None, title: str) -> Markup:
    text = Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>')
    base = _HEIGHT - 6
    if labels is not None:
        every = math.ceil(len(labels) / 6)
        shown = list(labels.items())[::every]
        return Markup("").join(text.format(x(at), base, "middle", name) for at, name in shown)
    ends = text.format(x(x.low), base, "start", f"{x.low:,.0f}")
    ends += text.format(x(x.high), base, "end", f"{x.high:,.0f}")
    return ends + text.format((x.start + x.end) / 2, base, "middle", title)


def _reference(at: float, name: str, right: float) -> Markup:
    return Markup(
        '<line class="reference" x1="{}" x2="{}" y1="{}" y2="{}"/>'
        '<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>'
    ).format(_LEFT, right, at, at, right, at - 5, name)


def _line(line: Series, x: Scale, y: Scale, percent: bool, dots: bool) -> Markup:
    path = " ".join(f"{x(at)},{y(value)}" for at, value in line.points)
    drawn = Markup('<g class="{}" opacity="{}">').format(line.style, f"{line.strength:.2f}")
    drawn += Markup('<polyline class="line" points="{}"/>').format(path)
    if dots:
        dot = Markup('<circle class="dot" cx="{}" cy="{}" r="3.5"><title>{}: {}</title></circle>')
        drawn += Markup("").join(
            dot.format(x(at), y(value), line.name, _shown(value, percent))
            for at, value in line.points
        )
    return drawn + Markup("</g>")


def _end_labels(series: Sequence[Series], x: Scale, y: Scale, percent: bool) -> Markup:
    """The last value of each line, to the right of it, moved apart where they would touch."""
    label = Markup('<text class="value {}" x="{}" y="{}">{}</text>')
    lines = sorted((line for line in series if line.points), key=lambda s: y(s.points[-1][1]))
    placed: list[float] = []
    for line in lines:
        wanted = y(line.points[-1][1]) + 4
        placed.append(max(wanted, placed[-1] + _APART) if placed else wanted)
    overflow = max(0.0, placed[-1] - (_HEIGHT - _BOTTOM + 4)) if placed else 0.0
    return Markup("").join(
        label.format(
            line.style,
            x(line.points[-1][0]) + 9,
            at - overflow,
            _shown(line.points[-1][1], percent),
        )
        for line, at in zip(lines, placed, strict=True)
    )


def histogram(title: str, counts: Sequence[int], style: str, threshold: float | None) -> Markup:
    """Bars over 0 to 1, those below ``threshold`` pale, with a line at the threshold."""
    width, height, base, left = 420, 140, 116, 6
    most = max(counts, default=0) or 1
    across = (width - 2 * left) / max(len(counts), 1)
    bar = Markup(
        '<rect class="{}" x="{}" y="{}" width="{}" height="{}" rx="1.5">'
        "<title>{} – {}: {} texts</title></rect>"
    )
    parts = []
    for index, count in enumerate(counts):
        low, high = index / len(counts), (index + 1) / len(counts)
        tall = max(2.0, 96 * count / most) if count else 0.0
        pale = threshold is not None and (low + high) / 2 < threshold
        place = (f"{left + index * across + 1:.1f}", f"{base - tall:.1f}")
        size = (f"{across - 2:.1f}", f"{tall:.1f}")
        kind = f"column {style}{' pale' if pale else ''}"
        parts.append(bar.format(kind, *place, *size, f"{low:.3f}", f"{high:.3f}", f"{count:,}"))
    axis = Markup('<line class="axis" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>')
    parts.append(axis.format(left, width - left, base))
    tick = Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>')
    for value, anchor in ((0.0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle")):
        parts.append(
            tick.format(left + value * (width - 2 * left), base + 17, anchor, f"{value:g}")
        )
    parts.append(tick.format(width - left, base + 17, "end", "1"))
    if threshold is not None:
        parts.append(_threshold(left + threshold * (width - 2 * left), width, base, threshold))
    return _svg(title, parts, width, height)


def _threshold(at: float, width: int, base: float, threshold: float) -> Markup:
    side, shift = ("end", -6) if at > width * 0.7 else ("start", 6)
    return Markup(
        '<line class="mark" x1="{0}" x2="{0}" y1="6" y2="{1}"/>'
        '<text class="value" x="{2}" y="16" text-anchor="{3}">{4}</text>'
    ).format(f"{at:.1f}", base, f"{at + shift:.1f}", side, f"threshold {threshold:g}")


def interval(title: str, low: float, high: float, middle: float, promoted: bool) -> Markup:
    """A bootstrap interval around its mean, on an axis with zero in the middle."""
    width, height = 240, 28
    reach = max(abs(low), abs(high), abs(middle)) * 1.1 or 1.0
    x = Scale(-reach, reach, 4, width - 4)
    style = "good" if promoted else "bad"
    drawn = Markup(
        '<line class="axis" x1="4" x2="{right}" y1="14" y2="14"/>'
        '<line class="mark" x1="{zero}" x2="{zero}" y1="3" y2="25"/>'
        '<g class="{style}"><line class="range" x1="{low}" x2="{high}" y1="14" y2="14"/>'
        '<circle class="dot" cx="{middle}" cy="14" r="4.5"/></g>'
    ).format(right=width - 4, zero=x(0), style=style, low=x(low), high=x(high), middle=x(middle))
    return _svg(title, [drawn], width, height)


def swatch(style: str, strength: float = 1.0) -> Markup:
    """The colour of a line, for a legend."""
    return Markup('<i class="swatch {}" style="opacity:{}"></i>').format(
        escape(style), f"{strength:.2f}"
    )
