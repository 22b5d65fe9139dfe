"""How far a run is, from its records and plans alone: no Ray, nothing started, nothing written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline import lease
from pipeline.records import Record
from pipeline.runfolder import Round, read_rounds, tables
from pipeline.store import Store
from pipeline.terminal import breakdown, clean, duration, grid

_KEY_METRICS = (
    ("test", "med", "tr_at_1"),
    ("test", "med", "ir_at_1"),
    ("test", "captioner", "cider"),
    ("test", "captioner", "bleu4"),
    ("test", "filter", "auc"),
    ("test", "filter", "precision"),
    ("test", "filter", "recall"),
)
"""(split, model, metric) worth a line; of the split ``truth`` all are."""

_LAST = 5
"""Rounds beside the first of which figures are printed: as many as leave room for numbers of seven
digits on a screen of 100 columns."""

_MEASURING = ("ledger", "evaluate", "audit")
"""Stages whose output holds a round's figures."""

Key = tuple[str, str, str]


@dataclass(frozen=True)
class StageStatus:
    """One stage of one round."""

    name: str
    done: int
    """Records published, of ``total`` planned."""
    total: int
    counts: Mapping[str, int]
    """Rows by status, where the stage tells."""
    seconds: float
    """Time during which at least one of its records was at work."""
    finished: float
    """When its last record was published, seconds since the epoch; 0 before the first."""
    reused: bool
    """An earlier round already had all of it: this round had nothing to do."""

    @property
    def complete(self) -> bool:
        return self.done == self.total


@dataclass(frozen=True)
class Figures:
    """What a round has come to."""

    number: int
    metrics: Mapping[Key, float]
    """(split, model, metric) → value."""
    pairs: Mapping[tuple[str, str], int]
    """(source, state) → pairs, from the ledger."""


@dataclass(frozen=True)
class RoundStatus(Figures):
    """One round that was begun."""

    stages: tuple[StageStatus, ...]
    verdicts: Mapping[str, Mapping[str, Any]]
    """Model → the gate's verdict; empty before the gate."""

    @property
    def complete(self) -> bool:
        """Everything planned is published, and the gate has spoken where models were trained."""
        trained = any(stage.name == "pretrain" for stage in self.stages)
        done = all(stage.complete for stage in self.stages)
        return done and (bool(self.verdicts) or not trained)

    @property
    def next_stage(self) -> StageStatus | None:
        return next((stage for stage in self.stages if not stage.complete), None)


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment."""

    url: str
    created: float | None
    last_round: int | None
    """Number of the last round that the config asks for; None if run.json is not there."""
    rounds: tuple[RoundStatus, ...]
    driver: str | None = None
    """Who holds the run, from `pipeline.lease`."""

    @property
    def next(self) -> str:
        """What a run would do next, in words."""
        for status in self.rounds:
            stage = status.next_stage
            if stage is not None:
                left = stage.total - stage.done
                more = f", {left} of {stage.total} shards left" if stage.total > 1 else ""
                return f"round {status.number}, {stage.name}{more}"
            if not status.complete:
                return f"round {status.number}, gate"
        following = self.rounds[-1].number + 1 if self.rounds else 0
        if self.last_round is None or following <= self.last_round:
            return f"round {following}"
        return "nothing; all rounds are done"


def read_status(store: Store) -> RunStatus:
    """The run in ``store``.

    Raises:
        StoreError: it cannot be read.
    """
    rounds = read_rounds(store)
    published = store.record_names()
    wanted = {name for round_ in rounds for names in round_.records.values() for name in names}
    records = {record.name: record for record in store.read_records(wanted & published)}
    described = store.read_json("run.json") or {}
    count = described.get("config", {}).get("rounds", {}).get("count")
    return RunStatus(
        url=store.url,
        created=described.get("created"),
        last_round=count,
        rounds=tuple(
            _round(store, round_, records, earlier)
            for round_, earlier in zip(rounds, _before(rounds), strict=True)
        ),
        driver=lease.driver(store),
    )


def read_figures(store: Store) -> list[Figures]:
    """Of every round that was begun, from the few records that hold them, however many shards
    there are. Raises as `read_status`."""
    published = store.record_names()
    found = []
    for round_ in read_rounds(store):
        records = {
            stage: store.read_records(published.intersection(round_.records.get(stage, ())))
            for stage in _MEASURING
        }
        found.append(_figures_of(store, round_, records))
    return found


def _figures_of(store: Store, round_: Round, records: Mapping[str, Sequence[Record]]) -> Figures:
    return Figures(
        number=round_.number,
        metrics=_metrics(store, [*records.get("evaluate", ()), *records.get("audit", ())]),
        pairs=_pairs(store, records.get("ledger", ())),
    )


def _before(rounds: Sequence[Round]) -> Iterator[set[str]]:
    """For each round the records that earlier rounds had."""
    seen: set[str] = set()
    for round_ in rounds:
        yield set(seen)
        seen.update(name for names in round_.records.values() for name in names)


def _round(
    store: Store, round_: Round, records: Mapping[str, Record], earlier: set[str]
) -> RoundStatus:
    found = {
        stage: [records[name] for name in names if name in records]
        for stage, names in round_.records.items()
    }
    stages = tuple(
        _stage(stage, found[stage], names, earlier)
        for stage, names in round_.records.items()
        if stage != "sources"
    )
    figures = _figures_of(store, round_, found)
    return RoundStatus(
        number=figures.number,
        metrics=figures.metrics,
        pairs=figures.pairs,
        stages=stages,
        verdicts=_verdicts(store, found.get("gate", ())),
    )


def _stage(
    name: str, records: Sequence[Record], planned: Sequence[str], earlier: set[str]
) -> StageStatus:
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record.counts)
    return StageStatus(
        name=name,
        done=len(records),
        total=len(planned),
        counts=dict(counts),
        seconds=covered((record.started, record.finished) for record in records),
        finished=max((record.finished for record in records), default=0.0),
        reused=bool(planned) and earlier.issuperset(planned),
    )


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of the spans: pauses between interrupted runs do not count."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _verdicts(store: Store, records: Sequence[Record]) -> dict[str, Any]:
    for record in records:
        for payload in record.payloads:
            if payload.path.endswith("gate.json"):
                decision = json.loads(store.read_bytes(payload.path)).get("decision", {})
                return dict(decision)
    return {}


def _metrics(store: Store, records: Sequence[Record]) -> dict[Key, float]:
    return {
        (row["split"], row["model"], row["metric"]): row["value"]
        for row in _rows(store, records, "metrics")
    }


def _pairs(store: Store, records: Sequence[Record]) -> dict[tuple[str, str], int]:
    return {
        (row["source"], row["state"]): row["count"]
        for row in _rows(store, records, "ledger")
        if row["account"] == "pairs"
    }


def _rows(store: Store, records: Sequence[Record], table: str) -> Iterator[dict[str, Any]]:
    for record in records:
        for published in tables(record):
            if published.table == table:
                yield from store.read_table(published.payload).to_pylist()


# ---- on the screen ---------------------------------------------------------------------------


def print_status(status: RunStatus, out: Console) -> None:
    """The whole run: every stage of every round, then the figures."""
    begun = f"begun {_moment(status.created)}, " if status.created else ""
    done = sum(round_.complete for round_ in status.rounds)
    out.print(Text(clean(status.url)))
    out.print(Text(f"{begun}{done} of {_planned(status)} rounds done"))
    if status.driver is not None:
        out.print(Text(f"driver: {clean(status.driver)}"))
    for round_ in status.rounds:
        out.print()
        _print_round(round_, out)
    out.print()
    out.print(Text(f"next: {status.next}"))
    print_figures(status.rounds, out)


def _planned(status: RunStatus) -> int:
    first = status.rounds[0].number if status.rounds else 0
    begun = len(status.rounds)
    return begun if status.last_round is None else max(begun, status.last_round - first + 1)


def _moment(seconds: float) -> str:
    import datetime

    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _print_round(round_: RoundStatus, out: Console) -> None:
    stage = round_.next_stage
    where = "complete" if round_.complete else f"at {stage.name if stage else 'gate'}"
    table = grid(f"round {round_.number}", "done", "took", where, right=frozenset({"done", "took"}))
    for stage in round_.stages:
        took = duration(stage.seconds) if stage.done and not stage.reused else ""
        table.add_row(
            Text(clean(stage.name)),
            Text(f"{stage.done}/{stage.total}"),
            Text(took),
            Text("as before" if stage.reused else breakdown(dict(stage.counts))),
        )
    out.print(table)
    for model, verdict in round_.verdicts.items():
        out.print(Text(f"{clean(model)}: {clean(verdict.get('reason', ''))}"))


def print_figures(rounds: Sequence[Figures], out: Console) -> None:
    """Pairs by state and the key metrics, a column a round; of many rounds the first and the last.
    Nothing where there are none."""
    told = [*rounds] if len(rounds) <= 1 + _LAST else [rounds[0], None, *rounds[-_LAST:]]
    columns = ["…" if round_ is None else f"round {round_.number}" for round_ in told]
    numbers = frozenset(columns)
    pairs = grid("pairs", *columns, right=numbers)
    for key in sorted({key for round_ in rounds for key in round_.pairs}):
        counts = [None if round_ is None else round_.pairs.get(key) for round_ in told]
        cells = [Text("" if count is None else f"{count:,}") for count in counts]
        pairs.add_row(Text(clean(" ".join(key))), *cells)
    metrics = grid("metric", *columns, right=numbers)
    for metric in _shown(rounds):
        values = [None if round_ is None else round_.metrics.get(metric) for round_ in told]
        metrics.add_row(Text(clean(" ".join(metric))), *map(Text, _written(values)))
    for table in (pairs, metrics):
        if table.row_count:
            out.print()
            out.print(table)


def _shown(rounds: Sequence[Figures]) -> list[Key]:
    known = dict.fromkeys(key for round_ in rounds for key in round_.metrics)
    truth = [key for key in known if key[0] == "truth"]
    return [*(key for key in _KEY_METRICS if key in known), *truth]


def _written(values: Sequence[float | None]) -> list[str]:
    """One metric over the rounds: counts without decimals, shares with three."""
    numbers = [value for value in values if value is not None and isfinite(value)]
    counts = all(value.is_integer() for value in numbers) and any(v > 1 for v in numbers)
    places = 0 if counts else 3
    return [
        "" if value is None else f"{value:,.{places}f}" if isfinite(value) else "–"
        for value in values
    ]
