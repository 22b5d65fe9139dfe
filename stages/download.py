"""Download: URLs, and images in files, to resized images with a status and a reason for each row.

img2dataset's `Resizer` resizes and encodes (see `stages.keeper`). The loop around it is ours,
because img2dataset's gives rows in the order of arrival, loses rows when a writer fails and still
reports success, and resumes by shard number. Here rows in = rows out, in order, whatever a server
or a file does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from stages import media
from stages.base import Resources, ShardStage, operational
from stages.crawl import Crawler
from stages.fetch import FetchConfig
from stages.keeper import ImageConfig, ImageKeeper, Outcome
from stages.schemas import DOWNLOAD, SOURCES, check

STATUSES = (
    "success",
    "duplicate_row",  # an earlier row has the same image and text
    "invalid_url",  # not http(s), or no address at all
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
    "unreadable",  # a file or tar member that is not there
    "hash_mismatch",  # other bytes than the source says
    "not_an_image",  # not one of the formats that are read
    "decode",  # an image by its first bytes, but damaged
    "too_small",
    "aspect",  # too long and narrow
    "failed",  # the worker or something unforeseen
    "quarantined",  # the row crashed its worker
    "removed",  # a tombstone forbids its use
)


RETRYABLE = frozenset({"dns", "refused", "timeout", "tls", "http_5xx", "broken_response", "failed"})
"""Statuses of rows that may come another day; so may http_4xx with one of TRY_AGAIN_CODES."""


class DownloadConfig(FetchConfig, ImageConfig):
    """What is fetched, and how images are kept."""

    resources: Resources = operational(
        Resources(cpus=1.0, gpus=0.0, min_replicas=1, max_replicas=64)
    )


class DownloadStage(ShardStage):
    """SOURCES → DOWNLOAD: one row out for each row in, in order.

    Each sample of the shard is fetched once; the first of its rows that is no repeat holds the
    image, later ones have null there and the same status.
    """

    name = "download"
    version = 4
    input_schema = SOURCES
    output_schema = DOWNLOAD

    def __init__(self, config: DownloadConfig) -> None:
        self.config = config

    @property
    def resources(self) -> Resources:
        return self.config.resources

    def setup(self) -> None:
        self._crawler = Crawler(self.config)
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
        """(sample_id, outcome) of each row, in the order of arrival."""
        of_media: dict[str, list[str]] = {}
        of_url: dict[str, str] = {}
        hashes = {row["sample_id"]: row["image_hash"] for row in rows if row["image_hash"]}
        for row in rows:
            if row["url"] is not None:
                of_url[row["sample_id"]] = row["url"]
            elif row["media"] is not None:
                of_media.setdefault(row["media"], []).append(row["sample_id"])
            else:
                yield row["sample_id"], Outcome("invalid_url", "neither a URL nor an image file")
        for name, data in media.read_many(of_media, self.config.max_bytes):
            if isinstance(data, OSError):
                outcome = Outcome("unreadable", str(data)[:300])
            elif len(data) > self.config.max_bytes:
                outcome = Outcome("too_large", f"more than {self.config.max_bytes} bytes")
            else:
                outcome = self._keep(data)
            yield from ((sample, outcome) for sample in of_media[name])
        # Images are decoded here, one at a time, while the crawler's threads go on.
        for sample, fetched in self._crawler.fetch_all(of_url):
            if fetched.status == "success":
                outcome = self._judged(fetched.body, hashes.get(sample), fetched.content_type)
                yield sample, replace(outcome, http_code=fetched.code)
            else:
                yield sample, Outcome(fetched.status, fetched.detail, fetched.code)

    def _judged(self, data: bytes, expected: str | None, content_type: str = "") -> Outcome:
        """Of bytes that must have the hash ``expected``, where there is one."""
        if expected is not None and (problem := _mismatch(data, expected)) is not None:
            return Outcome("hash_mismatch", problem, sha256=hashlib.sha256(data).hexdigest())
        return self._keep(data, content_type)


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
