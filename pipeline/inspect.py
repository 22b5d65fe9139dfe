"""A look into what a stage wrote: schema, counts, a few rows, or any question in SQL."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import duckdb
import pyarrow as pa
from rich.console import Console
from rich.text import Text

from pipeline.records import Payload
from pipeline.runfolder import STAGES, Round, read_rounds, table_names, tables
from pipeline.store import Store
from pipeline.terminal import clean, grid, size
from pipeline.tombstones import read_removed
from stages.database import unglobbed
from stages.errors import UserError
from stages.hosts import BY_HOST
from stages.scrub import ID_COLUMNS

_WIDE = 6
"""Rows of more columns than this are printed one column a line."""
_ROWS = 5
_NARROW_ROWS = 20
_CELL = 400

_IN_ALL = {"ingest": ("sources",), "finetune": ("finetune_captioner", "finetune_filter")}
"""What a whole step is called → the stages whose tables it wrote."""

Rows = Sequence[Sequence[Any]]
T = TypeVar("T")


@dataclass(frozen=True)
class View:
    """One table of one round: the published files of one kind."""

    name: str
    round: int
    published: tuple[tuple[str, Payload], ...]
    """(stage, file); ``metrics`` comes from both evaluate and audit."""

    @property
    def stages(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(stage for stage, _ in self.published))

    @property
    def files(self) -> tuple[Payload, ...]:
        return tuple(payload for _, payload in self.published)

    def of(self, stage: str) -> View:
        """The part that one stage published."""
        return replace(self, published=tuple(p for p in self.published if p[0] == stage))

    @property
    def rows(self) -> int:
        return sum(payload.rows or 0 for payload in self.files)

    @property
    def bytes(self) -> int:
        return sum(payload.bytes for payload in self.files)


def read_views(store: Store) -> dict[int, dict[str, View]]:
    """Round → table name → what is published of it, by plan and records alone.

    Raises:
        StoreError: the run cannot be read.
    """
    published = store.record_names()
    return {round_.number: _views(store, round_, published) for round_ in read_rounds(store)}


def _views(store: Store, round_: Round, published: set[str]) -> dict[str, View]:
    found: dict[str, list[tuple[str, Payload]]] = {}
    for names in round_.records.values():
        for record in store.read_records(set(names) & published):
            for table in tables(record):
                found.setdefault(table.table, []).append((table.stage, table.payload))
    return {
        name: View(name, round_.number, tuple(found[name]))
        for name in table_names()
        if name in found
    }


def choose(rounds: Mapping[int, Mapping[str, View]], what: str, number: int | None) -> list[View]:
    """The views that ``what``, a stage or a table, names: of round ``number``, or the last
    round that has any.

    Raises:
        UserError: there is no such stage, table or round, or nothing of it is published.
    """
    known = [*STAGES, *_IN_ALL, *(name for name in table_names() if name not in STAGES)]
    if what not in known:
        raise UserError(f"inspect: no stage {what!r}; there are {', '.join(known)}")
    having = {n: found for n, views in rounds.items() if (found := _named(views, what))}
    return _of_round(having, rounds, f"table of {what}", number)


def _of_round(having: Mapping[int, T], begun: Iterable[int], what: str, number: int | None) -> T:
    """What round ``number``, or the last one, has; UserError where that is nothing."""
    if number is None and having:
        return having[max(having)]
    if number is not None and number in having:
        return having[number]
    begun = set(begun)
    if number is not None and number not in begun:
        raise UserError(f"inspect: no round {number}; {_begun(begun)}")
    where = "in this run" if number is None else f"in round {number}"
    others = f"; it is in round {', '.join(map(str, sorted(having)))}" if having else ""
    raise UserError(f"inspect: no {what} is published {where}{others}")


def _named(views: Mapping[str, View], what: str) -> list[View]:
    if what in views:
        return [views[what]]
    stages = _IN_ALL.get(what, (what,))
    return [view.of(name) for name in stages for view in views.values() if name in view.stages]


def _begun(rounds: Iterable[int]) -> str:
    numbers = ", ".join(map(str, sorted(rounds)))
    return f"begun are {numbers}" if numbers else "none was begun yet; see `capfilt status`"


class Query:
    """SQL over the tables of one round, in memory.

    A view for every table, named as `runfolder.table_names` has it, and one for a stage that
    writes a single table. Until a ledger has counted ``hosts`` they are counted from the downloads
    that there are. Only the published files can be opened, only one SELECT can be asked:
    no other file, no network, no extension, nothing written.
    """

    def __init__(
        self, store: Store, views: Mapping[str, View], hidden: frozenset[str] = frozenset()
    ) -> None:
        """``hidden``: sample_ids whose rows no view shows."""
        self._store, self._hidden = store, hidden
        self._views = dict(views)
        for stage in STAGES:
            mine = _named(views, stage)
            if len(mine) == 1:
                self._views.setdefault(stage, mine[0])
        self._counts_hosts = "download" in self._views and "hosts" not in self._views

    @property
    def names(self) -> list[str]:
        return [*self._views, *(["hosts"] if self._counts_hosts else [])]

    def run(self, sql: str, limit: int) -> tuple[list[str], Rows]:
        """Column names and at most ``limit`` rows of the answer.

        Raises:
            UserError: it is not a SELECT, or DuckDB refuses it; with DuckDB's own message.
        """
        try:
            with self._connection(sql) as connection:
                statements = connection.extract_statements(sql)
                kinds = [statement.type for statement in statements]
                if kinds != [duckdb.StatementType.SELECT]:
                    raise UserError("inspect: --sql takes one SELECT (or DESCRIBE, SUMMARIZE)")
                answer = connection.execute(statements[0])
                names = [column[0] for column in answer.description or ()]
                return names, answer.fetchmany(limit)
        except duckdb.Error as error:
            message = clean(str(error).partition("\nLINE ")[0], 600)
            raise UserError(
                f"inspect: SQL: {message}; tables are {', '.join(self.names)}"
            ) from error

    def _connection(self, sql: str) -> duckdb.DuckDBPyConnection:
        """Files of a remote store are copied here only where ``sql`` mentions their table."""
        connection = duckdb.connect(
            ":memory:",
            config={
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
                "python_enable_replacements": False,
            },
        )
        hidden = pa.table({"sample_id": pa.array(sorted(self._hidden), pa.string())})
        connection.register("_hidden", hidden)
        allowed: list[str] = []
        asked = {name for name in self.names if re.search(rf"\b{name}\b", sql, re.IGNORECASE)}
        if self._counts_hosts and "hosts" in asked:
            asked.add("download")
        for name, view in self._views.items():
            if self._store.is_local or name in asked:
                paths = [str(self._store.local_copy(payload.path)) for payload in view.files]
                patterns = [unglobbed(path) for path in paths]
                # What is looked for is checked as well as what is found.
                allowed += dict.fromkeys([*paths, *patterns])
                listed = ", ".join(map(_literal, patterns))
                connection.execute(
                    f'CREATE VIEW "{name}" AS SELECT * '
                    f"FROM read_parquet([{listed}], hive_partitioning=false)"
                    f"{self._visible(view)}"
                )
        if self._counts_hosts and "hosts" in asked:
            connection.execute(f"CREATE VIEW hosts AS {BY_HOST}")
        listed = ", ".join(map(_literal, allowed))
        connection.execute(f"SET allowed_paths=[{listed}]")
        connection.execute("SET enable_external_access=false")
        connection.execute("SET lock_configuration=true")
        return connection

    def _visible(self, view: View) -> str:
        """The condition that leaves hidden samples out, of a table that names samples; also the
        texts that they gave to others or took from them."""
        if not self._hidden:
            return ""
        names = self._store.read_schema(view.files[0]).names
        told = [
            f"({name} IS NULL OR {name} NOT IN (SELECT sample_id FROM _hidden))"
            for name in ID_COLUMNS
            if name in names
        ]
        return f" WHERE {' AND '.join(told)}" if told else ""


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


# ---- on the screen ---------------------------------------------------------------------------


def print_overview(rounds: Mapping[int, Mapping[str, View]], out: Console) -> None:
    """What can be inspected: every table of every round.

    Raises:
        UserError: nothing is published yet.
    """
    right = frozenset({"round", "rows", "files", "size"})
    table = grid("round", "table", "stage", "rows", "files", "size", right=right)
    for number, views in sorted(rounds.items()):
        for view in views.values():
            cells = (number, view.name, ", ".join(view.stages), f"{view.rows:,}")
            table.add_row(*map(str, cells), str(len(view.files)), size(view.bytes))
    if not table.row_count:
        raise UserError("inspect: nothing is published yet; `capfilt status` shows how far it is")
    out.print(table)


def print_view(store: Store, view: View, rows: int | None, out: Console) -> None:
    """Schema with comments, counts, and the first rows of one table."""
    schema = store.read_schema(view.files[0])
    query = Query(store, {view.name: view}, read_removed(store).samples)
    files = f"{len(view.files)} file{'s' if len(view.files) != 1 else ''}"
    out.print(
        Text(f"round {view.round}, {view.name}: {view.rows:,} rows in {files}, {size(view.bytes)}")
    )
    out.print()
    table = grid("column", "type", "comment")
    for field in schema:
        comment = (field.metadata or {}).get(b"comment", b"").decode("utf-8", "replace")
        table.add_row(*(Text(clean(cell)) for cell in (field.name, field.type, comment)))
    out.print(table)
    _print_counts(query, view, [field.name for field in schema], out)
    wide = len(schema) > _WIDE
    limit = rows if rows is not None else (_ROWS if wide else _NARROW_ROWS)
    names, found = query.run(f'SELECT * FROM "{view.name}"', limit)
    out.print()
    print_rows(names, found, out)
    if view.rows > len(found):
        out.print(Text(f"… {view.rows - len(found):,} more rows; --rows N shows more"))


def _print_counts(query: Query, view: View, columns: Sequence[str], out: Console) -> None:
    """Rows by what became of them, where a column says so."""
    outcome = next((name for name in ("status", "state") if name in columns), None)
    if outcome is None or "count" in columns:
        return
    by = [name for name in ("source", outcome) if name in columns]
    listed = ", ".join(by)
    sql = f'SELECT {listed}, count(*) AS rows FROM "{view.name}" GROUP BY ALL ORDER BY ALL'
    names, found = query.run(sql, 1000)
    out.print()
    print_rows(names, found, out)


def print_rows(names: Sequence[str], rows: Rows, out: Console) -> None:
    """Rows as a table where they are narrow, else one column a line."""
    if len(names) <= _WIDE:
        right = frozenset(
            name
            for index, name in enumerate(names)
            if rows and all(isinstance(row[index], int | float | None) for row in rows)
        )
        table = grid(*(clean(name, 40) for name in names), right=right)
        for row in rows:
            table.add_row(*(Text(cell(value)) for value in row))
        out.print(table)
        return
    width = max(len(name) for name in names)
    for number, row in enumerate(rows, start=1):
        out.print(Text(f"row {number}"))
        for name, value in zip(names, row, strict=True):
            limit = max(20, out.width - width - 4)
            out.print(Text(f"  {name:<{width}}  {cell(value, limit)}"))


def cell(value: Any, limit: int = _CELL) -> str:
    """One value, shortened and harmless."""
    if value is None:
        return "null"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, list | tuple) and len(value) > 4:
        return clean(f"[{', '.join(cell(item, 40) for item in value[:4])}, … {len(value)} values]")
    if isinstance(value, str):
        return clean(value, limit) or '""'
    return clean(value, limit)


def print_decision(store: Store, number: int | None, out: Console) -> None:
    """The gate's word on the models of round ``number``, or of the last that has one, as JSON.

    Raises:
        UserError: there is no such round, or the gate has not spoken.
    """
    rounds = {round_.number: round_ for round_ in read_rounds(store)}
    spoken = {
        n: names[0]
        for n, round_ in rounds.items()
        if (names := round_.records.get("gate")) and store.exists(names[0])
    }
    record = store.read_record(_of_round(spoken, rounds, "decision of gate", number))
    for payload in record.payloads:
        document = {"round": record.round, **json.loads(store.read_bytes(payload.path))}
        # Escaped, and not broken at the edge of a screen: for other programs too.
        out.print(Text(json.dumps(document, indent=2)), soft_wrap=True)


def print_answer(query: Query, sql: str, rows: int | None, out: Console) -> None:
    """The answer to ``sql``.

    Raises:
        UserError: as `Query.run`.
    """
    limit = _NARROW_ROWS if rows is None else rows
    names, found = query.run(sql, limit + 1)
    print_rows(names, found[:limit], out)
    if len(found) > limit:
        out.print(Text(f"… only the first {limit} rows; --rows N shows more"))


def inspect(
    store: Store,
    what: str | None,
    number: int | None,
    sql: str | None,
    rows: int | None,
    out: Console,
) -> None:
    """What ``capfilt inspect`` does: an overview, one stage's tables, the gate's decision, or the
    answer to ``sql``.

    Raises:
        UserError: there is no such stage or round, nothing is published, or the SQL is refused.
    """
    rounds = read_views(store)
    if sql is not None:
        query = Query(store, _round(rounds, what, number), read_removed(store).samples)
        print_answer(query, sql, rows, out)
    elif what == "gate":
        print_decision(store, number, out)
    elif what is None:
        chosen = rounds if number is None else {number: _round(rounds, None, number)}
        print_overview(chosen, out)
    else:
        for index, view in enumerate(choose(rounds, what, number)):
            if index:
                out.print()
            print_view(store, view, rows, out)


def _round(
    rounds: Mapping[int, Mapping[str, View]], what: str | None, number: int | None
) -> Mapping[str, View]:
    """The round to be asked: ``number``, else the last with the stage, else the last of all."""
    if what is not None:
        return rounds[choose(rounds, what, number)[0].round]
    chosen = number if number is not None else max(rounds, default=0)
    if chosen not in rounds:
        raise UserError(f"inspect: no round {chosen}; {_begun(rounds)}")
    return rounds[chosen]
