"""Images that lie in files: beside a human-annotated set, or in the tars of a WebDataset.

A ``media`` name is ``<file>`` or ``<tar>#<member>``, a local path or an fsspec URL. Only ingest
writes such names, never a text from the web.
"""

from __future__ import annotations

import hashlib
import math
import re
import tarfile
import time
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from stages.errors import from_remote_store

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"})

_TAR_MEMBER = re.compile(r"^(.*?\.tar(?:\.gz)?)#(.*)$", re.DOTALL | re.IGNORECASE)


def is_image(name: str) -> bool:
    """Whether a file is called like one."""
    stem, _, extension = name.rpartition("/")[2].rpartition(".")
    return bool(stem) and extension.lower() in IMAGE_EXTENSIONS


def member_name(tar: str, member: str) -> str:
    return f"{tar}#{member}"


def split_name(media: str) -> tuple[str, str | None]:
    """(file, None) or (tar, member)."""
    found = _TAR_MEMBER.match(media)
    return (found[1], found[2]) if found else (media, None)


def sha256(media: str) -> str:
    """Of the bytes of one file (not of a tar's member), in hex; it may be of any size.

    Raises:
        OSError: it cannot be read.
    """
    import fsspec

    with fsspec.open(media, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(media: str, max_bytes: int | None = None) -> bytes:
    """The bytes of one file (not of a tar's member); with ``max_bytes``, at most one byte more.

    Raises:
        OSError: it cannot be read.
    """
    import fsspec

    with fsspec.open(media, "rb") as file:
        data: bytes = file.read(-1 if max_bytes is None else max_bytes + 1)
    return data


def read_many(
    names: Iterable[str], max_bytes: int | None = None, deadline: float = math.inf
) -> Iterator[tuple[str, bytes | OSError]]:
    """(name, bytes or why not) for each distinct name. Each tar is passed through once.

    What has not begun by ``deadline`` (of `time.monotonic`) is TimeoutError. A read that has begun
    ends by the time-outs of its file system.
    """
    tars: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(names):
        path, member = split_name(name)
        if member is not None:
            tars.setdefault(path, {})[member] = name
            continue
        try:
            _in_time(deadline)
            yield name, read(name, max_bytes)
        except Exception as error:
            problem = _problem(name, error)
            if problem is None:
                raise
            yield name, problem
    for tar, wanted in tars.items():
        yield from _read_members(tar, wanted, max_bytes, deadline)


def _problem(path: str, error: Exception) -> OSError | None:
    """Why a file could not be read; None for what is no matter of the file but a bug."""
    if isinstance(error, OSError):
        return error
    if isinstance(error, tarfile.TarError | EOFError | zlib.error) or from_remote_store(error):
        return OSError(f"{path}: {error}")
    return None


def _in_time(deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise TimeoutError("the shard's time was up")


def tar_members(path: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The regular files of a tar in order, in one pass.

    Raises:
        OSError, tarfile.TarError, EOFError: it cannot be read.
    """
    import fsspec

    with (
        fsspec.open(path, "rb") as file,
        tarfile.open(fileobj=file, mode="r|*", encoding="utf-8") as tar,
    ):
        for member in tar:
            if member.isfile():
                # Arrow and JSON take no half characters, which stand for bytes that are no UTF-8.
                member.name = member.name.encode("utf-8", "backslashreplace").decode("utf-8")
                yield tar, member
            tar.members = []  # type: ignore[attr-defined]  # tarfile would remember every header


def member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo, limit: int | None = None) -> bytes:
    file: Any = tar.extractfile(member)
    data: bytes = file.read(-1 if limit is None else limit + 1)
    return data


def _read_members(
    path: str, wanted: dict[str, str], max_bytes: int | None, deadline: float
) -> Iterator[tuple[str, bytes | OSError]]:
    problem: OSError | None = None
    try:
        _in_time(deadline)
        for tar, member in tar_members(path):
            _in_time(deadline)
            name = wanted.pop(member.name, None)
            if name is not None:
                yield name, member_bytes(tar, member, max_bytes)
            if not wanted:
                return
    except Exception as error:
        problem = _problem(path, error)
        if problem is None:
            raise
    for member_left, name in wanted.items():
        yield name, problem or FileNotFoundError(f"no member {member_left} in {path}")
