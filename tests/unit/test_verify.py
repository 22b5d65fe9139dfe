"""A sound run folder, and every way in which it can be spoiled."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.records import Payload, Record
from pipeline.runfolder import read_rounds
from pipeline.store import Store
from pipeline.verify import verify
from tests.run_folder import make_run
from tests.s3 import s3_bucket


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_run(str(tmp_path_factory.mktemp("sound") / "run"))


@pytest.fixture
def store(sound: Store, tmp_path: Path) -> Store:
    """A copy that may be spoiled."""
    shutil.copytree(sound.root, tmp_path / "run")
    return Store(str(tmp_path / "run"))


def record_of(store: Store, stage: str, round_: int = 1) -> Record:
    return store.read_record(read_rounds(store)[round_].records[stage][0])


def payload_of(store: Store, stage: str, ending: str, round_: int = 1) -> Payload:
    record = record_of(store, stage, round_)
    return next(payload for payload in record.payloads if payload.path.endswith(ending))


def replace(store: Store, stage: str, ending: str, data: bytes, rows: int | None = None) -> Record:
    """Publish other bytes in place of a payload, the record true of them."""
    record, old = record_of(store, stage), payload_of(store, stage, ending)
    folder, _, name = old.path.rpartition("/")
    keep = name if stage in ("select", "assemble", "ledger") else f"x{ending}"
    new = store.put_named(folder, f"/{keep}", data, old.rows if rows is None else rows)
    payloads = tuple(new if payload == old else payload for payload in record.payloads)
    changed = record.model_copy(update={"payloads": payloads})
    store.remove(record.name)
    assert store.publish(changed)
    return changed


def edit(store: Store, stage: str, ending: str, change: Callable[[pa.Table], pa.Table]) -> Record:
    """Publish another table in place of one."""
    table = change(store.read_table(payload_of(store, stage, ending)))
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return replace(store, stage, ending, buffer.getvalue(), table.num_rows)


def problems(store: Store) -> list[str]:
    found = verify(store).problems
    assert all("\n" not in problem for problem in found)
    return found


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def members_of(store: Store, stage: str, ending: str) -> dict[str, bytes]:
    data = store.read_bytes(payload_of(store, stage, ending).path)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]


def test_a_sound_run(sound: Store) -> None:
    found = verify(sound)
    assert found.problems == []
    assert found.records == len(sound.record_names()) > 20
    assert found.files > 30 and found.bytes > 10_000
    assert found.balanced == [0, 1]
    assert found.scratch_files == 0


def test_scratch_is_counted_and_harmless(store: Store) -> None:
    store.put_named("round=01/stage=caption/shard=000000", ".parquet", b"half of i")
    store.write_bytes("scratch/checkpoints/x/last.json", b"{}")
    store.write_bytes("logs/ray.log", b"hello")
    store.write_bytes("world/web.parquet", b"hello")
    found = verify(store)
    assert found.problems == []
    assert (found.scratch_files, found.scratch_bytes) == (2, 11)


def test_a_changed_byte(store: Store) -> None:
    payload = payload_of(store, "filter", ".parquet")
    data = bytearray(store.read_bytes(payload.path))
    data[100] ^= 1
    Path(store.path(payload.path)).write_bytes(data)
    (problem,) = problems(store)
    assert problem.startswith(f"{payload.path}: {payload.bytes} bytes, sha256")


@pytest.mark.parametrize(
    ("stage", "ending"),
    [("download", ".tar"), ("download", ".parquet"), ("select", "pairs.parquet"), ("gate", "json")],
)
def test_a_missing_and_a_cut_file(store: Store, stage: str, ending: str) -> None:
    payload = payload_of(store, stage, ending)
    path = Path(store.path(payload.path))
    path.write_bytes(path.read_bytes()[:-1])
    assert any(
        problem.startswith(f"{payload.path}: {payload.bytes - 1} bytes")
        for problem in problems(store)
    )
    path.unlink()
    assert f"{payload.path}: is missing" in problems(store)


def test_a_record_that_is_none(store: Store) -> None:
    name = record_of(store, "caption").name
    Path(store.path(name)).write_text('{"stage": "caption"')
    said = problems(store)
    assert any(problem.startswith(f"{name}: ") and "is not a record" in problem for problem in said)
    assert any(f"{name}: is missing or unreadable" in problem for problem in said)


def test_a_record_under_another_name(store: Store) -> None:
    record = record_of(store, "embed")
    other = record.name.replace("000000", "000009")
    store.create(other, record.model_dump_json().encode())
    (problem,) = problems(store)
    assert problem == f"{other}: its content belongs under {record.name}"


def test_a_record_that_vanished(store: Store) -> None:
    name = record_of(store, "caption").name
    store.remove(name)
    said = problems(store)
    assert f"{name}: is missing or unreadable, though round 1 has gone on to gate" in said
    assert any(problem.startswith("round 1: ledger: pairs: ") for problem in said)


def test_work_that_is_not_done_is_no_problem(store: Store) -> None:
    for stage in ("gate", "evaluate", "finetune_filter", "finetune_captioner", "pretrain"):
        store.remove(record_of(store, stage).name)
    for stage in ("ledger", "assemble", "select", "dedup"):
        store.remove(record_of(store, stage).name)
    store.remove(record_of(store, "caption").name)
    found = verify(store)
    assert found.problems == [] and found.balanced == [0]
    assert found.scratch_files > 5


def test_captions_of_a_new_config_may_be_missing_where_dedup_is_as_it_was(store: Store) -> None:
    """Round 1 was finished, then caption.generation changed, and captioning has just begun: all
    that hangs on captions has other names in the plan, and is not there yet."""
    plan = store.read_json("round=01/plan.json")
    unchanged = ("download", "embed", "dedup")
    for stage, names in plan["records"].items():
        if stage not in unchanged:
            plan["records"][stage] = [f"{name.rpartition('-')[0]}-00ff.json" for name in names]
    store.write_json("round=01/plan.json", plan)
    assert problems(store) == []
    embed = record_of(store, "embed").name
    store.remove(embed)
    (problem,) = problems(store)
    assert problem == f"{embed}: is missing or unreadable, though round 1 has gone on to dedup"


def test_two_records_that_contradict_each_other(store: Store) -> None:
    record = record_of(store, "embed")
    payload = record.payloads[0].model_copy(update={"bytes": 1})
    other = record.model_copy(update={"shard": "000009", "payloads": (payload,)})
    store.publish(other)
    assert f"{other.name}: {payload.path}: another record describes it else" in problems(store)


def test_rows_that_are_not_there(store: Store) -> None:
    old = payload_of(store, "filter", ".parquet")
    changed = replace(store, "filter", ".parquet", store.read_bytes(old.path), rows=7)
    (problem,) = problems(store)
    assert problem == f"{changed.payloads[0].path}: 4 rows, its record says 7"


def test_other_columns(store: Store) -> None:
    changed = edit(store, "caption", ".parquet", lambda table: table.drop_columns(["model"]))
    said = problems(store)
    assert f"{changed.payloads[0].path}: columns missing ['model'], unexpected []" in said


def test_a_column_of_another_type(store: Store) -> None:
    changed = edit(
        store,
        "filter",
        ".parquet",
        lambda table: table.cast(
            table.schema.set(4, pa.field("itm_score", pa.float64())),
        ),
    )
    assert f"{changed.payloads[0].path}: column itm_score is double, not float" in problems(store)


def test_bytes_that_are_no_parquet(store: Store) -> None:
    changed = replace(store, "filter", ".parquet", b"PAR1 was here PAR1")
    said = problems(store)
    assert any(f"{changed.payloads[0].path}: not readable Parquet" in problem for problem in said)


def test_counts_that_are_not_those_of_the_table(store: Store) -> None:
    record = record_of(store, "caption")
    store.remove(record.name)
    store.publish(record.model_copy(update={"counts": {"success": 1, "failed": 1}}))
    (problem,) = problems(store)
    said = "counts {'success': 1, 'failed': 1}, but the table has {'success': 2}"
    assert problem == f"{record.name}: {said}"


def test_an_image_too_many_and_one_too_few(store: Store) -> None:
    members = members_of(store, "download", ".tar")
    first, *others = members
    changed = replace(
        store,
        "download",
        ".tar",
        tar_of({name: members[name] for name in others} | {"x.jpg": b"1"}),
    )
    said = problems(store)
    lost = first.partition(".")[0]
    assert f"{changed.name}: 1 images missing, first {lost}" in said
    assert f"{changed.name}: 1 images that nothing mentions, first x" in said


def test_an_image_twice(store: Store) -> None:
    members = members_of(store, "download", ".tar")
    name, data = next(iter(members.items()))
    twice = {**members, name.replace(".jpg", ".png"): data}
    changed = replace(store, "download", ".tar", tar_of(twice))
    assert f"{changed.name}: 1 images twice, first {name.partition('.')[0]}" in problems(store)


@pytest.mark.parametrize("data", [b"", b"not a tar" * 200, b"\x1f\x8b broken"])
def test_bytes_that_are_no_tar(store: Store, data: bytes) -> None:
    replace(store, "download", ".tar", data)
    assert any("not a readable tar" in problem for problem in problems(store))


def test_a_tar_with_a_link(store: Store) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("x.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    replace(store, "download", ".tar", buffer.getvalue())
    assert any("x.jpg is not a file" in problem for problem in problems(store))


def test_a_training_tar_without_a_sample(store: Store) -> None:
    members = members_of(store, "assemble", "web-000000.tar")
    lost = next(iter(members)).partition(".")[0]
    kept = {name: data for name, data in members.items() if not name.startswith(lost)}
    changed = replace(store, "assemble", "web-000000.tar", tar_of(kept))
    said = problems(store)
    assert f"{changed.name}: web-000000.tar: 1 samples missing, first {lost}" in said


@pytest.mark.parametrize("change", [bytes, lambda _: b"{", lambda _: b"[]", lambda _: b"\xff"])
def test_a_training_tar_with_other_texts(store: Store, change: Callable[[bytes], bytes]) -> None:
    members = members_of(store, "assemble", "web-000000.tar")
    name = next(name for name in members if name.endswith(".json"))
    described = json.loads(members[name])
    described["texts"].pop()
    members[name] = change(json.dumps(described).encode())
    changed = replace(store, "assemble", "web-000000.tar", tar_of(members))
    said = problems(store)
    assert f"{changed.name}: web-000000.tar: {name}: other texts than the index has" in said


def test_an_index_that_names_a_tar_that_is_not_there(store: Store) -> None:
    record = record_of(store, "assemble")
    kept = tuple(p for p in record.payloads if not p.path.endswith("human-000000.tar"))
    store.remove(record.name)
    store.publish(record.model_copy(update={"payloads": kept}))
    (problem,) = problems(store)
    assert problem.endswith("the index names human-000000.tar, which is not published")


def test_a_pair_that_got_lost(store: Store) -> None:
    edit(store, "select", "pairs.parquet", lambda table: table.slice(1))
    said = problems(store)
    assert any(
        problem.startswith("round 1: ledger: pairs: expected 10, found 9") for problem in said
    )
    assert not any("round 0" in problem for problem in said)


def test_a_row_that_came_twice(store: Store) -> None:
    edit(store, "select", "rows.parquet", lambda t: pa.concat_tables([t, t.slice(0, 1)]))
    assert any(
        problem.startswith("round 1: ledger: rows: expected 8, found 9")
        for problem in problems(store)
    )


def test_a_ledger_that_says_something_else(store: Store) -> None:
    def change(table: pa.Table) -> pa.Table:
        counts = [count + 1 for count in table["count"].to_pylist()]
        return table.set_column(3, table.schema.field("count"), pa.array(counts, pa.int64()))

    edit(store, "ledger", "ledger.parquet", change)
    assert problems(store) == ["round 1: ledger.parquet is not what the tables say"]


def test_a_plan_that_is_none(store: Store) -> None:
    store.write_json("round=01/plan.json", {"round": 1})
    (problem,) = problems(store)
    assert "round=01/plan.json is not a plan" in problem


def test_a_run_on_s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with s3_bucket(monkeypatch) as url:
        store = make_run(f"{url}/run")
        found = verify(store)
        assert found.problems == [] and found.balanced == [0, 1]
        tar = payload_of(store, "download", ".tar")
        # This machine has an earlier copy of both; what is stored is what counts.
        table = payload_of(store, "filter", ".parquet")
        store.local_copy(table.path)
        store.fs.pipe_file(store.path(table.path), b"spoiled")
        store.fs.rm_file(store.path(tar.path))
        said = problems(store)
        assert f"{tar.path}: is missing" in said
        assert any(problem.startswith(f"{table.path}: 7 bytes") for problem in said)


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", None])
def test_a_run_json_that_is_none(tmp_path: Path, content: bytes | None) -> None:
    store = make_run(str(tmp_path / "run"))
    if content is None:
        store.remove("run.json")
    else:
        store.write_bytes("run.json", content)
    (problem,) = verify(store).problems
    assert "run.json" in problem
