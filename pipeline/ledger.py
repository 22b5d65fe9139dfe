"""The two accounts of a round. They are recomputed from what the stages wrote, not taken from
select, so that a row or a pair that anything drops, doubles or invents is found.

    rows in  = downloaded + each reason of failure + duplicate_row + retried + removed
    pairs in = kept + merged + rejected + duplicate + failed + quarantined + contaminated + removed
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from stages.base import Context, DatasetStage, batches
from stages.database import add_view, database
from stages.download import STATUSES
from stages.errors import LedgerError
from stages.hosts import by_host
from stages.ids import failed_caption_id, pair_id
from stages.schemas import (
    DOWNLOAD,
    LEDGER,
    PAIR_STATES,
    PAIRS,
    ROWS,
    SOURCES,
    TRAINING_INDEX,
    check,
)

ROW_STATES = ("downloaded", "retried", *(status for status in STATUSES if status != "success"))


class LedgerStage(DatasetStage):
    """Writes what `balance` finds to ``ledger.parquet``, and the downloads by host and outcome to
    ``hosts.parquet``; its inputs are `balance`'s."""

    name = "ledger"
    version = 2

    def run(self, inputs: Mapping[str, Sequence[Path]], output_dir: Path, ctx: Context) -> None:
        pq.write_table(balance(inputs), output_dir / "ledger.parquet")
        pq.write_table(by_host(inputs["download"]), output_dir / "hosts.parquet")


def balance(inputs: Mapping[str, Sequence[Path]]) -> pa.Table:
    """The balanced accounts of a round as a LEDGER table.

    Args:
        inputs: Parquet files under ``sources``, ``download``, ``rows`` and ``pairs``, and where
            there are any, ``captions`` and ``index`` (TRAINING_INDEX).

    Checked: the rows are the source rows, each once, its state what download said (or
    ``removed``, or ``retried`` where it failed and a later row tries again); the pairs are the
    distinct texts of the downloaded rows and the captions, each once, in one of `PAIR_STATES`; a
    merged text is carried by a sample that keeps one; the pairs of the index are the kept and
    merged ones.

    Raises:
        LedgerError: an account does not balance; says which, by how much, and an id to look at.
    """
    with tempfile.TemporaryDirectory() as scratch, database(Path(scratch)) as connection:
        for name, (schema, columns) in _READS.items():
            add_view(connection, name, inputs.get(name, ()), schema, columns)
        connection.execute("CREATE TABLE ids (pair_id VARCHAR)")
        for found in _pairs_in(inputs):
            connection.register("more", pa.table({"pair_id": pa.array(found, pa.string())}))
            connection.execute("INSERT INTO ids FROM more")
        connection.execute("CREATE TABLE pairs_in AS SELECT DISTINCT pair_id FROM ids")
        _check_rows(connection)
        _check_pairs(connection)
        if "index" in inputs:
            _compare(connection, "training index", "pair_id", _TRAINABLE, 'FROM "index"')
        return check(connection.sql(_LEDGER).to_arrow_table(), LEDGER, "ledger")


def _pairs_in(inputs: Mapping[str, Sequence[Path]]) -> Iterator[list[str]]:
    """The pairs that have to be accounted for, some of them several times, a few thousand each
    time."""
    for table in batches(inputs["download"], ["sample_id", "source", "text", "status"]):
        yield [
            pair_id(row["sample_id"], row["source"], row["text"] or "")
            for row in table.to_pylist()
            if row["status"] == "success"
        ]
    columns = ["sample_id", "caption_index", "text", "status"]
    for table in batches(inputs.get("captions", ()), columns):
        yield [
            pair_id(row["sample_id"], "synthetic", row["text"] or "")
            if row["status"] == "success"
            else failed_caption_id(row["sample_id"], row["caption_index"])
            for row in table.to_pylist()
        ]


def _check_rows(connection: duckdb.DuckDBPyConnection) -> None:
    _compare(connection, "download", "row_id", "FROM sources", "FROM download")
    _compare(connection, "rows", "row_id", "FROM sources", "FROM rows")
    _check_states(connection, "rows", "row_id", ROW_STATES)
    contradiction = connection.execute(_CONTRADICTIONS).fetchone()
    if contradiction:
        row, state, status = contradiction
        raise LedgerError(
            f"ledger: rows: row_id {row} ended as {state!r} though download says {status!r}"
        )


def _check_pairs(connection: duckdb.DuckDBPyConnection) -> None:
    _compare(connection, "pairs", "pair_id", "FROM pairs_in", "FROM pairs")
    _check_states(connection, "pairs", "pair_id", PAIR_STATES)
    orphan = connection.execute(_ORPHANS).fetchone()
    if orphan:
        raise LedgerError(
            f"ledger: pairs: pair_id {orphan[0]} is merged onto sample {orphan[1]}, "
            "which keeps no pair of its own"
        )


def _compare(
    connection: duckdb.DuckDBPyConnection, account: str, key: str, expected: str, found: str
) -> None:
    """Both sides hold the same ids, each once. The sides are SQL, from FROM on."""
    (counts,) = connection.execute(
        f"SELECT (SELECT count(*) {expected}), (SELECT count(*) {found})"
    ).fetchall()
    missing = _ids(connection, f"SELECT {key} {expected} EXCEPT SELECT {key} {found}")
    extra = _ids(connection, f"SELECT {key} {found} EXCEPT SELECT {key} {expected}")
    twice = _ids(connection, f"SELECT {key} {found} GROUP BY {key} HAVING count(*) > 1")
    repeated = _ids(connection, f"SELECT {key} {expected} GROUP BY {key} HAVING count(*) > 1")
    kinds = {"missing": missing, "unexpected": extra, "found twice": twice, "in twice": repeated}
    problems = [f"{n} {kind}, first {key} {first}" for kind, (n, first) in kinds.items() if n]
    if problems:
        raise LedgerError(
            f"ledger: {account}: expected {counts[0]}, found {counts[1]}: {'; '.join(problems)}"
        )


def _ids(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[int, str | None]:
    """How many ids ``query`` finds, and the first of them."""
    (found,) = connection.execute(f"SELECT count(*), min(id) FROM ({query}) AS t(id)").fetchall()
    return found


def _check_states(
    connection: duckdb.DuckDBPyConnection, account: str, key: str, allowed: Sequence[str]
) -> None:
    query = f"SELECT {key}, state, count(*) OVER () FROM {account} WHERE {_NOT_FINAL}"
    wrong = connection.execute(f"{query} ORDER BY 1 LIMIT 1", {"allowed": list(allowed)}).fetchone()
    if wrong:
        first, state, count = wrong
        raise LedgerError(
            f"ledger: {account}: {count} without a final state, first {key} {first}: "
            f"{state!r} is not one of {', '.join(allowed)}"
        )


_NOT_FINAL = "state IS NULL OR state NOT IN $allowed"

_READS: Mapping[str, tuple[pa.Schema, tuple[str, ...]]] = {
    "sources": (SOURCES, ("row_id", "source")),
    "download": (DOWNLOAD, ("row_id", "status")),
    "rows": (ROWS, ("row_id", "state")),
    "pairs": (PAIRS, ("pair_id", "sample_id", "source", "state", "carried_by")),
    "index": (TRAINING_INDEX, ("pair_id",)),
}

_TRAINABLE = "FROM pairs WHERE state IN ('kept', 'merged')"

_CONTRADICTIONS = """
SELECT row_id, state, status FROM rows JOIN download USING (row_id)
WHERE state <> 'removed' AND state <> if(status = 'success', 'downloaded', status)
    AND NOT (state = 'retried' AND status NOT IN ('success', 'duplicate_row'))
ORDER BY row_id LIMIT 1
"""

_ORPHANS = """
SELECT pair_id, carried_by FROM pairs
WHERE state = 'merged' AND (
    carried_by IS NULL OR carried_by NOT IN (SELECT sample_id FROM pairs WHERE state = 'kept'))
ORDER BY pair_id LIMIT 1
"""

_LEDGER = """
SELECT 'rows' AS account, source, state, count(*) AS count
FROM rows JOIN sources USING (row_id) GROUP BY source, state
UNION ALL
SELECT 'pairs', source, state, count(*) FROM pairs GROUP BY source, state
ORDER BY account DESC, source, state
"""
