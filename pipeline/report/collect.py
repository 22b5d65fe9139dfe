"""What the report tells, read from a run folder: records, plans and the small tables.

Only published files are read, of large tables the columns that are needed; nothing is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.inspect import Query, View
from pipeline.records import Payload, Record
from pipeline.report.safe import masked_tree
from pipeline.runfolder import STAGES, Round, read_rounds, table_names, tables
from pipeline.status import Key, RoundStatus, RunStatus, covered, read_status
from pipeline.store import Store

POINTS = 160
"""Of a curve, at most."""
BINS = 40
"""Of the histogram of scores."""
_MANY = 100_000

TRAINING = ("pretrain", "finetune_captioner", "finetune_filter")
LOSSES = ("loss_itc", "loss_itm", "loss_lm", "loss")

Point = tuple[float, float]


@dataclass(frozen=True)
class Metric:
    """One figure of metrics.parquet."""

    value: float
    n: int | None
    """Over how many items."""


@dataclass(frozen=True)
class Clusters:
    """What dedup found in one round."""

    images: int
    duplicates: int
    """Images beyond the first of their cluster."""
    groups: int
    """Clusters of two images or more."""


@dataclass(frozen=True)
class RoundFacts:
    """One round, as far as it is."""

    number: int
    status: RoundStatus
    bootstrapped: bool
    """A filter is planned; False where the pairs are used raw."""
    views: Mapping[str, View]
    tars: Mapping[str, tuple[Payload, ...]]
    """Web shard → the tars of its images."""
    rows_in: Mapping[str, int]
    """web, human → rows that ingest cut: the left side of the rows' account."""
    pairs_in: Mapping[str, int]
    """web, synthetic, human → rows of pairs.parquet."""
    ledger: Mapping[tuple[str, str, str], int]
    """(account, source, state) → count; empty before the ledger is published."""
    metrics: Mapping[Key, Metric]
    losses: Mapping[tuple[str, str], Sequence[Point]]
    """(training stage, loss) → (step, value), at most `POINTS`."""
    clusters: Clusters | None

    def count(self, account: str, source: str | None = None, *states: str) -> int:
        """Rows or pairs of the ledger, of one source or all, in the given states or any."""
        return sum(
            count
            for (a, s, state), count in self.ledger.items()
            if a == account and source in (None, s) and (not states or state in states)
        )


@dataclass(frozen=True)
class RunFacts:
    """A run at one moment."""

    status: RunStatus
    config: Mapping[str, Any]
    """As in run.json, secrets masked; empty where there is none."""
    versions: Mapping[str, str]
    seconds: float
    """Time during which any part of the run was at work."""
    begun: float | None
    ended: float | None
    """First and last moment of any record, seconds since the epoch; None before the first."""
    rounds: tuple[RoundFacts, ...]


def read_facts(store: Store) -> RunFacts:
    """The run in ``store``, finished or not.

    Raises:
        StoreError: it cannot be read.
        UserError: a table cannot be read.
    """
    # First, so that a round which begins meanwhile is left out.
    planned = read_rounds(store)
    status = read_status(store)
    records = {record.name: record for record in store.read_records(store.record_names())}
    spans = [(record.started, record.finished) for record in records.values()]
    described = store.read_json("run.json") or {}
    return RunFacts(
        status=status,
        config=masked_tree(described.get("config") or {}),
        versions=masked_tree(described.get("versions") or {}),
        seconds=covered(spans),
        begun=min((start for start, _ in spans), default=None),
        ended=max((end for _, end in spans), default=None),
        rounds=tuple(
            _round(store, round_, found, records)
            for round_, found in zip(planned, status.rounds, strict=False)
        ),
    )


def _round(
    store: Store, planned: Round, status: RoundStatus, records: Mapping[str, Record]
) -> RoundFacts:
    views = _views(planned, records)
    return RoundFacts(
        number=planned.number,
        status=status,
        bootstrapped="filter" in planned.records,
        views=views,
        tars=_tars(planned, records),
        rows_in=_rows_in(planned, records),
        pairs_in={row[0]: row[1] for row in _ask(store, views, "pairs", _PAIRS_IN)},
        ledger={
            (account, source, state): count
            for account, source, state, count in _ask(
                store, views, "ledger", "SELECT account, source, state, count FROM ledger"
            )
        },
        metrics={
            (split, model, metric): Metric(value, n)
            for split, model, metric, value, n in _ask(
                store, views, "metrics", "SELECT split, model, metric, value, n FROM metrics"
            )
            if value is not None
        },
        losses=_losses(store, views),
        clusters=_clusters(store, views),
    )


_PAIRS_IN = "SELECT source, count(*) FROM pairs GROUP BY source"


def _views(planned: Round, records: Mapping[str, Record]) -> dict[str, View]:
    """Table → its published files."""
    found: dict[str, list[tuple[str, Payload]]] = {}
    for stage in STAGES:
        for name in planned.records.get(stage, ()):
            for table in tables(records[name]) if name in records else ():
                found.setdefault(table.table, []).append((table.stage, table.payload))
    return {
        name: View(name, planned.number, tuple(found[name]))
        for name in table_names()
        if name in found
    }


def _tars(planned: Round, records: Mapping[str, Record]) -> dict[str, tuple[Payload, ...]]:
    found = {}
    for name in planned.records.get("download", ()):
        record = records.get(name)
        if record is not None and planned.shards.get(record.shard, ("",))[0] == "web":
            found[record.shard] = tuple(p for p in record.payloads if p.path.endswith(".tar"))
    return found


def _rows_in(planned: Round, records: Mapping[str, Record]) -> dict[str, int]:
    rows: Counter[str] = Counter()
    for kind, name in planned.shards.values():
        if name in records:
            rows[kind] += sum(payload.rows or 0 for payload in records[name].payloads)
    return dict(rows)


def _ask(store: Store, views: Mapping[str, View], table: str, sql: str) -> Sequence[Sequence[Any]]:
    """The answer to ``sql`` over one table; nothing where the table is not published yet."""
    if table not in views:
        return ()
    return Query(store, {table: views[table]}).run(sql, _MANY)[1]


def _losses(store: Store, views: Mapping[str, View]) -> dict[tuple[str, str], Sequence[Point]]:
    """Each loss of each training stage, averaged over equal spans of steps."""
    log = views.get("training_log")
    curves: dict[tuple[str, str], Sequence[Point]] = {}
    for stage in TRAINING:
        if log is None or stage not in log.stages:
            continue
        view = {"training_log": log.of(stage)}
        columns = ", ".join(f"avg({loss}) FILTER (isfinite({loss}))" for loss in LOSSES)
        rows = list(_ask(store, view, "training_log", _CURVE.format(columns, POINTS)))
        for index, loss in enumerate(LOSSES, start=1):
            points = [(float(row[0]), float(row[index])) for row in rows if row[index] is not None]
            if points:
                curves[stage, loss] = points
    return curves


_CURVE = """
WITH spans AS (SELECT *, ntile({1}) OVER (ORDER BY step) AS span FROM training_log)
SELECT max(step), {0} FROM spans GROUP BY span ORDER BY 1
"""


def _clusters(store: Store, views: Mapping[str, View]) -> Clusters | None:
    for images, groups, alone in _ask(store, views, "clusters", _CLUSTERS):
        return Clusters(images or 0, (images or 0) - groups, groups - alone)
    return None


_CLUSTERS = """
SELECT sum(images)::BIGINT, count(*), count(*) FILTER (images = 1)
FROM (SELECT count(*) AS images FROM clusters GROUP BY cluster_id)
"""


def read_histogram(store: Store, facts: RoundFacts) -> dict[str, list[int]]:
    """web, synthetic → how many texts have an ITM score in each of `BINS` equal bins of 0 to 1."""
    found: dict[str, list[int]] = {}
    for source, bin_, count in _ask(store, facts.views, "pairs", _HISTOGRAM):
        found.setdefault(source, [0] * BINS)[int(bin_)] = count
    return found


_HISTOGRAM = f"""
SELECT source, least(floor(greatest(itm_score, 0) * {BINS}), {BINS - 1})::INT AS bin, count(*)
FROM pairs WHERE itm_score IS NOT NULL AND NOT isnan(itm_score) AND source IN ('web', 'synthetic')
GROUP BY ALL
"""
