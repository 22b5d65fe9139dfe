"""Metrics by round as tables and charts, and the loss curves of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

from markupsafe import Markup

from pipeline.report.charts import Series, line_chart, swatch
from pipeline.report.collect import LOSSES, TRAINING, Metric, RoundFacts
from pipeline.report.safe import plain
from pipeline.report.words import METRICS, MODELS, Kind, change, figure, word
from pipeline.status import Key

_SPLITS: Mapping[str, str] = {
    "truth": "Measured against the truth of the sample world",
    "test": "On the test probe, which decides nothing",
    "dev": "On the development probe, on which the gate decides",
}


@dataclass(frozen=True)
class Row:
    """One metric over the rounds."""

    title: str
    meaning: str
    cells: tuple[str, ...]
    change: str
    tone: str
    """good, bad or nothing: of the step from the first to the last round."""
    n: str


@dataclass(frozen=True)
class Group:
    """The metrics of one model on one split."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Chart:
    """A drawing with its words."""

    title: str
    meaning: str
    svg: Markup
    legend: tuple[tuple[Markup, str], ...]


@dataclass(frozen=True)
class Split:
    """All metrics of one split."""

    name: str
    title: str
    charts: tuple[Chart, ...]
    groups: tuple[Group, ...]


def round_style(number: int, count: int) -> tuple[str, float]:
    """Colour and strength of a round: grey for raw pairs, then ever stronger."""
    if number == 0:
        return "raw", 1.0
    return "boot", 1.0 if count <= 2 else 0.45 + 0.55 * number / (count - 1)


# ---- tables ----------------------------------------------------------------------------------


def splits(rounds: Sequence[RoundFacts]) -> list[Split]:
    """Every figure of every round, by split and model; charts of the main ones on the split that
    is reported."""
    keys = dict.fromkeys(key for facts in rounds for key in facts.metrics)
    drawn = {"truth", "test" if any(split == "test" for split, _, _ in keys) else "dev"}
    names = [*_SPLITS, *sorted({split for split, _, _ in keys} - _SPLITS.keys())]
    found = []
    for split in names:
        models = [*MODELS, *sorted({m for s, m, _ in keys if s == split} - MODELS.keys())]
        groups = (_group(rounds, [k for k in keys if k[:2] == (split, m)], m) for m in models)
        filled = tuple(group for group in groups if group.rows)
        if filled:
            name = plain(split, 40)
            charts = tuple(_charts(rounds, split)) if split in drawn else ()
            found.append(Split(name, _SPLITS.get(split, name), charts, filled))
    return found


def _group(rounds: Sequence[RoundFacts], keys: Sequence[Key], model: str) -> Group:
    order = {metric: index for index, metric in enumerate(METRICS)}
    ordered = sorted(keys, key=lambda key: (order.get(key[2], len(order)), key[2]))
    title = MODELS.get(model, plain(model, 40))
    return Group(title, tuple(_row(rounds, key) for key in ordered))


def _row(rounds: Sequence[RoundFacts], key: Key) -> Row:
    known = word(plain(key[2], 60))
    values = [_metric(facts, key) for facts in rounds]
    cells = tuple(figure(v.value if v else None, known.kind) or "–" for v in values)
    numbers = [v.value for v in values if v is not None and isfinite(v.value)]
    step, tone = "", ""
    if len(numbers) > 1:
        step = change(numbers[0], numbers[-1], known.kind)
        gain = (numbers[-1] - numbers[0]) * known.better
        tone = "good" if gain > 0 else "bad" if gain < 0 else ""
    n = next((v.n for v in reversed(values) if v is not None), None)
    return Row(known.title, known.meaning, cells, step, tone, f"{n:,}" if n is not None else "")


def _metric(facts: RoundFacts, key: Key) -> Metric | None:
    """A figure of a round. Of a raw round, what a filter or dedup did is nobody's merit: none."""
    split, _, metric = key
    if split == "truth" and not facts.bootstrapped and not metric.startswith("wrong_"):
        return None
    return facts.metrics.get(key)


# ---- charts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """One chart of metrics by round."""

    title: str
    meaning: str
    lines: tuple[tuple[str, str, str], ...]
    """(model, metric, name)."""
    truth: bool = False
    kind: Kind = "share"


_PLANS = (
    _Plan(
        "Wrong texts",
        "Share of wrong texts: as downloaded, and among those trained with. Lower is better.",
        (("data", "wrong_before", "before"), ("data", "wrong_after", "after")),
        truth=True,
    ),
    _Plan(
        "Text retrieval, TR@1",
        "Share of images whose own text is ranked first.",
        (("med", "tr_at_1", "MED"), ("filter", "tr_at_1", "filter")),
    ),
    _Plan(
        "Image retrieval, IR@1",
        "Share of texts whose own image is ranked first.",
        (("med", "ir_at_1", "MED"), ("filter", "ir_at_1", "filter")),
    ),
    _Plan(
        "Captions, CIDEr",
        "Agreement with human captions, 0 to 10.",
        (("captioner", "cider", "captioner"),),
        kind="number",
    ),
    _Plan(
        "Captions, BLEU-4",
        "Share of four-word runs in common with human captions.",
        (("captioner", "bleu4", "captioner"),),
        kind="number",
    ),
    _Plan(
        "Filter, AUC",
        "Chance that a right text scores above a wrong one; 50% is guessing.",
        (
            ("filter", "auc", "all"),
            ("filter", "auc_near", "near misses"),
            ("filter", "auc_other", "other texts"),
        ),
    ),
    _Plan(
        "Filter at its threshold, on probes",
        "Precision: right among those that pass. Recall: passing among the right.",
        (("filter", "precision", "precision"), ("filter", "recall", "recall")),
    ),
    _Plan(
        "Filter at its threshold, on web texts",
        "The same on the web texts, against the truth.",
        (("data", "filter_precision", "precision"), ("data", "filter_recall", "recall")),
        truth=True,
    ),
    _Plan(
        "Synthetic texts that are right",
        "Share of right captions, before and after the filter.",
        (
            ("data", "synthetic_right_before", "before"),
            ("data", "synthetic_right_after", "after"),
        ),
        truth=True,
    ),
)


def _charts(rounds: Sequence[RoundFacts], split: str) -> list[Chart]:
    """The main figures over the rounds; nothing before there are two rounds to compare."""
    plans = (plan for plan in _PLANS if plan.truth == (split == "truth"))
    charts = (_metric_chart(rounds, plan, split) for plan in plans)
    return [chart for chart in charts if chart is not None]


def _metric_chart(rounds: Sequence[RoundFacts], plan: _Plan, split: str) -> Chart | None:
    series = []
    styles = iter(("c1", "c2", "c3"))
    for model, metric, name in plan.lines:
        found = [(f.number, _metric(f, (split, model, metric))) for f in rounds]
        points = [(float(n), m.value) for n, m in found if m is not None and isfinite(m.value)]
        style = "raw" if name == "before" else next(styles)
        if points:
            series.append(Series(name, points, style))
    places = sorted({x for line in series for x, _ in line.points})
    if len(places) < 2:
        return None
    share = plan.kind == "share"
    # From zero, so that small differences look small.
    bounds = (0.0, 1.0) if share else (0.0, max(y for line in series for _, y in line.points))
    names = {x: f"round {x:.0f}" for x in places}
    svg = line_chart(plan.title, series, percent=share, bounds=bounds, x_labels=names)
    legend = [(swatch(s.style), s.name) for s in series]
    return Chart(plan.title, plan.meaning, svg, tuple(legend))


# ---- losses ----------------------------------------------------------------------------------

_STAGES: Mapping[str, str] = dict(
    zip(TRAINING, ("Pretraining", "Captioner", "Filter"), strict=True)
)
_LOSSES: Mapping[str, tuple[str, str]] = {
    "loss_itc": ("ITC", "contrastive: tell an image's text from those of other images"),
    "loss_itm": ("ITM", "matching: does this text belong to this image"),
    "loss_lm": ("LM", "language modelling: write the text, a token at a time"),
    "loss": ("loss", "sum of the losses"),
}
_CHANCE = 0.6365
"""Of the ITM loss in pretraining: one pair of three matches, entropy of (1/3, 2/3)."""


def loss_charts(rounds: Sequence[RoundFacts]) -> list[Chart]:
    """One chart for each loss of each training stage, with a line a round."""
    charts = []
    for stage in TRAINING:
        known = [name for name in LOSSES if any((stage, name) in f.losses for f in rounds)]
        # The sum says something of its own only where its parts are not known.
        wanted = [name for name in known if name != "loss"] or known
        charts += [_loss_chart(rounds, stage, name) for name in wanted]
    return charts


def _loss_chart(rounds: Sequence[RoundFacts], stage: str, loss: str) -> Chart:
    title, meaning = _LOSSES[loss]
    last = max(facts.number for facts in rounds)
    trained = [facts for facts in rounds if (stage, loss) in facts.losses]
    series = [
        Series(
            f"round {facts.number}", facts.losses[stage, loss], *round_style(facts.number, last + 1)
        )
        for facts in trained
    ]
    name = f"{_STAGES[stage]}, {title}"
    reference = (_CHANCE, "chance") if (stage, loss) == ("pretrain", "loss_itm") else None
    svg = line_chart(name, series, x_title="steps", reference=reference)
    return Chart(name, meaning, svg, tuple((swatch(s.style, s.strength), s.name) for s in series))
