"""Download: URLs, and images in files, to resized images with a status and a reason for each row.

img2dataset's `Resizer` resizes and encodes (see `stages.keeper`). The loop around it is ours,
because img2dataset's gives rows in the order of arrival, loses rows when a writer fails and still
reports success, and resumes by shard number. Here rows in = rows out, in order, whatever a server
or a file does.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import pyarrow as pa

from stages import media
from stages.base import Resources, ShardStage, operational
from stages.crawl import Crawler
from stages.fetch import FetchConfig, Fetched
from stages.hostbook import Ask, HostBook
from stages.keeper import ImageConfig, ImageKeeper, Outcome
from stages.schemas import DOWNLOAD, SOURCES, check

STATUSES = (
    "success",
    # An earlier row has the same URL and text. A URL that comes with another text is fetched once,
    # and each of its rows has its status: there is no `duplicate_url`, the texts are all wanted.
    "duplicate_row",
    "no_url",  # neither a URL nor a file that holds the image
    "invalid_url",  # not http(s)
    "blocked_address",  # inside the network
    "dns",
    "refused",  # no connection
    "timeout",
    "tls",
    "http_4xx",
    "http_5xx",
    "redirect",  # too many, or to somewhere that is not followed
    "broken_response",  # not HTTP, reset, or cut short
    "opted_out",  # a header disallows the use
    "too_large",  # bytes or pixels
    "unreadable",  # a file or tar member that is not there, or whose store does not give it
    "hash_mismatch",  # other bytes than the source says
    "not_an_image",  # not one of the formats that are read
    "decode",  # an image by its first bytes, but damaged
    "too_small",
    "aspect",  # too long and narrow
    "failed",  # the worker or something unforeseen
    "quarantined",  # the row crashed its worker
    "removed",  # a tombstone forbids its use
)


RETRYABLE = frozenset(
    {"dns", "refused", "timeout", "tls", "http_5xx", "broken_response", "unreadable", "failed"}
)
"""Statuses of rows that may come another day, files and their stores among them; so may http_4xx
with one of TRY_AGAIN_CODES."""


_Work: TypeAlias = tuple[list[str], Outcome | Callable[[], Outcome]]
"""sample_ids of one image, and what became of it or how to find out."""


class DownloadConfig(FetchConfig, ImageConfig):
    """What is fetched, and how images are kept."""

    decode_threads: int = operational(2, ge=1, le=16)
    """Threads that decode, hash and resize images, for each replica; up to 60 MB of memory each,
    beside one large image that takes up to 375 MB."""
    resources: Resources = operational(
        Resources(cpus=1.0, gpus=0.0, min_replicas=1, max_replicas=64)
    )


class DownloadStage(ShardStage):
    """SOURCES → DOWNLOAD: one row out for each row in, in order.

    Each sample of the shard is fetched once; the first of its rows that is no repeat holds the
    image, later ones have null there and the same status.
    """

    name = "download"
    version = 7
    input_schema = SOURCES
    output_schema = DOWNLOAD

    def __init__(self, config: DownloadConfig) -> None:
        self.config = config
        self._ask: Ask | None = None
        self._worker: str | None = None

    @property
    def resources(self) -> Resources:
        return self.config.resources

    def shared(self) -> HostBook:
        return HostBook(self.config.host_connections, self.config.host_failures)

    def share(self, ask: Ask, worker: str) -> None:
        self._ask, self._worker = ask, worker

    def setup(self) -> None:
        self._crawler = Crawler(self.config, self._ask, self._worker)
        self._keep = ImageKeeper(self.config)

    def process(self, table: pa.Table) -> pa.Table:
        rows = check(table, SOURCES, "download input").to_pylist()
        first: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row["repeat_of"] is None:
                first.setdefault(row["sample_id"], row)
        outcomes = dict(self._outcomes(list(first.values())))
        return _table(rows, outcomes)

    def failed(self, table: pa.Table, status: str, detail: str) -> pa.Table:
        rows = [{**row, "repeat_of": None} for row in table.to_pylist()]
        return _table(rows, {row["sample_id"]: Outcome(status, detail) for row in rows})

    def _outcomes(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Outcome]]:
        """(sample_id, outcome) of each row, in any order."""
        of_media: dict[str, list[str]] = {}
        of_url: dict[str, str] = {}
        hashes = {row["sample_id"]: row["image_hash"] for row in rows if row["image_hash"]}
        for row in rows:
            if row["url"] is not None:
                of_url[row["sample_id"]] = row["url"]
            elif row["media"] is not None:
                of_media.setdefault(row["media"], []).append(row["sample_id"])
            else:
                yield row["sample_id"], Outcome("no_url", "neither a URL nor an image file")
        # Closed at once if anything fails: the crawl ends, and gives back what it holds.
        with closing(self._work(of_media, of_url, hashes)) as work:
            for samples, outcome in _in_threads(work, self.config.decode_threads):
                yield from ((sample, outcome) for sample in samples)

    def _work(
        self,
        of_media: Mapping[str, list[str]],
        of_url: Mapping[str, str],
        hashes: Mapping[str, str],
    ) -> Generator[_Work]:
        deadline = time.monotonic() + self.config.shard_timeout
        yield from self._read(of_media, deadline)
        yield from self._fetched(of_url, hashes, deadline)

    def _read(self, of_media: Mapping[str, list[str]], deadline: float) -> Iterator[_Work]:
        for name, data in media.read_many(of_media, self.config.max_bytes, deadline):
            if isinstance(data, OSError):
                status = "timeout" if isinstance(data, TimeoutError) else "unreadable"
                yield of_media[name], Outcome(status, str(data)[:300])
            elif len(data) > self.config.max_bytes:
                problem = f"more than {self.config.max_bytes} bytes"
                yield of_media[name], Outcome("too_large", problem)
            else:
                yield of_media[name], partial(self._keep, data)

    def _fetched(
        self, of_url: Mapping[str, str], hashes: Mapping[str, str], deadline: float
    ) -> Iterator[_Work]:
        for sample, fetched in self._crawler.fetch_all(of_url, deadline):
            if fetched.status == "success":
                yield [sample], partial(self._judged, fetched, hashes.get(sample))
            else:
                self._crawler.release(fetched)
                yield [sample], Outcome(fetched.status, fetched.detail, fetched.code)

    def _judged(self, fetched: Fetched, expected: str | None) -> Outcome:
        """Of a body that must have the hash ``expected``, where there is one. Releases it."""
        try:
            if expected is not None and (problem := _mismatch(fetched.body, expected)) is not None:
                sha256 = hashlib.sha256(fetched.body).hexdigest()
                outcome = Outcome("hash_mismatch", problem, sha256=sha256)
            else:
                outcome = self._keep(fetched.body, fetched.content_type)
            return replace(outcome, http_code=fetched.code)
        finally:
            self._crawler.release(fetched)


def _in_threads(work: Iterable[_Work], threads: int) -> Iterator[tuple[list[str], Outcome]]:
    """The outcomes of ``work``, which goes on meanwhile; what waits for a thread is bounded, and
    is done even if nobody asks for it any more."""
    waiting: deque[tuple[list[str], Future[Outcome]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        for samples, job in work:
            if isinstance(job, Outcome):
                yield samples, job
                continue
            waiting.append((samples, pool.submit(job)))
            if len(waiting) > 2 * threads:
                yield _result(waiting.popleft())
        yield from map(_result, waiting)


def _result(done: tuple[list[str], Future[Outcome]]) -> tuple[list[str], Outcome]:
    samples, future = done
    return samples, future.result()


_HASHES = {32: "md5", 40: "sha1", 64: "sha256", 128: "sha512"}
"""Hex digits → the function that a source means."""


def _mismatch(data: bytes, expected: str) -> str | None:
    name = _HASHES.get(len(expected))
    if name is None:
        return f"{expected[:40]!r} is no md5, sha1, sha256 or sha512 in hex"
    found = hashlib.new(name, data, usedforsecurity=False).hexdigest()
    return None if found == expected else f"{name} is {found[:16]}…, not {expected[:16]}…"


def _table(rows: Sequence[Mapping[str, Any]], outcomes: Mapping[str, Outcome]) -> pa.Table:
    """DOWNLOAD rows; the first row of a sample takes its image."""
    seen: set[str] = set()
    out = []
    for row in rows:
        sample = row["sample_id"]
        if row["repeat_of"] is not None:
            outcome = Outcome("duplicate_row", f"same image and text as row {row['repeat_of']}")
        else:
            outcome = outcomes[sample]
            if sample in seen:
                outcome = replace(outcome, image=None)
            seen.add(sample)
        kept = {name: row[name] for name in ("row_id", "sample_id", "source", "url", "text")}
        out.append({**kept, **vars(outcome)})
    return pa.Table.from_pylist(out, schema=DOWNLOAD)
