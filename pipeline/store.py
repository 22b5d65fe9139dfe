"""The run folder: payloads, and the records that publish them.

Payloads (Parquet, tar, model folders) go to names that no other attempt uses. A `Record`, created
only if absent, names its payloads and their checksums; it alone publishes. Whatever no record
names is scratch. So a kill at any moment leaves nothing half-published, and running again redoes
only what has no record.

Any fsspec filesystem will do: local, ``s3://``, ``gs://``; ``memory://`` for unit tests only,
since other processes cannot see it.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import fsspec.implementations.local
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.records import Payload, Record, lease_name
from stages.errors import LeaseLostError, StoreError, from_remote_store

_CHUNK = 1 << 20
_AT_ONCE = 16
"""Requests for small files that wait for a store beside each other."""
_STREAMS = 8
"""Large files that are fetched beside each other."""


class Store:
    """A run folder at ``url``. Cheap to build and to pickle; holds no open files.

    Args:
        token: of the lease under which records are published; None checks for no lease.

    Raises:
        StoreError: the place cannot be reached or written.
    """

    def __init__(self, url: str, token: int | None = None) -> None:
        self.url, self.token = url, token
        try:
            # Other processes write here too, so a listing that is kept would soon be wrong.
            self.fs, self.root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError, OSError) as error:
            raise StoreError(
                f"run folder {url!r}: {error}; use a local path or an s3:// or gs:// URL"
            ) from error
        self.root = str(self.root).rstrip("/")

    def __reduce__(self) -> tuple[type[Store], tuple[str, int | None]]:
        # A relative path would mean another folder in a worker that runs elsewhere.
        return Store, (self.root if self.is_local else self.url, self.token)

    def fenced(self, token: int) -> Store:
        """The same run folder, for a driver that holds the lease ``token``, and for its workers."""
        return Store(self.url, token)

    def fence(self) -> None:
        """Make sure that no other driver has taken the run over.

        Raises:
            LeaseLostError: there is a later lease than ours.
        """
        if self.token is not None and self.exists(lease_name(self.token + 1)):
            raise LeaseLostError(
                f"run folder {self.url!r}: another driver has taken it over "
                f"({lease_name(self.token + 1)}); this one stops"
            )

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, fsspec.implementations.local.LocalFileSystem)

    @property
    def cache(self) -> Path:
        """Where this machine keeps copies of files from a remote store."""
        # However the address is spelt: `forget --scrub` clears one cache, and must know which.
        place = str(self.fs.unstrip_protocol(self.root))
        name = hashlib.sha256(place.encode()).hexdigest()[:16]
        ours = Path(tempfile.gettempdir()) / f"capfilt-{os.getuid()}"
        ours.mkdir(mode=0o700, exist_ok=True)
        state = ours.stat()
        # Others may write to the folder above: what they put in our place is not to be loaded.
        if state.st_uid != os.getuid() or state.st_mode & 0o022:
            raise StoreError(f"{ours}: others can write to it; remove it, or set TMPDIR")
        return ours / name

    def path(self, relative: str) -> str:
        """Full path of ``relative`` on the store's filesystem."""
        return f"{self.root}/{relative}"

    @contextmanager
    def _talking(self, doing: str) -> Iterator[None]:
        """Turn what a filesystem raises into one line that names the run folder."""
        try:
            yield
        except FileNotFoundError as error:
            raise StoreError(f"run folder {self.url!r}: {doing}: not found: {error}") from error
        except OSError as error:
            raise StoreError(f"run folder {self.url!r}: {doing}: {_one_line(error)}") from error
        except Exception as error:
            if not from_remote_store(error):
                raise
            raise StoreError(f"run folder {self.url!r}: {doing}: {_one_line(error)}") from error

    def _make_parent(self, relative: str) -> None:
        """Make the folder of a file. Object stores have none: there, fsspec's ``makedirs`` would
        make the bucket, so a misspelt one would come into being."""
        protocols = self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,)
        if _OBJECT_STORES.isdisjoint(protocols):
            self.fs.makedirs(self.path(relative).rpartition("/")[0], exist_ok=True)

    def ensure(self) -> None:
        """Make the run folder and prove that it can be written.

        Raises:
            StoreError: it cannot.
        """
        with self._talking("cannot be written"):
            probe = f"scratch/.probe-{uuid.uuid4().hex}"
            self._make_parent(probe)
            self.fs.pipe_file(self.path(probe), b"")
            self.fs.rm_file(self.path(probe))

    def exists(self, relative: str) -> bool:
        with self._talking(f"cannot look for {relative}"):
            if not self.is_local:
                return bool(self.fs.exists(self.path(relative)))
            # fsspec's says no to whatever goes wrong, an I/O error or Ctrl-C: no fence would hold.
            try:
                Path(self.path(relative)).stat()
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

    # ---- small files -------------------------------------------------------------------------

    def read_bytes(self, relative: str) -> bytes:
        with self._talking(f"cannot read {relative}"):
            return bytes(self.fs.cat_file(self.path(relative)))

    def write_bytes(self, relative: str, data: bytes) -> None:
        """Replace a small file as a whole; for what is not a record (run.json, plans)."""
        with self._talking(f"cannot write {relative}"):
            self._make_parent(relative)
            if not self.is_local:
                self.fs.pipe_file(self.path(relative), data)
                return
            scratch = f"{self.path(relative)}.{uuid.uuid4().hex}"
            Path(scratch).write_bytes(data)
            Path(scratch).replace(self.path(relative))

    def create(self, relative: str, data: bytes) -> bool:
        """Write a file that must not exist yet. False, and nothing changed, if it does: read back
        what is there, which may be what a lost answer hid.

        Atomic: readers see the whole file or none, and of two writers one wins.
        """
        target = self.path(relative)
        with self._talking(f"cannot write {relative}"):
            self._make_parent(relative)
            if self.is_local:
                return _create_local(Path(target), data)
            try:
                self.fs.pipe_file(target, data, mode="create")
            except OSError:
                # Stores refuse in ways of their own, and s3fs knows one of them as FileExistsError.
                if not self.fs.exists(target):
                    raise
                return False
            return True

    def remove(self, relative: str) -> None:
        """Remove a file or folder of the scratch area; nothing happens if it is not there."""
        with self._talking(f"cannot remove {relative}"):
            if self.exists(relative):
                self.fs.rm(self.path(relative), recursive=True)

    # ---- payloads ----------------------------------------------------------------------------

    def put_table(self, folder: str, table: pa.Table) -> Payload:
        """Write a table below ``folder`` under a name of its own."""
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        return self.put_named(folder, ".parquet", buffer.getvalue(), table.num_rows)

    def put_named(self, folder: str, ending: str, data: bytes, rows: int | None = None) -> Payload:
        """Write bytes below ``folder`` under a name of their own that ends in ``ending``."""
        relative = f"{folder}/{_attempt()}{ending}"
        with self._talking(f"cannot write {relative}"):
            self._make_parent(relative)
            self.fs.pipe_file(self.path(relative), data)
        return Payload(
            path=relative, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=rows
        )

    def put_file(self, relative: str, local: Path) -> Payload:
        """Copy a local file to ``relative``, a name that no other attempt uses."""
        digest = hashlib.sha256()
        with self._talking(f"cannot write {relative}"):
            self._make_parent(relative)
            with local.open("rb") as source, self.fs.open(self.path(relative), "wb") as target:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    target.write(chunk)
        rows = pq.read_metadata(local).num_rows if local.suffix == ".parquet" else None
        return Payload(
            path=relative, bytes=local.stat().st_size, sha256=digest.hexdigest(), rows=rows
        )

    def put_unique(self, folder: str, ending: str, local: Path) -> Payload:
        """Copy a local file below ``folder`` under a name of its own."""
        return self.put_file(f"{folder}/{_attempt()}{ending}", local)

    def put_folder(self, folder: str, local: Path) -> tuple[Payload, ...]:
        """Copy every file of a local folder below ``folder/<attempt>/``."""
        attempt = _attempt()
        return tuple(
            self.put_file(f"{folder}/{attempt}/{file.relative_to(local).as_posix()}", file)
            for file in sorted(local.rglob("*"))
            if file.is_file()
        )

    def read_table(self, payload: Payload, columns: list[str] | None = None) -> pa.Table:
        with self._parquet(payload.path) as file:
            return pq.read_table(file, columns=columns)

    def read_schema(self, payload: Payload) -> pa.Schema:
        """The columns of a Parquet file, comments included."""
        with self._parquet(payload.path) as file:
            return pq.read_schema(file)

    @contextmanager
    def _parquet(self, relative: str) -> Iterator[Any]:
        with (
            self._talking(f"cannot read {relative}"),
            self.fs.open(self.path(relative), "rb") as file,
        ):
            try:
                yield file
            except pa.ArrowInvalid as error:
                raise StoreError(
                    f"run folder {self.url!r}: {relative} is not readable Parquet; "
                    "run `capfilt verify`"
                ) from error

    def local_copy(self, relative: str) -> Path:
        """A local path to the file: itself on a local store, else a copy in `cache`.

        Payload names are never reused, so a copy never goes stale.
        """
        if self.is_local:
            return Path(self.path(relative))
        target = self.cache / relative
        lock = self.cache / ".locks" / hashlib.sha256(relative.encode()).hexdigest()
        # Workers of one machine want the same weights at once: one fetches, the others wait.
        with nullcontext() if target.exists() else _one_at_a_time(lock):
            if not target.exists():
                self._fetch(relative, target)
        return target

    def drop_copy(self, relative: str) -> None:
        """Give back the space of `local_copy`; the file itself stays in the store."""
        if not self.is_local:
            (self.cache / relative).unlink(missing_ok=True)

    def _fetch(self, relative: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            self._talking(f"cannot read {relative}"),
            self.fs.open(self.path(relative), "rb") as source,
            tempfile.TemporaryDirectory(dir=target.parent) as scratch,
        ):
            copy = Path(scratch, "copy")
            with copy.open("wb") as file:
                shutil.copyfileobj(source, file, _CHUNK)
            copy.replace(target)

    def local_copies(self, files: Sequence[str]) -> list[Path]:
        """`local_copy` of each, several at once: one stream fills no machine's network."""
        with ThreadPoolExecutor(_STREAMS) as pool:
            return list(pool.map(self.local_copy, files))

    def local_folder(self, relative: str) -> Path:
        """A local path to a folder of payloads, copied file by file from a remote store."""
        if self.is_local:
            return Path(self.path(relative))
        with self._talking(f"cannot list {relative}"):
            found = self.fs.find(self.path(relative))
        self.local_copies([str(name)[len(self.root) + 1 :] for name in found])
        return self.cache / relative

    def checksum(self, payload: Payload) -> str | None:
        """sha256 of the file as it is now, or None where it is missing."""
        with self._talking(f"cannot read {payload.path}"):
            try:
                with self.fs.open(self.path(payload.path), "rb") as file:
                    return hashlib.file_digest(file, "sha256").hexdigest()
            except FileNotFoundError:
                return None

    def files(self, folder: str = "") -> dict[str, int]:
        """Path → bytes of every file below ``folder`` of the run folder: one listing."""
        with self._talking(f"cannot list {folder or 'it'}"):
            try:
                found = self.fs.find(self.path(folder).rstrip("/"), detail=True)
            except FileNotFoundError:
                return {}
        return {name[len(self.root) + 1 :]: int(info["size"]) for name, info in found.items()}

    # ---- records -----------------------------------------------------------------------------

    def publish(self, record: Record) -> bool:
        """Create the record, with our token. False if another attempt published the same work
        first.

        Raises:
            LeaseLostError: another driver has taken the run over.
        """
        self.fence()
        return self._publish(record)

    def publish_all(self, records: Iterable[Record]) -> None:
        """`publish` each of them, many at once: a remote store answers each after a while. An
        interrupt waits for those that are under way."""
        waiting = iter(records)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            while some := list(islice(waiting, 16 * _AT_ONCE)):
                self.fence()
                list(pool.map(self._publish, some))

    def _publish(self, record: Record) -> bool:
        record = record.model_copy(update={"token": self.token})
        return self.create(record.name, record.model_dump_json(indent=1).encode())

    def replace(self, record: Record) -> None:
        """Put a record, with our token, in the place of the published one of that name, for
        `pipeline.scrub` alone.

        Raises:
            LeaseLostError: another driver has taken the run over.
        """
        self.fence()
        record = record.model_copy(update={"token": self.token})
        self.write_bytes(record.name, record.model_dump_json(indent=1).encode())

    def record_names(self) -> set[str]:
        """Paths of all records: one listing, nothing opened."""
        return {name for name in self.files("records") if name.endswith(".json")}

    def read_record(self, name: str) -> Record:
        return self._record(name, self.read_bytes(name))

    def _record(self, name: str, data: bytes) -> Record:
        try:
            return Record.model_validate_json(data)
        except ValueError as error:
            raise StoreError(f"run folder {self.url!r}: {name} is not a record") from error

    def read_records(self, names: Iterable[str]) -> list[Record]:
        """The records, in the order of their names; fetched together from remote stores."""
        ordered = sorted(names)
        if self.is_local:
            return [self.read_record(name) for name in ordered]
        with self._talking("cannot read records"):
            found = self.fs.cat([self.path(n) for n in ordered]) if ordered else {}
        return [self._record(name, found[self.path(name)]) for name in ordered]

    # ---- JSON documents ----------------------------------------------------------------------

    def read_json(self, relative: str) -> Any:
        """A JSON file that the run wrote, or None where there is none yet."""
        if not self.exists(relative):
            return None
        try:
            return json.loads(self.read_bytes(relative))
        except ValueError as error:
            raise StoreError(f"run folder {self.url!r}: {relative} is not JSON") from error

    def write_json(self, relative: str, value: object) -> None:
        """Replace a JSON document. Raises LeaseLostError as `publish` does."""
        self.fence()
        self.write_bytes(relative, json.dumps(value, indent=1, sort_keys=True).encode())


_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "az"})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _attempt() -> str:
    return uuid.uuid4().hex


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Inside, no other process or thread of this machine is; a process that dies lets go."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _create_local(target: Path, data: bytes) -> bool:
    """``link`` refuses an existing name, and the linked file is already complete."""
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    scratch.write_bytes(data)
    try:
        os.link(scratch, target)
    except FileExistsError:
        return False
    finally:
        scratch.unlink()
    return True
