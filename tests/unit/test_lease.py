"""Two drivers and one run: on a local folder and on a real S3 server, with real processes."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import lease
from pipeline.lease import Terminated, current, held, terminable
from pipeline.records import Record, lease_name
from pipeline.store import Store
from stages.errors import LeaseHeldError, LeaseLostError, StoreError
from tests.s3 import s3_bucket

ROOT = Path(__file__).parents[2]
TTL = 0.6


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_bucket(patch) as url:
        yield url


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "run"))
    return Store(f"{request.getfixturevalue('s3')}/runs/{time.time_ns()}")


def record(shard: str) -> Record:
    return Record(
        stage="caption",
        stage_version=1,
        round=1,
        shard=shard,
        fingerprint="0f",
        payloads=(),
        code_version="0",
        started=1.0,
        finished=2.0,
    )


def silent(line: str) -> None:
    raise AssertionError(line)


def foreign(store: Store, token: int, **more: object) -> lease.Lease:
    """A lease of a driver on another machine, which nothing here can look at."""
    mine = lease._own(token, TTL)
    other = mine.model_copy(update={"host": "elsewhere", "machine": "another boot"} | more)
    assert store.create(lease_name(token), other.model_dump_json().encode())
    return other


def holding(store: Store, ttl: float = TTL) -> subprocess.Popen[str]:
    """Another process that holds the lease, until its standard input ends."""
    script = (
        "import sys; from pipeline.lease import held; from pipeline.store import Store\n"
        f"with held(Store({store.url!r}), print, {ttl}):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lease_is_taken_released_and_taken_again(store: Store) -> None:
    for token in (1, 2, 3):
        with held(store, silent, TTL) as mine:
            assert mine.token == token and not current(store).released
            assert pickle.loads(pickle.dumps(mine)).token == token
        assert current(store).released
    # A lease is never removed: its number cannot be given twice.
    assert sorted(store.files("leases")) == [lease_name(token) for token in (1, 2, 3)]


def test_who_drives_a_run_is_told_to_those_who_only_look(store: Store) -> None:
    assert lease.driver(store) is None
    other = holding(store)
    assert (lease.driver(store) or "").startswith(f"process {other.pid} on ")
    other.kill()
    other.wait()
    told = lease.driver(store) or ""
    assert told.startswith(f"ended without a word: process {other.pid} on ")
    away = foreign(store, 2)
    assert lease.driver(store) == f"{away.holder}; whether it still runs cannot be told from here"
    assert len(store.files("leases")) == 2  # looking writes nothing


def test_records_carry_the_token_and_nothing_else_does(store: Store) -> None:
    assert (
        store.publish(record("000000")) and store.read_record(record("000000").name).token is None
    )
    with held(store, silent, TTL) as mine:
        assert mine.publish(record("000001"))
    published = store.read_record(record("000001").name)
    assert published == record("000001").model_copy(update={"token": 1})
    assert published.name == record("000001").name


def test_a_second_driver_is_told_who_holds_it_and_since_when(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "j7"}}')
    with held(store, silent, TTL), pytest.raises(LeaseHeldError) as caught:
        held(store, silent, TTL).__enter__()
    said = str(caught.value)
    assert f"held by process {os.getpid()} on " in said and ", job j7, since 20" in said
    assert store.url in said and "UTC; wait for it to end, or stop it" in said
    assert "\n" not in said


def test_of_many_drivers_one_gets_the_lease(store: Store) -> None:
    """All saw the same lease end; a compare-and-swap lets one of them have the next."""
    foreign(store, 4, released=True)
    got: list[int] = []
    refused: list[str] = []
    start = threading.Barrier(8)

    def drive() -> None:
        start.wait()
        try:
            got.append(lease.acquire(store, silent, TTL).token)
        except LeaseHeldError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=drive) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [5] and len(refused) == 7


def test_an_answer_that_was_lost_refuses_nobody(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The create arrives, its answer does not; the second try finds the first one's file."""
    create = store.create
    monkeypatch.setattr(store, "create", lambda *told: create(*told) and create(*told))
    with held(store, silent, TTL) as fenced:
        assert fenced.token == 1


def test_a_dead_holder_elsewhere_is_taken_over_after_its_time_to_live(store: Store) -> None:
    # Its clock is years ahead; nothing may depend on it.
    foreign(store, 1, since=time.time() + 1e8)
    told: list[str] = []
    began = time.monotonic()
    with held(store, told.append, 30.0) as mine:
        assert mine.token == 2
    assert time.monotonic() - began >= TTL
    assert "waiting up to 0.6 s" in told[0] and "on elsewhere" in told[0]
    assert "taking over" in told[1]


def test_a_holder_elsewhere_that_beats_is_left_alone(store: Store) -> None:
    """Its clock stands still; its heartbeats show that it lives."""
    other = foreign(store, 1, ttl=1.2)
    stop = threading.Event()

    def beat() -> None:
        beats = 0
        while not stop.wait(0.2):
            beats += 1
            lives = other.model_copy(update={"beats": beats})
            store.write_bytes(lease_name(1), lives.model_dump_json().encode())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(LeaseHeldError, match="on elsewhere"):
            lease.acquire(store, lambda line: None, TTL)
    finally:
        stop.set()
        thread.join()
    assert current(store).token == 1


def test_heartbeats_keep_the_lease_longer_than_its_time_to_live(store: Store) -> None:
    holder = holding(store)
    try:
        # As seen from another machine, which cannot look at its process.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lease, "_machine", lambda: "another boot")
            for _ in range(2):
                with pytest.raises(LeaseHeldError):
                    lease.acquire(store, lambda line: None, TTL)
        assert current(store).beats >= 2
    finally:
        holder.communicate("")
    assert holder.returncode == 0 and current(store).released


def test_a_killed_driver_of_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    holder = holding(store, ttl=3600.0)
    with pytest.raises(LeaseHeldError, match=f"held by process {holder.pid} on"):
        lease.acquire(store, silent, TTL)
    holder.kill()
    # Before it is waited for, so as a zombie; an hour's time to live is not waited for.
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    told: list[str] = []
    with held(store, told.append, TTL) as mine:
        assert mine.token == 2
    assert len(told) == 1 and "taking over" in told[0]
    holder.communicate()


def test_a_pid_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    mine = lease._own(1, 3600.0)
    started = mine.process_started
    assert started is not None
    other = mine.model_copy(update={"process_started": started - 1})
    store.create(lease_name(1), other.model_dump_json().encode())
    with held(store, lambda line: None, TTL) as fenced:
        assert fenced.token == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_driver_that_is_asked_to_end_releases_the_lease(tmp_path: Path, number: int) -> None:
    store = Store(str(tmp_path))
    holder = holding(store, ttl=3600.0)
    holder.send_signal(number)
    holder.communicate(timeout=30)
    assert holder.returncode != 0 and current(store).released


def test_an_error_releases_the_lease(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with pytest.raises(ZeroDivisionError), held(store, silent, TTL):
        _ = 1 / 0
    assert current(store).released


def test_a_driver_that_lost_its_lease_publishes_nothing(store: Store) -> None:
    """It was suspended for so long that another took over, and knows of nothing."""
    stale = store.fenced(1)
    assert stale.publish(record("000000"))
    foreign(store, 2)
    for publish in (
        lambda: stale.publish(record("000001")),
        lambda: stale.write_json("round=01/plan.json", {}),
        lambda: pickle.loads(pickle.dumps(stale)).publish(record("000001")),
    ):
        with pytest.raises(LeaseLostError, match=r"taken it over \(leases/000002.json\)"):
            publish()
    assert store.record_names() == {record("000000").name}
    assert store.fenced(2).publish(record("000001"))


def test_a_driver_that_lost_its_lease_stops(store: Store) -> None:
    """Wherever its main thread is: here, waiting for something that does not come."""
    with (
        pytest.raises(LeaseLostError, match="another driver has taken it over"),
        held(store, silent, TTL),
    ):
        foreign(store, 2)
        threading.Event().wait(30)
    # What the other one holds is left as it is.
    assert current(store).token == 2 and not current(store).released


def test_of_two_with_one_token_the_overwritten_one_stops(store: Store) -> None:
    """As on a store that ignores the condition of a create."""
    with (
        pytest.raises(LeaseLostError, match=r"on elsewhere.* got the same lease"),
        held(store, silent, TTL),
    ):
        other = current(store).model_copy(update={"id": "other", "host": "elsewhere"})
        store.write_bytes(lease_name(1), other.model_dump_json().encode())
        threading.Event().wait(30)
    assert current(store).id == "other" and not current(store).released


def test_a_driver_that_cannot_renew_its_lease_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path / "run"))
    with (
        pytest.raises(LeaseLostError, match=r"cannot renew the lease: .*not found"),
        held(store, silent, TTL),
    ):
        (tmp_path / "run").rename(tmp_path / "gone")
        threading.Event().wait(30)


def test_a_driver_whose_store_never_answers_stops(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that renews waits in a call that does not return."""
    hanging, written = threading.Event(), []

    def hang(_: Store, relative: str, data: bytes) -> None:
        written.append(data)
        hanging.wait(30)

    with (
        pytest.raises(LeaseLostError, match="cannot renew the lease: the store does not answer"),
        held(store, silent, TTL),
    ):
        monkeypatch.setattr(Store, "write_bytes", hang)
        threading.Event().wait(30)
    hanging.set()
    assert len(written) == 1 and not json.loads(written[0])["released"]


def test_a_lease_that_is_lost_too_late_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last heartbeat is on its way when the run is over, and then says that it is lost."""
    store, waiting, told = Store(str(tmp_path)), threading.Event(), threading.Event()

    def late(_: Store) -> None:
        waiting.set()
        time.sleep(4 * TTL / lease._BEATS)
        told.set()
        raise LeaseLostError("too late")

    with held(store, silent, TTL):
        monkeypatch.setattr(Store, "fence", late)
        assert waiting.wait(30)
    signals: list[object] = []
    monkeypatch.setattr(signal, "pthread_kill", lambda *them: signals.append(them))
    assert told.wait(30)
    time.sleep(0.1)
    assert signals == [] and not current(store).released


def test_a_damaged_lease_is_one_line(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.create(lease_name(3), b"{")
    with pytest.raises(StoreError, match=r"leases/000003\.json is not a lease"):
        lease.acquire(store, silent, TTL)


def test_the_highest_token_counts_not_the_last_name(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for token in (999_999, 1_000_000):
        foreign(store, token, released=True)
    store.write_bytes("leases/000001.json.0f", b"left by a kill")
    with held(store, silent, TTL) as mine:
        assert mine.token == 1_000_001


def test_sigterm_is_told_from_ctrl_c_though_what_waits_does_not() -> None:
    """As Ray's native code does."""
    with pytest.raises(Terminated), terminable():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Terminated:
            raise KeyboardInterrupt from None
    with pytest.raises(KeyboardInterrupt) as caught, terminable():
        signal.raise_signal(signal.SIGINT)
    assert not isinstance(caught.value, Terminated)


def test_sigterm_is_handled_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), terminable():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
