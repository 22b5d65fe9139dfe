"""When a firing goes round, as records and plans alone tell."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from pipeline.config import RunConfig, parse
from pipeline.course import begun_plan
from pipeline.engine.spread import SPREAD
from pipeline.preflight import check
from pipeline.progress import Screen
from pipeline.runfolder import read_rounds
from pipeline.schedule import due, fire
from pipeline.sources import Shards
from pipeline.store import Store
from stages.errors import CheckpointError, SourceError
from tests.images import jpeg
from tests.run_folder import make_run

CONFIG = {
    "run": "run",
    "sources": [{"path": "web.parquet"}],
    "human": [{"path": "human", "kind": "human"}],
    "pretrain": {"tokenizer": "tokenizer"},
}
RELEASED = {"caption": {"model": "c"}, "filter": {"model": "f"}, "embed": {"model": "e"}}


def config(least: int = 1, **more: object) -> RunConfig:
    return parse(CONFIG | {"schedule": {"min_new_rows": least}} | more, "test")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Rounds 0 and 1 are finished."""
    return make_run(str(tmp_path / "run"))


def taken(store: Store) -> Shards:
    return dict(read_rounds(store)[-1].shards)


def arrive(store: Store, rows: int) -> Shards:
    """All shards, with one more of that many rows."""
    shards = taken(store)
    kind, name = shards["000000"]
    record = store.read_record(name)
    new = record.model_copy(
        update={"shard": f"9000{rows:02d}", "counts": {"rows": rows}, "fingerprint": "ab" * 8}
    )
    store.publish(new)
    return shards | {new.shard: (kind, new.name)}


def asked(config: RunConfig, store: Store, shards: Shards) -> tuple[int | None, str]:
    said = io.StringIO()
    return due(config, store, shards, Screen(said, live=False)), said.getvalue()


def test_nothing_new_is_no_round(store: Store) -> None:
    number, said = asked(config(), store, taken(store))
    assert number is None and "no round: 0 new rows, schedule.min_new_rows is 1" in said


def test_rows_wait_until_they_are_enough(store: Store) -> None:
    shards = arrive(store, 7)
    assert asked(config(least=10), store, shards)[0] is None
    shards |= arrive(store, 3)
    number, said = asked(config(least=10), store, shards)
    assert number == 2 and "10 new rows" in said


@pytest.mark.parametrize("least", [1, 10**6])
def test_a_round_that_was_begun_is_ended_first(store: Store, least: int) -> None:
    Path(store.path(read_rounds(store)[1].records["gate"][0])).unlink()
    number, said = asked(config(least), store, arrive(store, 7))
    assert number == 1 and "round 1 was begun before" in said


def test_the_raw_round_belongs_to_the_first(store: Store) -> None:
    (Path(store.path("round=01")) / "plan.json").unlink()
    assert asked(config(10**6), store, taken(store))[0] == 1


def test_a_run_from_nothing_begins_with_enough_rows(tmp_path: Path, store: Store) -> None:
    empty = Store(str(tmp_path / "empty"))
    shards = arrive(store, 7)
    for name in shards.values():
        empty.publish(store.read_record(name[1]))
    rows = sum(store.read_record(record).counts["rows"] for _, record in shards.values())
    assert asked(config(rows), empty, shards)[0] == 1
    assert asked(config(rows + 1), empty, shards)[0] is None


def test_measured_released_models_are_no_round(store: Store) -> None:
    """Their evaluation is kept as round 0, which is over, and has taken no rows."""
    (Path(store.path("round=01")) / "plan.json").unlink()
    shards = taken(store)
    store.write_json("round=00/plan.json", {"round": 0, "shards": {}, "records": {}})
    assert asked(config(1, **RELEASED), store, shards)[0] == 1
    assert asked(config(10**6, **RELEASED), store, shards)[0] is None
    # The same run folder, from nothing after all: that round 0 has not begun.
    assert asked(config(1), store, shards)[0] == 1
    assert begun_plan(store, 0) is None


@pytest.fixture
def waiting(tmp_path: Path) -> RunConfig:
    """Human captions are there, web rows are still to come, and no model can be opened."""
    (tmp_path / "human").mkdir()
    (tmp_path / "human" / "0.jpg").write_bytes(jpeg(0))
    line = json.dumps({"image": "0.jpg", "captions": ["a cat"]})
    (tmp_path / "human" / "annotations.jsonl").write_text(line)
    (tmp_path / "web").mkdir()
    given = {
        "run": str(tmp_path / "run"),
        "sources": [{"path": f"{tmp_path}/web/*.csv"}, {"path": f"{tmp_path}/web"}],
        "human": [{"path": str(tmp_path / "human")}],
        "pretrain": {"tokenizer": str(tmp_path / "no-tokenizer")},
    }
    return config(2, **given)


def fired(config: RunConfig) -> str:
    said = io.StringIO()
    assert fire(config, Screen(said, live=False)) is False
    return said.getvalue()


def test_before_the_first_file_there_is_no_round(waiting: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "web" / ".part").touch()  # not whole yet
    for least in (2, 1):  # the human row alone begins none
        schedule = waiting.schedule.model_copy(update={"min_new_rows": least})
        said = fired(waiting.model_copy(update={"schedule": schedule}))
        assert f"no round: 0 new rows, schedule.min_new_rows is {least}" in said
        assert "sources.0.path: no file there yet" in said
        assert "sources.1.path: no file there yet" in said
    with pytest.raises(SourceError, match=r"sources\.0\.path: .*\*\.csv: no such file"):
        check(waiting)  # as `capfilt run` does


def test_a_driver_clears_what_killed_ones_have_shared(waiting: RunConfig) -> None:
    store = Store(waiting.run)
    store.write_bytes(f"{SPREAD}/dedup-0/file", b"a sketch")
    store.write_bytes("scratch/kept", b"a checkpoint")
    fired(waiting)
    assert [path for path in store.files() if path.startswith("scratch/")] == ["scratch/kept"]


def test_models_are_opened_when_a_round_is_due(waiting: RunConfig, tmp_path: Path) -> None:
    more = waiting.model_copy(update={"sources": waiting.sources[:1]})
    (tmp_path / "web" / "a.csv").write_text("url,text\nhttp://127.0.0.1:9/a.png,a cat\n")
    few = more.schedule.model_copy(update={"min_new_rows": 3})
    assert "no round: 2 new rows" in fired(more.model_copy(update={"schedule": few}))
    with pytest.raises(CheckpointError, match=r"pretrain\.tokenizer: "):
        fire(more, Screen(io.StringIO(), live=False))


@pytest.mark.parametrize("field", ["sources", "human"])
def test_a_folder_that_is_not_there_is_not_waited_for(
    waiting: RunConfig, tmp_path: Path, field: str
) -> None:
    (source,) = waiting.human
    missing = source.model_copy(update={"path": str(tmp_path / "misspelt" / "*.csv")})
    with pytest.raises(SourceError, match=rf"{field}\.0\.path: .*misspelt.*: no such file"):
        fire(waiting.model_copy(update={field: (missing,)}), Screen(io.StringIO(), live=False))
    assert not (tmp_path / "run").exists()
