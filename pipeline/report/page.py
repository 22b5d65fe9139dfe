"""The parts of the page that are about the run as a whole: head, verdicts, time, settings."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import yaml
from markupsafe import Markup

from pipeline.report.charts import interval
from pipeline.report.collect import RoundFacts, RunFacts
from pipeline.report.funnel import USED
from pipeline.report.safe import masked, plain
from pipeline.report.words import STAGES, figure
from pipeline.runfolder import STAGES as ORDER
from pipeline.status import Key
from pipeline.terminal import duration


@dataclass(frozen=True)
class Headline:
    """One of the few numbers that say it all."""

    label: str
    before: str
    """Empty where there is nothing to compare with."""
    after: str
    note: str
    tone: str = ""
    """good or bad, of the step."""


@dataclass(frozen=True)
class Head:
    """Top of the page."""

    title: str
    url: str
    state: str
    complete: bool
    facts: tuple[tuple[str, str], ...]
    headlines: tuple[Headline, ...]


@dataclass(frozen=True)
class Verdict:
    """The gate's word on one model of one round."""

    round: int
    model: str
    metric: str
    old: str
    new: str
    svg: Markup
    interval: str
    items: str
    promoted: bool
    reason: str


@dataclass(frozen=True)
class StageTime:
    """How long a stage worked, a cell a round."""

    name: str
    meaning: str
    cells: tuple[str, ...]


def head(facts: RunFacts) -> Head:
    """Title, moment and headline numbers of the run."""
    url = masked(facts.status.url)
    following = facts.status.next
    complete = following.startswith("nothing")
    done = sum(round_.status.complete for round_ in facts.rounds)
    told = [
        ("Begun", _moment(facts.begun or facts.status.created)),
        ("Last work", _moment(facts.ended)),
        ("Time at work", duration(facts.seconds) if facts.ended else ""),
        ("Rounds done", f"{done} of {max(_planned(facts), len(facts.rounds))}"),
        ("capfilt", plain(facts.versions.get("capfilt", ""), 40)),
    ]
    return Head(
        title=plain(url.rstrip("/").rpartition("/")[2] or url, 60),
        url=plain(url, 200),
        state="complete" if complete else f"next: {plain(following, 60)}",
        complete=complete,
        facts=tuple((name, value) for name, value in told if value),
        headlines=tuple(headlines(facts.rounds)),
    )


def _planned(facts: RunFacts) -> int:
    first = facts.rounds[0].number if facts.rounds else 0
    return 0 if facts.status.last_round is None else facts.status.last_round - first + 1


def _moment(seconds: float | None) -> str:
    if seconds is None:
        return ""
    moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


# ---- headlines -------------------------------------------------------------------------------


def headlines(rounds: Sequence[RoundFacts]) -> list[Headline]:
    """The few numbers, as far as the run has them."""
    made = (_wrong(rounds), _recall(rounds), _pairs(rounds), _duplicates(rounds))
    return [headline for headline in made if headline is not None]


def _values(rounds: Sequence[RoundFacts], *keys: Key) -> list[tuple[RoundFacts, float]]:
    """(round, value) of the first of the keys that is known, finite values only."""
    for key in keys:
        found = [(f, f.metrics[key].value) for f in rounds if key in f.metrics]
        usable = [(f, value) for f, value in found if isfinite(value)]
        if usable:
            return usable
    return []


def _wrong(rounds: Sequence[RoundFacts]) -> Headline | None:
    before = _values(rounds, ("truth", "data", "wrong_before"))
    after = _values([f for f in rounds if f.bootstrapped], ("truth", "data", "wrong_after"))
    if not before:
        return None
    noise = before[-1][1]
    if not after:
        return Headline(
            "Wrong texts", "", figure(noise, "share"), "of the web texts, not filtered yet"
        )
    left = after[-1][1]
    note = "of the texts as downloaded → of all texts trained with"
    return Headline(
        "Wrong texts", figure(noise, "share"), figure(left, "share"), note, _tone(noise - left)
    )


def _recall(rounds: Sequence[RoundFacts]) -> Headline | None:
    for split in ("test", "dev"):
        found = _values(rounds, (split, "med", "tr_at_1"))
        if found:
            break
    else:
        return None
    (first, raw), (last, best) = found[0], found[-1]
    images = _values(rounds, (split, "med", "ir_at_1"))
    if first is last or first.bootstrapped:
        return Headline(
            "Retrieval R@1", "", figure(best, "share"), f"text retrieval on the {split} probe"
        )
    note = f"text retrieval, {split} probe: raw pairs → bootstrapped"
    if len(images) > 1:
        both = (figure(images[0][1], "share"), figure(images[-1][1], "share"))
        note += f"; image retrieval {both[0]} → {both[1]}"
    return Headline(
        "Retrieval R@1", figure(raw, "share"), figure(best, "share"), note, _tone(best - raw)
    )


def _pairs(rounds: Sequence[RoundFacts]) -> Headline | None:
    facts = next((f for f in reversed(rounds) if f.ledger), None)
    if facts is None:
        return None
    used = {source: facts.count("pairs", source, *USED) for source in ("web", "synthetic", "human")}
    told = ", ".join(f"{n:,} {source}" for source, n in used.items() if n)
    note = f"of {facts.count('pairs'):,}: {told}"
    return Headline("Pairs to train with", "", f"{sum(used.values()):,}", note)


def _duplicates(rounds: Sequence[RoundFacts]) -> Headline | None:
    facts = next((f for f in reversed(rounds) if f.clusters is not None), None)
    if facts is None or facts.clusters is None:
        return None
    clusters = facts.clusters
    note = f"in {clusters.groups:,} clusters, among {clusters.images:,} images"
    found = facts.metrics.get(("truth", "data", "duplicates_found"))
    missed = facts.metrics.get(("truth", "data", "duplicates_missed"))
    if found is not None and missed is not None:
        pairs = f"{found.value:,.0f} of {found.value + missed.value:,.0f}"
        note += f"; {pairs} true duplicate pairs found"
    return Headline("Duplicate images", "", f"{clusters.duplicates:,}", note)


def _tone(gain: float) -> str:
    return "good" if gain > 0 else "bad" if gain < 0 else ""


# ---- verdicts and time -----------------------------------------------------------------------


def verdicts(rounds: Sequence[RoundFacts]) -> list[Verdict]:
    """Every verdict of the gate, in order."""
    return [
        _verdict(facts.number, model, found)
        for facts in rounds
        for model, found in facts.status.verdicts.items()
    ]


def _verdict(number: int, model: str, found: Mapping[str, Any]) -> Verdict:
    low, high, step = (_real(found.get(name)) for name in ("low", "high", "difference"))
    promoted = found.get("promoted") is True
    svg, span = Markup(""), ""
    if low is not None and high is not None and step is not None:
        span = f"{step:+.3f} [{low:+.3f}, {high:+.3f}]".replace("-", "−")
        svg = interval(f"difference {span}", low, high, step, promoted)
    items = found.get("items")
    return Verdict(
        round=number,
        model=plain(model, 40),
        metric=plain(found.get("metric") or "", 40),
        old=figure(_real(found.get("old")), "number"),
        new=figure(_real(found.get("new")), "number"),
        svg=svg,
        interval=span,
        items=f"{items:,}" if isinstance(items, int) else "",
        promoted=promoted,
        reason=plain(masked(str(found.get("reason", ""))), 300),
    )


def _real(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and isfinite(value) else None


def times(rounds: Sequence[RoundFacts]) -> list[StageTime]:
    """How long each stage worked in each round."""
    stages = [{stage.name: stage for stage in facts.status.stages} for facts in rounds]
    found = []
    for name in ORDER:
        if not any(name in round_ for round_ in stages):
            continue
        cells = []
        for round_ in stages:
            stage = round_.get(name)
            if stage is None:
                cells.append("")
            elif stage.reused:
                cells.append("as before")
            elif stage.complete:
                cells.append(duration(stage.seconds))
            else:
                cells.append(f"{stage.done} of {stage.total}")
        found.append(StageTime(name, STAGES.get(name, ""), tuple(cells)))
    return found


# ---- settings --------------------------------------------------------------------------------

_SETTINGS = (
    ("Sources", "sources"),
    ("Human pairs", "human"),
    ("Development probe", "dev"),
    ("Test probe", "test"),
    ("Seed", "seed"),
    ("Relabel", "rounds.relabel"),
    ("Shard size", "ingest.shard_size"),
    ("Image size", "download.image_size"),
    ("First captioner", "caption.model"),
    ("First filter", "filter.model"),
    ("Sampling", "caption.generation.method"),
    ("Threshold, web texts", "select.threshold"),
    ("Threshold, synthetic texts", "select.synthetic_threshold"),
    ("Same picture from a cosine of", "dedup.semantic_cosine"),
    ("Images that may share a text", "select.text_cap"),
    ("Pretraining steps", "pretrain.steps"),
    ("Batch size", "pretrain.batch_size"),
    ("Learning rate", "pretrain.lr"),
)


def settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The settings that matter most, as (name, value); ``config`` is masked already."""
    found = []
    for label, path in _SETTINGS:
        value = setting(config, path)
        if path in ("caption.model", "filter.model") and config and value is None:
            value = "pretrained in round 0"
        if isinstance(value, list):
            paths = [item.get("path") if isinstance(item, Mapping) else item for item in value]
            value = ", ".join(map(str, paths))
        if value not in (None, ""):
            found.append((label, plain(value, 160)))
    return found


def setting(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def whole_config(config: Mapping[str, Any]) -> str:
    """All settings as YAML, a line each."""
    if not config:
        return ""
    lines = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=1000).splitlines()
    return "\n".join(
        " " * (len(line) - len(line.lstrip(" "))) + plain(line, 400) for line in lines[:2000]
    )
