"""Payloads and records on a local folder, in memory, and on a real S3 server."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import Field

from pipeline.records import Payload, Record, fingerprint, lease_name, record_name
from pipeline.store import Store
from stages.base import Config, operational
from stages.errors import LeaseLostError, StoreError
from tests.s3 import s3_bucket, use_endpoint

TABLE = pa.table({"n": [1, 2, 3], "text": ["a", None, "ü"]})


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_bucket(patch) as url:
        yield url


@pytest.fixture(params=["local", "memory", "s3"])
def store(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    """An empty run folder of each kind."""
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "cache"))
    unique = f"{request.node.name.partition('[')[0]}-{time.time_ns()}"
    if request.param == "local":
        yield Store(str(tmp_path / "run"))
    elif request.param == "memory":
        yield Store(f"memory://{unique}")
    else:
        yield Store(f"{request.getfixturevalue('s3')}/runs/{unique}")


def record(shard: str = "000000", payloads: tuple[Payload, ...] = (), **more: object) -> Record:
    known = {"stage": "caption", "stage_version": 1, "round": 1, "fingerprint": "0f" * 8}
    times = {"code_version": "0", "started": 1.0, "finished": 2.0}
    return Record.model_validate(known | times | {"shard": shard, "payloads": payloads} | more)


def test_a_file_is_created_once(store: Store) -> None:
    store.ensure()
    assert store.create("records/run/a.json", b"first")
    assert not store.create("records/run/a.json", b"second")
    assert store.read_bytes("records/run/a.json") == b"first"
    assert not [name for name in store.files() if "scratch" in name or ".probe" in name]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_a_store_that_refuses_in_a_way_of_its_own(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MinIO's 412 comes as EINVAL, AWS's 409 as EIO."""
    store = Store(f"memory://own-way-{number}")
    store.write_bytes("there", b"first")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, "refused")

    monkeypatch.setattr(store.fs, "pipe_file", refuse)
    assert store.create("there", b"second") is False
    with pytest.raises(StoreError, match=r"cannot write not-there: .*refused"):
        store.create("not-there", b"second")


def test_a_folder_that_cannot_be_read_does_not_count_as_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    store.write_bytes("file", b"1")
    assert store.exists("file") and store.exists("") and not store.exists("none")
    assert not store.exists("file/none")
    plain = os.stat
    raised: BaseException = OSError(errno.ESTALE, "stale")

    def stat(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if "000002.json" in str(path) or str(path).endswith("/run.json"):
            raise raised
        return plain(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(StoreError, match=r"cannot look for leases/000002\.json: .*stale"):
        store.fenced(1).fence()
    with pytest.raises(StoreError, match="stale"):
        store.read_json("run.json")
    raised = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        store.fenced(1).fence()


def test_of_many_writers_one_wins(store: Store) -> None:
    if store.url.startswith("memory"):
        pytest.skip("memory:// is for one thread")
    won: list[int] = []
    start = threading.Barrier(8)

    def write(number: int) -> None:
        start.wait()
        if store.create("records/a.json", str(number).encode() * 1000):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read_bytes("records/a.json") == str(won[0]).encode() * 1000


def test_records_are_listed_and_read_back(store: Store) -> None:
    assert store.record_names() == set()
    payload = store.put_table("round=01/stage=caption/shard=000000", TABLE)
    made = [record("000001"), record("000000", (payload,), counts={"success": 3})]
    assert [store.publish(one) for one in made] == [True, True]
    assert not store.publish(made[0])
    assert store.record_names() == {one.name for one in made}
    assert made[0].name == "records/round=01/stage=caption/000001-0f0f0f0f0f0f0f0f.json"
    read = store.read_records(one.name for one in made)
    assert read == [made[1], made[0]]
    assert store.read_record(made[1].name).payloads[0] == payload
    assert store.read_records([]) == []


def test_many_records_are_published_at_once_and_each_once(store: Store) -> None:
    first = record("000000", counts={"rows": 1})
    assert store.publish(first)
    many = [record(f"{number:06d}") for number in range(300)]
    store.publish_all(iter(many))
    assert store.record_names() == {one.name for one in many}
    assert store.read_record(first.name).counts == {"rows": 1}
    store.fenced(1).create(lease_name(2), b"{}")
    with pytest.raises(LeaseLostError, match="another driver has taken it over"):
        store.fenced(1).publish_all([record("000300")])
    assert record("000300").name not in store.record_names()


def test_records_of_the_run_have_a_place_of_their_own() -> None:
    assert record_name("embed", None, "000003", "ab") == "records/run/stage=embed/000003-ab.json"


def test_tables_come_back(store: Store) -> None:
    payload = store.put_table("stage=x/shard=000000", TABLE)
    assert payload.path.startswith("stage=x/shard=000000/") and payload.path.endswith(".parquet")
    assert payload.rows == 3 and payload.bytes == store.files()[payload.path]
    assert store.read_table(payload).equals(TABLE)
    assert store.read_table(payload, ["text"]).column_names == ["text"]
    assert store.read_schema(payload) == TABLE.schema
    assert store.checksum(payload) == payload.sha256
    again = store.put_table("stage=x/shard=000000", TABLE)
    assert again.path != payload.path and again.sha256 == payload.sha256


def test_folders_come_back(store: Store, tmp_path: Path) -> None:
    local = tmp_path / "made"
    (local / "med" / "deep").mkdir(parents=True)
    (local / "med" / "config.json").write_text("{}")
    (local / "med" / "deep" / "weights").write_bytes(bytes(range(256)) * 9000)
    pq.write_table(TABLE, local / "log.parquet")
    payloads = store.put_folder("round=01/models", local)
    assert [payload.rows for payload in payloads] == [3, None, None]
    assert all(store.checksum(payload) == payload.sha256 for payload in payloads)
    attempt = "/".join(payloads[0].path.split("/")[:3])
    if store.url.startswith("memory"):
        return
    copied = store.local_folder(f"{attempt}/med")
    assert (copied / "deep" / "weights").read_bytes() == bytes(range(256)) * 9000
    assert (copied / "config.json").read_text() == "{}"
    assert store.local_folder(f"{attempt}/med") == copied


def test_copies_come_in_order_and_leave_nothing_half_done(store: Store) -> None:
    names = [f"images/{number}.tar" for number in range(40)]
    for name in names:
        store.write_bytes(name, name.encode())
    assert [path.read_bytes().decode() for path in store.local_copies(names)] == names
    with pytest.raises(StoreError if not store.is_local else FileNotFoundError):
        store.local_copies([*names, "images/none.tar"])[-1].read_bytes()
    left = {path.name for path in store.local_copies(names)[0].parent.iterdir()}
    assert left == {Path(name).name for name in names}


def test_a_missing_payload_has_no_checksum(store: Store) -> None:
    assert store.checksum(Payload(path="gone.tar", bytes=1, sha256="00")) is None


def test_documents_are_replaced_as_a_whole(store: Store) -> None:
    assert store.read_json("run.json") is None
    store.write_json("run.json", {"a": 1})
    store.write_json("run.json", {"b": [2]})
    assert store.read_json("run.json") == {"b": [2]}
    store.write_bytes("run.json", b"{")
    with pytest.raises(StoreError, match=r"run\.json is not JSON"):
        store.read_json("run.json")


def test_removing_what_is_not_there_is_no_error(store: Store) -> None:
    store.write_bytes("scratch/a/b", b"1")
    store.write_bytes("scratch/a/c", b"1")
    store.remove("scratch/a")
    store.remove("scratch/a")
    assert store.files() == {}


def test_what_another_process_writes_is_seen_at_once(store: Store) -> None:
    """A listing that is kept would hide it: fsspec keeps them unless told otherwise."""
    if store.url.startswith("memory"):
        pytest.skip("memory:// cannot be seen from another process")
    store.publish(record("000000"))
    assert len(store.record_names()) == 1
    script = (
        f"from pipeline.store import Store; Store({store.url!r}).create('records/x.json', b'1')"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ)
    assert store.exists("records/x.json")
    assert len(store.record_names()) == 2


def test_a_checkpoint_replaces_the_last_as_a_whole(store: Store) -> None:
    if store.url.startswith("memory"):
        pytest.skip("memory:// cannot be seen from another process")
    from pipeline.engine.dataset import Checkpoints

    kept = Checkpoints(store, "pretrain-00ff")
    assert kept.last() is None
    for step in (10, 20):
        kept.save(lambda folder, step=step: fill(folder, step))
        last = kept.last()
        assert last is not None and (last / "state" / "step").read_text() == str(step)

    def die(folder: Path) -> None:
        (folder / "step").write_text("half of")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept.save(die)
    again = Checkpoints(Store(store.url), "pretrain-00ff").last()
    assert again is not None and (again / "state" / "step").read_text() == "20"
    assert len(store.files("scratch")) == 2
    assert Checkpoints(store, "pretrain-other").last() is None
    kept.remove()
    assert kept.last() is None and store.files() == {}


def fill(folder: Path, step: int) -> None:
    (folder / "state").mkdir()
    (folder / "state" / "step").write_text(str(step))


@pytest.mark.parametrize("data", [b"", b"[]", b'{"stage": "caption"}', b"\xff\xfe"])
def test_what_is_no_record_is_said_in_one_line(store: Store, data: bytes) -> None:
    store.create("records/run/bad.json", data)
    for read in (store.read_record, lambda name: store.read_records([name])):
        with pytest.raises(StoreError, match="is not a record") as caught:
            read("records/run/bad.json")
        assert "\n" not in str(caught.value)


def test_a_damaged_table_is_said_in_one_line(store: Store) -> None:
    payload = store.put_named("stage=x", ".parquet", b"PAR1 no more", rows=1)
    for read in (store.read_table, store.read_schema):
        with pytest.raises(StoreError, match="is not readable Parquet"):
            read(payload)


def test_a_store_travels_to_a_worker_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    packed = pickle.dumps(Store("run"))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert pickle.loads(packed).path("a") == str(tmp_path / "run" / "a")


@pytest.mark.parametrize(
    ("url", "part"),
    [("nope://x/y", "nope"), ("/proc/none/run", "cannot be written")],
)
def test_a_bad_place_is_said_in_one_line(url: str, part: str) -> None:
    with pytest.raises(StoreError, match=part) as caught:
        Store(url).ensure()
    assert repr(url) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written"):
        Store(str(tmp_path / "file")).ensure()


def test_a_misspelt_bucket_is_not_made(s3: str) -> None:
    with pytest.raises(StoreError, match="bucket does not exist"):
        Store("s3://misspelt/run").ensure()
    assert not Store(s3).fs.exists("misspelt")


def test_an_endpoint_that_does_not_answer_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreError, match=r"Could not connect .*127\.0\.0\.1:9") as caught:
        Store("s3://bucket/run").ensure()
    assert "\n" not in str(caught.value)
    # Clients made for the dead endpoint must not outlive this test.
    monkeypatch.undo()
    Store("s3://bucket/run").fs.clear_instance_cache()


class Inner(Config):
    width: int = 4


class Outer(Config):
    inner: Inner = Inner()
    threshold: float = 0.5
    names: tuple[str, ...] = ()
    retries: int = operational(3)
    extra: Inner | None = Field(None)


BASE = fingerprint("select", 1, Outer(), "a", "b")


@pytest.mark.parametrize(
    "other",
    [
        fingerprint("filter", 1, Outer(), "a", "b"),
        fingerprint("select", 2, Outer(), "a", "b"),
        fingerprint("select", 1, Outer(threshold=0.4), "a", "b"),
        fingerprint("select", 1, Outer(inner=Inner(width=5)), "a", "b"),
        fingerprint("select", 1, Outer(names=("x",)), "a", "b"),
        fingerprint("select", 1, Outer(extra=Inner()), "a", "b"),
        fingerprint("select", 1, Outer(), "a", "c"),
        fingerprint("select", 1, Outer(), "b", "a"),
        fingerprint("select", 1, Outer(), "ab"),
        fingerprint("select", 1, None, "a", "b"),
    ],
)
def test_what_can_change_rows_changes_the_fingerprint(other: str) -> None:
    assert other != BASE and len(other) == 16


def test_what_cannot_change_rows_does_not() -> None:
    assert fingerprint("select", 1, Outer(retries=9), "a", "b") == BASE
    script = (
        "from pipeline.records import fingerprint; from tests.unit.test_store import Outer;"
        "print(fingerprint('select', 1, Outer(), 'a', 'b'))"
    )
    run = [sys.executable, "-c", script]
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run(
        run, check=True, env=env, capture_output=True, text=True
    ).stdout.split() == [BASE]


def test_a_kill_while_a_record_is_written_leaves_none(tmp_path: Path) -> None:
    """Writers are killed at random moments: every record that is there is whole."""
    script = (
        "import sys; from pipeline.store import Store\n"
        "store = Store(sys.argv[1])\n"
        "for n in range(10**6): store.create(f'records/{n}.json', b'{\"n\": 1}' + b' ' * 100_000)"
    )
    for _ in range(3):
        target = tmp_path / str(time.time_ns())
        process = subprocess.Popen([sys.executable, "-c", script, str(target)])
        while not (target / "records").exists() or len(list((target / "records").iterdir())) < 20:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        process.wait()
        store = Store(str(target))
        names = store.record_names()
        assert len(names) >= 10
        assert all(json.loads(store.read_bytes(name)) == {"n": 1} for name in names)


def test_of_many_workers_one_fetches_the_weights(monkeypatch, tmp_path):
    """`flock` holds between threads as between processes, each with its own open file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = Store("memory://stampede")
    for name in ("config.json", "model.safetensors"):
        store.write_bytes(f"models/a/{name}", name.encode())
    opened: list[str] = []
    plain = type(store.fs).open

    def slow(self, path, *arguments, **options):
        opened.append(path)
        time.sleep(0.05)
        return plain(self, path, *arguments, **options)

    monkeypatch.setattr(type(store.fs), "open", slow)
    with ThreadPoolExecutor(8) as workers:
        folders = set(
            workers.map(lambda _: Store("memory://stampede").local_folder("models/a"), range(8))
        )
    assert len(opened) == 2
    (folder,) = folders
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_a_cache_that_others_can_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache = Store("s3://bucket/run").cache.parent
    assert cache.stat().st_mode & 0o077 == 0
    cache.chmod(0o777)
    with pytest.raises(StoreError, match="others can write to it"):
        _ = Store("s3://bucket/run").cache


def test_one_run_folder_has_one_cache_however_it_is_spelt() -> None:
    first, *others = (
        Store(url).cache for url in ("s3://b/first", "s3://b/first/", "s3a://b/first", "s3://b/x")
    )
    assert others[:2] == [first, first] and others[2] != first
    assert first.name == hashlib.sha256(b"s3://b/first").hexdigest()[:16]  # as it always was
