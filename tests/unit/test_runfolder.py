from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.runfolder import STAGES, open_run, read_rounds, table_names, tables
from pipeline.store import Store
from stages.errors import StoreError
from stages.schemas import CAPTIONS, DOWNLOAD
from tests.run_folder import make_run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_run(str(tmp_path_factory.mktemp("run")))


def test_rounds_in_order_with_their_stages_in_order(store: Store) -> None:
    rounds = read_rounds(store)
    assert [round_.number for round_ in rounds] == [0, 1]
    unpublished = {"audit", "copies"}  # as of a world without truth, where nothing is shared
    assert list(rounds[1].records) == [stage for stage in STAGES if stage not in unpublished]
    assert len(rounds[1].records["sources"]) == 3 and len(rounds[1].records["caption"]) == 2
    assert rounds[1].shards["000002"][0] == "human"


def test_every_parquet_file_of_a_run_is_known(store: Store) -> None:
    parquet = 0
    for record in store.read_records(store.record_names()):
        found = {table.payload.path for table in tables(record)}
        assert found == {p.path for p in record.payloads if p.path.endswith(".parquet")}
        parquet += len(found)
    assert parquet > 20


def test_tables_know_their_schema(store: Store) -> None:
    found = {
        table.table: table.schema
        for record in store.read_records(store.record_names())
        for table in tables(record)
    }
    assert found["caption"] == CAPTIONS
    assert "image" not in found["download"].names and len(found["download"]) == len(DOWNLOAD) - 1
    assert set(found) - {"ingest"} <= set(table_names())


def test_a_run_that_begins_with_round_1_is_read(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_json("round=01/plan.json", {"round": 1, "shards": {}, "records": {"gate": ["x"]}})
    assert [round_.number for round_ in read_rounds(store)] == [1]


@pytest.mark.parametrize("plan", [[], {}, {"shards": {"0": 1}, "records": {}}, {"shards": []}])
def test_a_broken_plan_is_said_in_one_line(tmp_path: Path, plan: object) -> None:
    store = Store(str(tmp_path))
    store.write_json("round=00/plan.json", plan)
    with pytest.raises(StoreError, match=r"round=00/plan.json is not a plan"):
        read_rounds(store)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(StoreError, match="no run here"):
            open_run(str(place))
    assert open_run(make_run(str(tmp_path / "run")).url).is_local
