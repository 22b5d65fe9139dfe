from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.inspect import Query, View, cell, choose, inspect, read_views
from pipeline.runfolder import read_rounds
from pipeline.store import Store
from pipeline.terminal import console
from stages.errors import UserError
from stages.schemas import TRAINING_INDEX
from tests.run_folder import HOSTILE, make_run
from tests.s3 import s3_bucket
from tests.tables import filled


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_run(str(tmp_path_factory.mktemp("odd [1] *'s") / "run"))


@pytest.fixture
def query(store: Store) -> Query:
    return Query(store, read_views(store)[1])


def look(
    store: Store,
    what: str | None = None,
    number: int | None = None,
    sql: str | None = None,
    rows: int | None = None,
) -> str:
    """What `capfilt inspect` prints."""
    out = io.StringIO()
    inspect(store, what, number, sql, rows, console(out))
    assert "\x1b" not in out.getvalue() and "\u202e" not in out.getvalue()
    assert max(map(len, out.getvalue().splitlines())) <= 100
    return out.getvalue()


def test_without_a_stage_it_lists_what_there_is(store: Store) -> None:
    lines = look(store).splitlines()
    assert any(line.split()[:4] == ["1", "caption", "caption", "4"] for line in lines)
    assert any(line.split()[:4] == ["0", "pairs", "select", "6"] for line in lines)
    only = look(store, number=0).splitlines()[2:]
    assert only and all(line.split()[0] == "0" for line in only)


def test_hosts_can_be_asked_for_before_a_ledger_has_counted_them(store: Store) -> None:
    ask = "SELECT * FROM hosts ORDER BY ALL"
    views = read_views(store)[1]
    downloaded = Query(store, {"download": views["download"]})
    assert "hosts" in downloaded.names
    names, rows = downloaded.run(ask, 9)
    assert (names, rows) == Query(store, views).run(ask, 9)
    assert ("web.test", "http_4xx", None, 1, "HTTP 404") in rows


def test_a_stage_shows_schema_counts_and_rows(store: Store) -> None:
    said = look(store, "download")
    assert "round 1, download: 8 rows in 3 files" in said
    assert "sha256 of the image bytes as downloaded" in said
    assert any(line.split() == ["web", "http_4xx", "1"] for line in said.splitlines())
    assert said.count("\nrow ") == 5 and "… 3 more rows" in said
    assert look(store, "download", rows=7).count("\nrow ") == 7


def test_web_text_cannot_touch_the_terminal(store: Store) -> None:
    said = look(store, "pairs", rows=100)
    assert "a �[31mred�[0m [bold]dog[/bold] �<script>alert(1)</script> second line" in said
    assert "dog" in look(store, sql="SELECT text FROM pairs WHERE text LIKE '%red%'")


def test_the_last_round_that_has_it_unless_one_is_named(store: Store) -> None:
    assert "round 1, metrics" in look(store, "metrics")
    assert "0.25" in look(store, "metrics", 0) and "0.25" not in look(store, "metrics", 1)


def test_a_stage_with_two_tables_shows_both(store: Store) -> None:
    said = look(store, "select")
    assert "round 1, pairs: 10 rows" in said and "round 1, rows: 8 rows" in said


def test_of_a_shared_table_a_stage_shows_its_own_part(store: Store) -> None:
    assert "training_log: 2 rows in 1 file" in look(store, "pretrain")
    assert "training_log: 6 rows in 3 files" in look(store, "training_log")
    log = "SELECT DISTINCT stage FROM"
    assert look(store, sql=f"{log} finetune_filter").split()[-1] == "finetune_filter"


def test_a_step_shows_the_tables_of_all_its_stages(store: Store) -> None:
    assert look(store, "ingest") == look(store, "sources")
    both = f"{look(store, 'finetune_captioner')}\n{look(store, 'finetune_filter')}"
    assert look(store, "finetune") == both


def test_the_gates_decision_is_json(store: Store) -> None:
    said = json.loads(look(store, "gate"))
    assert said["round"] == 1 and said["decision"]["filter"]["promoted"] is True
    assert json.loads(look(store, "gate", 0))["round"] == 0


@pytest.mark.parametrize(
    ("what", "number", "parts"),
    [
        ("gate", 7, ["no round 7", "0, 1"]),
        ("capton", None, ["no stage 'capton'", "caption", "pairs"]),
        ("caption", 0, ["no table of caption is published in round 0", "it is in round 1"]),
        ("caption", 7, ["no round 7", "0, 1"]),
        ("audit", None, ["no table of audit is published in this run"]),
        (None, 7, ["no round 7", "0, 1"]),
    ],
)
def test_what_is_not_there_is_said(
    store: Store, what: str | None, number: int | None, parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        look(store, what, number)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_nothing_is_published_yet(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(UserError, match="nothing is published yet"):
        look(store)
    with pytest.raises(UserError, match="none was begun yet"):
        look(store, sql="SELECT 1")


def test_what_is_not_published_is_not_shown(tmp_path: Path) -> None:
    store = make_run(str(tmp_path / "run"))
    store.remove(read_rounds(store)[1].records["caption"][0])
    assert "caption: 2 rows in 1 file" in look(store, "caption")


def test_the_gate_has_not_spoken_yet(tmp_path: Path) -> None:
    store = make_run(str(tmp_path / "run"))
    store.remove(read_rounds(store)[1].records["gate"][0])
    with pytest.raises(UserError, match=r"no decision of gate .* in round 1; it is in round 0$"):
        look(store, "gate", 1)
    store.remove(read_rounds(store)[0].records["gate"][0])
    with pytest.raises(UserError, match=r"no decision of gate is published in this run$"):
        look(store, "gate")


def test_sql_joins_stages(query: Query) -> None:
    names, rows = query.run(
        "SELECT p.state, count(*) AS n FROM pairs p JOIN filter f USING (pair_id)"
        " WHERE f.itm_score < 0.5 GROUP BY ALL",
        10,
    )
    assert names == ["state", "n"] and list(rows) == [("rejected", 1)]


def test_every_table_and_stage_of_the_round_is_a_view(query: Query) -> None:
    for name in ("sources", "download", "caption", "filter", "embed", "clusters", "dedup", "pairs"):
        assert query.run(f"SELECT count(*) FROM {name}", 1)[1][0][0] > 0
    for name in ("rows", '"index"', "assemble", "ledger", "metrics", "evaluate"):
        assert query.run(f"SELECT count(*) FROM {name}", 1)[1][0][0] > 0
    assert query.run("DESCRIBE caption", 9)[1][0][0] == "sample_id"
    assert query.run("SELECT embedding FROM embed", 1)[1][0][0] == pytest.approx(
        [0.6, 0.8], abs=1e-3
    )


def test_the_columns_are_those_of_the_files(query: Query) -> None:
    """No column is made up from the folders' names."""
    names, _ = query.run("SELECT * FROM caption", 1)
    assert names == ["sample_id", "caption_index", "text", "status", "detail", "model"]


def test_a_text_that_came_with_a_removed_sample_is_hidden(tmp_path: Path) -> None:
    """The sample that carries it stays, and so does all that it has of its own."""
    store = Store(str(tmp_path))
    rows = [{"sample_id": "a", "origin": origin, "text": origin} for origin in ("a", "b", "c")]
    rows.append({"sample_id": "b", "origin": "c", "text": "gone as well"})
    payload = store.put_table("x", filled(TRAINING_INDEX, rows))
    views = {"index": View("index", 1, (("assemble", payload),))}
    ask = 'SELECT text FROM "index" ORDER BY text'
    assert len(Query(store, views).run(ask, 9)[1]) == 4
    assert list(Query(store, views, frozenset({"b"})).run(ask, 9)[1]) == [("a",), ("c",)]


def test_longer_answers_are_cut(store: Store) -> None:
    said = look(store, sql="SELECT row_id FROM download", rows=3)
    assert len(said.splitlines()) == 6 and "only the first 3 rows" in said


@pytest.mark.parametrize(
    ("sql", "part"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT * FROM nope", "nope does not exist"),
        ("SELECT nope FROM pairs", '"nope" not found'),
        ("SELECT * FROM read_text('{secret}')", "disabled by configuration"),
        ("SELECT * FROM '{secret}'", "disabled by configuration"),
        ("SELECT * FROM read_csv('http://127.0.0.1:9/x.csv')", ""),
        ("COPY pairs TO '{secret}'", "one SELECT"),
        ("COPY (SELECT 1) TO '{payload}'", "one SELECT"),
        ("DROP VIEW pairs", "one SELECT"),
        ("SET enable_external_access=true", "one SELECT"),
        ("ATTACH '{secret}'", "one SELECT"),
        ("INSTALL httpfs", "one SELECT"),
        ("SELECT 1; SELECT 2", "one SELECT"),
        ("", "one SELECT"),
        ("-- nothing", "one SELECT"),
        ("SELECT error('no\nmore')", "no more"),
    ],
)
def test_only_published_files_are_read_and_nothing_is_written(
    store: Store, tmp_path: Path, sql: str, part: str
) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("password\nhunter2\n")
    payload = read_views(store)[1]["pairs"].files[0]
    filled = sql.format(secret=secret, payload=store.path(payload.path).replace("'", "''"))
    with pytest.raises(UserError) as caught:
        look(store, sql=filled)
    said = str(caught.value)
    assert part in said and "\n" not in said and "hunter2" not in said
    assert secret.read_text() == "password\nhunter2\n"
    assert store.checksum(payload) == payload.sha256


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"),
        ("", '""'),
        (0.123456789, "0.12346"),
        (3, "3"),
        (True, "True"),
        (b"\x00\x01", "2 bytes"),
        ([1.5, 2.0], "[1.5, 2.0]"),
        (list(range(300)), "[0, 1, 2, 3, … 300 values]"),
        (HOSTILE, "a �[31mred�[0m [bold]dog[/bold] �<script>alert(1)</script> second line"),
    ],
)
def test_cell(value: object, shown: str) -> None:
    assert cell(value) == shown


def test_choose_takes_tables_and_stages(store: Store) -> None:
    rounds = read_views(store)
    assert [view.name for view in choose(rounds, "assemble", None)] == ["index"]
    assert choose(rounds, "index", 0)[0].round == 0


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    """A run on S3, of which this machine has no copies yet."""
    (tmp_path / "made").mkdir()
    (tmp_path / "read").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "made"))
    with s3_bucket(monkeypatch) as url:
        store = make_run(f"{url}/run")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "read"))
        yield store


def test_a_run_on_s3(remote: Store) -> None:
    assert "round 1, caption: 4 rows in 2 files" in look(remote, "caption")
    said = look(remote, sql="SELECT state, count(*) FROM pairs GROUP BY ALL ORDER BY ALL")
    assert said.splitlines()[2].split() == ["kept", "9"]
    copied = {path.relative_to(remote.cache).parts[1] for path in remote.cache.rglob("*.parquet")}
    assert copied == {"stage=caption", "stage=select"}
