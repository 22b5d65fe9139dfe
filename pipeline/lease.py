"""One driver a run: the lease on a run folder, its heartbeat, and the fencing token.

Every lease is a file of its own, ``leases/000007.json``, created only if absent and never removed.
Its number is the fencing token. Who takes a run over creates the next number: of all who saw lease
7 end, one gets lease 8. That is the compare-and-swap, made of the very write that publishes
records, so it holds wherever records do. Only its holder ever rewrites a lease: to show a
heartbeat, and that it is released.

No two clocks are compared. A lease has expired once its file stayed the same for its time to live
by the clock of the one who watches; a holder that could not renew it for nearly as long stops by
itself, also where the store never answers. On one machine, a process that is gone is known to be
gone at once.

A driver that stalls, is taken over and wakes up again finds the next number when it publishes
(`pipeline.store.Store.fence`) or at its next heartbeat, and stops. A record that it was writing in
that very moment does no harm: it is named by its content and created once.

Where a store ignores the condition of a create (some S3 servers do), two drivers that start in the
same moment both believe that they hold the lease, until the first heartbeat of one of them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from pipeline.records import lease_name
from pipeline.store import Store
from stages.base import Config
from stages.errors import CapfiltError, LeaseHeldError, LeaseLostError, StoreError

_TTL = 60.0
_BEATS = 6
"""Heartbeats in a time to live; also how often one who waits looks."""


class Lease(Config):
    """What a lease file says of its holder."""

    token: int
    """1 for the first driver of a run; each later lease has a higher one."""
    id: str
    """Random: tells holders of one token apart where a store let two create it."""
    host: str
    pid: int
    job: str | None
    """What a job system calls the driver."""
    machine: str | None
    """Boot and process namespace, in which a pid means one process; None where unknown."""
    process_started: int | None
    """Clock ticks from boot to the start of the process: a pid may be given again."""
    since: float
    """Seconds since the epoch, UTC, by the holder's clock; for people only."""
    ttl: float
    """Seconds without a heartbeat after which the lease has expired."""
    beats: int = 0
    released: bool = False

    @property
    def holder(self) -> str:
        """Who holds it and since when, for a person."""
        job = f", job {self.job}" if self.job else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(self.since))
        return f"process {self.pid} on {self.host}{job}, since {since} UTC"


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM."""


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated` in the main thread, so that what is held is let go."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    asked = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt as error:
        # Ray, interrupted while it waits, raises a KeyboardInterrupt of its own.
        if asked and not isinstance(error, Terminated):
            raise Terminated from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def held(store: Store, tell: Callable[[str], None], ttl: float = _TTL) -> Iterator[Store]:
    """Inside, this process is the only driver of the run; yields the store with its token.

    Args:
        tell: gets a line when another driver's sign of life has to be waited for.
        ttl: seconds without a heartbeat after which another driver may take over.

    Raises:
        LeaseHeldError: another driver is at work.
        LeaseLostError: another driver has taken over. Raised in the main thread, wherever it is.
    """
    with terminable():
        lease = acquire(store, tell, ttl)
        heart = _Heart(store, lease)
        heart.start()
        try:
            yield store.fenced(lease.token)
        except BaseException as error:
            if heart.lost is not None:
                raise heart.lost from error
            raise
        finally:
            heart.stop()


def current(store: Store) -> Lease | None:
    """The run's last lease, or None if it never had one.

    Raises:
        StoreError: the store cannot be read, or the lease is not one.
    """
    names = [name for name in store.files("leases") if _token(name)]
    return _read(store, max(names, key=_token)) if names else None


def driver(store: Store) -> str | None:
    """Who has the run's lease, in words, and whether it is at work; None if it was given back."""
    last = current(store)
    if last is None or last.released:
        return None
    alive = _alive(last)
    if alive is None:
        return f"{last.holder}; whether it still runs cannot be told from here"
    return last.holder if alive else f"ended without a word: {last.holder}"


def _token(name: str) -> int:
    """The token in a lease's name; 0 for any other file."""
    stem = Path(name).stem
    return int(stem) if stem.isdigit() and name == lease_name(int(stem)) else 0


def _read(store: Store, name: str) -> Lease:
    data = store.read_bytes(name)
    try:
        return Lease.model_validate_json(data)
    except ValueError as error:
        raise StoreError(f"run folder {store.url!r}: {name} is not a lease") from error


def _bytes(lease: Lease) -> bytes:
    return lease.model_dump_json(indent=1).encode()


# ---- taking it -------------------------------------------------------------------------------


def acquire(store: Store, tell: Callable[[str], None], ttl: float) -> Lease:
    """Take the next lease, once the last one has ended.

    Raises:
        LeaseHeldError: it has not, or another driver was faster.
    """
    last = current(store)
    if last is not None:
        last = _ended(store, last, tell)
    mine = _own(1 if last is None else last.token + 1, ttl)
    name = lease_name(mine.token)
    store.create(name, _bytes(mine))
    # What counts is what is there: the answer may have been lost on its way, so that a second try
    # found the first one's file; and some stores let two create one file.
    there = _read(store, name)
    if there.id == mine.id:
        return mine
    raise _refusal(store, there)


def _own(token: int, ttl: float) -> Lease:
    return Lease(
        token=token,
        id=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=os.getpid(),
        job=_job(),
        machine=_machine(),
        process_started=_started(os.getpid()),
        since=time.time(),
        ttl=ttl,
    )


def _ended(store: Store, last: Lease, tell: Callable[[str], None]) -> Lease:
    """The last lease once it has ended: released, its process gone, or expired.

    Raises:
        LeaseHeldError: it shows a sign of life.
    """
    if last.released:
        return last
    alive = _alive(last)
    if alive:
        raise _refusal(store, last)
    if alive is None:
        tell(f"waiting up to {last.ttl:g} s for a sign of life: the run is held by {last.holder}")
        patience = time.monotonic() + last.ttl
        while time.monotonic() < patience:
            time.sleep(last.ttl / _BEATS)
            now = current(store)
            if now is not None and now != last:
                if now.released:
                    return now
                raise _refusal(store, now)
    tell(f"taking over: no sign of life of {last.holder}")
    return last


def _refusal(store: Store, lease: Lease) -> LeaseHeldError:
    return LeaseHeldError(
        f"run folder {store.url!r}: held by {lease.holder}; wait for it to end, or stop it"
    )


def _alive(lease: Lease) -> bool | None:
    """Whether the holder's process is there; None where this machine cannot tell."""
    if lease.machine is None or (lease.machine, lease.host) != (_machine(), socket.gethostname()):
        return None
    return _started(lease.pid) == lease.process_started


def _machine() -> str | None:
    """This boot and process namespace; None where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return None


def _started(pid: int) -> int | None:
    """When a process of this machine began, in clock ticks since boot; None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name, in parentheses, may hold anything; the state follows it (proc(5), fields 3 and 22).
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def _job() -> str | None:
    """What Ray's job server, or Slurm, calls this process."""
    with suppress(ValueError, KeyError, TypeError):
        metadata = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])["metadata"]
        return str(metadata["job_submission_id"])
    return os.environ.get("SLURM_JOB_ID")


# ---- keeping it ------------------------------------------------------------------------------


class _Heart:
    """Renews a lease from a thread, and interrupts the main thread if it is lost. A second thread
    looks at the time, for a store may let the first one wait for ever."""

    def __init__(self, store: Store, lease: Lease) -> None:
        self.lost: LeaseLostError | None = None
        self._store, self._lease = store, lease
        self._interval = lease.ttl / _BEATS
        self._passed = self._renewed = 0
        """Intervals that have passed, and had when the last good heartbeat was sent. Time in which
        the process was suspended counts as one."""
        self._why = "the store does not answer"
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._main = threading.get_ident()
        self._interrupts = threading.current_thread() is threading.main_thread()
        self._threads = [
            threading.Thread(target=work, name="lease", daemon=True)
            for work in (self._beat, self._watch)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End the heartbeat and release the lease, if it is still ours. A store that cannot be
        reached is no error here: the lease will expire."""
        with self._lock:  # from here on nobody signals
            self._stop.set()
        for thread in self._threads:
            thread.join(self._interval)
        if self.lost is None and not any(thread.is_alive() for thread in self._threads):
            with suppress(CapfiltError):
                self._renew(released=True)

    def _beat(self) -> None:
        while not self._stop.wait(self._interval) and self.lost is None:
            sent = self._passed
            try:
                self._renew()
                self._renewed = sent
            except LeaseLostError as error:
                self._lose(error)
            except Exception as error:  # noqa: BLE001 - nothing may end the heartbeat unseen
                self._why = str(error)

    def _watch(self) -> None:
        while not self._stop.wait(self._interval) and self.lost is None:
            self._passed += 1
            # One who watches may take over a full time to live after the last heartbeat.
            if self._passed - self._renewed >= _BEATS - 1:
                self._lose(LeaseLostError(f"cannot renew the lease: {self._why}"))

    def _lose(self, error: LeaseLostError) -> None:
        with self._lock:
            if self.lost is not None or self._stop.is_set():
                return
            self.lost = error
            if self._interrupts:
                signal.pthread_kill(self._main, signal.SIGTERM)

    def _renew(self, released: bool = False) -> None:
        self._store.fenced(self._lease.token).fence()
        name = lease_name(self._lease.token)
        there = _read(self._store, name)
        if there.id != self._lease.id:
            raise LeaseLostError(
                f"run folder {self._store.url!r}: {there.holder}, got the same lease; "
                "this one stops"
            )
        renewed = there.model_copy(update={"beats": there.beats + 1, "released": released})
        self._store.write_bytes(name, _bytes(renewed))
