"""Fetching one URL from a web that lies: bounded in time, size, redirects and reach.

From img2dataset comes the check of opt-out headers (`img2dataset.downloader.is_disallowed`). Its
fetch, `download_image`, is not used: it calls `urllib.request.urlopen`, which only an opener
installed for the whole process could restrain, reads bodies of any size, sets no limit on the
total time, retries what cannot succeed, and presents itself as Firefox.
"""

from __future__ import annotations

import http.client
import os
import random
import socket
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import cast
from urllib.parse import urljoin

from pydantic import Field, field_validator

from stages.base import Config, operational
from stages.connect import Connector, FetchError, Target, TimedSocket, parse_url, translated, words

OPT_OUT_DIRECTIVES = ("noai", "noimageai", "noindex", "noimageindex")

_CHUNK = 1 << 16
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TRY_AGAIN_CODES = frozenset({408, 425, 429})


class FetchConfig(Config):
    """What may be fetched, and how patiently."""

    max_bytes: int = Field(20 * 1024 * 1024, ge=1)
    """Largest response body in bytes, before and after decompression."""
    max_redirects: int = Field(5, ge=0)
    respect_opt_out: bool = True
    """Leave out images whose X-Robots-Tag header holds one of ``disallowed_directives``."""
    disallowed_directives: tuple[str, ...] = OPT_OUT_DIRECTIVES
    timeout: float = operational(10.0, gt=0)
    """Seconds for the name look-up, for the connection, and between two arriving pieces."""
    total_timeout: float = operational(30.0, gt=0)
    """Seconds for one attempt with all its redirects."""
    retries: int = operational(2, ge=0)
    """More attempts after a failure that may pass. A 404 or an opt-out is never asked twice."""
    backoff: float = operational(0.5, ge=0)
    """Seconds before the first retry; doubles each time, with jitter."""
    threads: int = operational(32, ge=1)
    user_agent: str | None = operational(None)
    """None: ``capfilt/<version>``, with ``contact`` behind it."""
    contact: str | None = operational(None)
    """URL or address that a webmaster may turn to, part of the user agent."""
    connect_to: dict[str, str] = operational({})
    """Host → ``address:port`` to connect to instead, as in curl: URLs keep their host name."""
    allow_private_hosts: tuple[str, ...] = operational(())
    """Host names that may resolve to addresses inside the network."""

    @field_validator("connect_to")
    @classmethod
    def _addresses(cls, value: dict[str, str]) -> dict[str, str]:
        for host, address in value.items():
            name, colon, port = address.rpartition(":")
            if not (colon and name and port.isdigit()):
                raise ValueError(f"{host}: {address!r} must be address:port, e.g. 127.0.0.1:8080")
        return {host.lower(): address for host, address in value.items()}

    @field_validator("disallowed_directives")
    @classmethod
    def _lower(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(directive.strip().lower() for directive in value)


@dataclass(frozen=True)
class Fetched:
    """What became of one URL: ``body`` where status is success, else why not."""

    status: str
    detail: str | None = None
    body: bytes = b""
    content_type: str = ""


class Fetcher:
    """Fetches URLs; one instance serves many threads."""

    def __init__(self, config: FetchConfig) -> None:
        # Reads its configuration and loads albumentations, which asks the network for a newer
        # version of itself unless told not to.
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        from img2dataset.downloader import is_disallowed

        self._config = config
        self._is_disallowed: Callable[..., bool] = is_disallowed
        self._agent = config.user_agent or _user_agent(config.contact)
        self._token = self._agent.partition("/")[0].strip().lower()
        self._connector = Connector(
            config.timeout, config.threads, config.connect_to, config.allow_private_hosts
        )

    def fetch(self, url: str) -> Fetched:
        """The body of ``url``, or the status and reason of its failure. Never raises."""
        for attempt in range(self._config.retries + 1):
            try:
                return self._attempt(url)
            except FetchError as error:
                failure = Fetched(error.status, str(error))
                if not error.transient:
                    break
            except Exception as error:  # noqa: BLE001 - one row's fetch: whatever a server provokes
                return Fetched("failed", words(error))
            if attempt < self._config.retries:
                time.sleep(self._config.backoff * 2**attempt * random.uniform(0.5, 1.5))
        return failure

    def close(self) -> None:
        self._connector.close()

    def _attempt(self, url: str) -> Fetched:
        deadline = time.monotonic() + self._config.total_timeout
        target = parse_url(url)
        for _ in range(self._config.max_redirects + 1):
            with translated(), _Exchange(self._connector.open(target, deadline)) as exchange:
                response = exchange.get(target, self._agent)
                location = self._judge(response)
                if location is None:
                    body = _read(response, self._config.max_bytes)
                    return Fetched("success", None, body, response.getheader("Content-Type", ""))
            url, target = _redirected(url, location)
        raise FetchError("redirect", f"more than {self._config.max_redirects} redirects")

    def _judge(self, response: http.client.HTTPResponse) -> str | None:
        """Where a response redirects to, or None where its body is the answer."""
        code = response.status
        if code >= 400 or code < 200:
            status = {4: "http_4xx", 5: "http_5xx"}.get(code // 100, "broken_response")
            transient = status == "http_5xx" or code in _TRY_AGAIN_CODES
            raise FetchError(status, f"HTTP {code}", transient)
        if self._config.respect_opt_out and self._is_disallowed(
            response.headers, self._token, self._config.disallowed_directives
        ):
            raise FetchError("opted_out", "X-Robots-Tag disallows the use")
        if code < 300:
            return None
        location = response.getheader("Location")
        if code not in _REDIRECTS or not location:
            raise FetchError("redirect", f"HTTP {code} without a location")
        return _utf8(location)


class _Exchange:
    """One request and its response over one connection."""

    def __init__(self, sock: TimedSocket) -> None:
        self._sock = sock

    def __enter__(self) -> _Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.shut()

    def get(self, target: Target, agent: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.sock = cast(socket.socket, self._sock)
        host = f"[{target.host}]" if ":" in target.host else target.host
        default = 443 if target.scheme == "https" else 80
        headers = {
            "Host": host if target.port == default else f"{host}:{target.port}",
            "User-Agent": agent,
            "Accept": "image/*,*/*;q=0.8",
            "Accept-Encoding": "identity",
            "Connection": "close",
        }
        connection.request("GET", target.path, headers=headers)
        return connection.getresponse()


def _redirected(url: str, location: str) -> tuple[str, Target]:
    try:
        url = urljoin(url, location)
        return url, parse_url(url)
    except (FetchError, ValueError) as error:
        raise FetchError("redirect", f"redirected to {location[:100]!r}: {error}") from error


def _read(response: http.client.HTTPResponse, limit: int) -> bytes:
    """The body, at most ``limit`` bytes before and after decompression.

    Raises:
        FetchError: too_large or broken_response.
    """
    declared = response.length
    if declared is not None and declared > limit:
        raise FetchError("too_large", f"{declared} bytes, at most {limit}")
    expand = _decoder(response.getheader("Content-Encoding", "identity"), limit)
    pieces: list[bytes] = []
    received = size = 0
    while piece := response.read(_CHUNK):
        received += len(piece)
        piece = expand(piece)
        size += len(piece)
        if max(received, size) > limit:
            raise FetchError("too_large", f"more than {limit} bytes")
        pieces.append(piece)
    if declared is not None and received < declared:
        detail = f"body cut short: {received} of {declared} bytes"
        raise FetchError("broken_response", detail, transient=True)
    return b"".join(pieces)


def _decoder(encoding: str, limit: int) -> Callable[[bytes], bytes]:
    """Undoes a content encoding that nobody asked for. Gives at most ``limit`` + 1 bytes a call:
    a small body that expands without end is noticed, not expanded."""
    encoding = encoding.strip().lower()
    if encoding in {"", "identity"}:
        return lambda piece: piece
    if encoding not in {"gzip", "x-gzip", "deflate"}:
        raise FetchError("broken_response", f"content encoding {encoding[:40]!r}, not asked for")
    inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)

    def expand(piece: bytes) -> bytes:
        try:
            return inflate.decompress(piece, limit + 1)
        except zlib.error as error:
            raise FetchError("broken_response", f"content encoding {encoding}: {error}") from error

    return expand


def _utf8(header: str) -> str:
    """A header that http.client decoded as Latin-1, as the UTF-8 it usually is."""
    try:
        return header.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return header


def _user_agent(contact: str | None) -> str:
    try:
        version = metadata.version("capfilt")
    except metadata.PackageNotFoundError:
        version = "0"
    return f"capfilt/{version} (+{contact})" if contact else f"capfilt/{version}"
