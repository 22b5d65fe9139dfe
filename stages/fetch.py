"""Fetching one URL from a web that lies: bounded in time, size, redirects and reach.

img2dataset's fetch, `download_image`, is not used: it calls `urllib.request.urlopen`, which only
an opener installed for the whole process could restrain, reads bodies of any size, sets no limit on
the total time, and presents itself as Firefox.
"""

from __future__ import annotations

import http.client
import math
import re
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import metadata
from typing import NamedTuple
from urllib.parse import urljoin

from pydantic import Field, field_validator

from stages.base import Config, operational
from stages.connect import Connector, FetchError, Target, parse_url, translated, words
from stages.exchange import Exchange
from stages.optout import OPT_OUT_DIRECTIVES, SiteRules, header_objection

_CHUNK = 1 << 16
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
TRY_AGAIN_CODES = frozenset({408, 425, 429})
"""HTTP statuses below 500 that may pass."""

_RULES_BYTES = 512 * 1024  # of robots.txt, the rest is cut; RFC 9309, 2.5, asks for 500 KiB
_LARGE = 1 << 20
_MEMORY = 96 << 20


class FetchConfig(Config):
    """What may be fetched, and how patiently."""

    max_bytes: int = Field(20 * 1024 * 1024, ge=1)
    """Largest response body in bytes, before and after decompression."""
    max_redirects: int = Field(5, ge=0)
    respect_opt_out: bool = True
    """Leave out images that come with ``TDM-Reservation: 1``, or with an X-Robots-Tag that names
    one of ``disallowed_directives`` for everyone or for our agent."""
    disallowed_directives: tuple[str, ...] = OPT_OUT_DIRECTIVES
    respect_robots: bool = False
    """Ask each host for its robots.txt first, and keep to it. While the host cannot say what it
    disallows (time-out, HTTP 5xx …), its images get that status: they may come another day."""
    respect_tdmrep: bool = False
    """Ask each host for its /.well-known/tdmrep.json first, and leave out what it reserves; while
    it cannot be asked, as with robots.txt."""
    timeout: float = operational(10.0, gt=0)
    """Seconds for the name look-up, for the connection, and between two arriving pieces."""
    total_timeout: float = operational(30.0, gt=0)
    """Seconds for one attempt with all its redirects; waiting for a host's turn does not count."""
    retries: int = operational(2, ge=0)
    """More attempts after a failure that may pass. A 404 or an opt-out is never asked twice."""
    backoff: float = operational(0.5, ge=0)
    """Seconds before the first retry; doubles each time, with jitter."""
    max_retry_after: float = operational(60.0, ge=0)
    """Seconds that a host may ask us to wait (Retry-After). Who asks for more is set aside."""
    host_connections: int = operational(8, ge=1)
    """Requests to one host at a time, of all workers together, those that redirects lead there
    among them."""
    host_failures: int = operational(20, ge=1)
    """After so many failures in a row, whichever workers see them, a host is set aside for the run:
    its other URLs are given the last failure's status untried. ``--retry-failed`` asks again."""
    shard_timeout: float = operational(3600.0, gt=0)
    """Seconds for a shard; URLs that have not come, and images in files and tars that were not
    begun by then, are ``timeout``."""
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

    @field_validator("user_agent", "contact")
    @classmethod
    def _header(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\x20-\x7e\xa0-\xff]*", value):
            raise ValueError(f"{value!r} must be one line of Latin-1 characters: it is a header")
        return value

    @field_validator("disallowed_directives")
    @classmethod
    def _lower(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(directive.strip().lower() for directive in value)


class Hop(NamedTuple):
    """A request to make, and what its attempt has used up by then."""

    url: str
    redirects: int = 0
    """Followed so far."""
    seconds: float = 0.0
    """Spent so far."""


@dataclass(frozen=True)
class Fetched:
    """What became of one attempt: ``body`` where status is success, else why not."""

    status: str
    detail: str | None = None
    body: bytes = b""
    content_type: str = ""
    code: int | None = None
    """HTTP status of the last answer."""
    onward: Hop | None = None
    """Where the attempt goes on, if that is another host; its status is then ``redirect``."""
    transient: bool = False
    """The failure may pass."""
    retry_after: float | None = None
    """Seconds for which the host asks to be left alone."""
    held: int = 0
    """Bytes of the fetcher's memory that are taken until it is given to `Fetcher.release`."""


class Fetcher:
    """Fetches URLs; one instance serves many threads.

    Bodies beyond 1 MiB share 96 MiB, so that many servers cannot fill the memory together.
    """

    def __init__(self, config: FetchConfig) -> None:
        self._config = config
        self._agent = config.user_agent or _user_agent(config.contact)
        token = self._agent.partition("/")[0].strip().lower()
        self._token = token
        self._connector = Connector(
            config.timeout, config.threads, config.connect_to, config.allow_private_hosts
        )
        self._memory = _Budget(max(_MEMORY, config.max_bytes))
        self._rules = SiteRules(
            self._site_file, token, config.respect_robots, config.respect_tdmrep
        )

    def fetch(self, hop: Hop, deadline: float = math.inf) -> Fetched:
        """The body of ``hop.url``, or the status and reason of its failure. One attempt, over by
        ``deadline`` (of `time.monotonic`), or its part that one host serves: a redirect to another
        host, which may be busy or set aside, comes back as ``onward``. Never raises. Hand the
        result to `release`."""
        left = self._config.total_timeout - hop.seconds
        try:
            return self._fetch(hop, min(deadline, time.monotonic() + left))
        except FetchError as error:
            return Fetched(
                error.status,
                str(error),
                code=error.code,
                transient=error.transient,
                retry_after=error.retry_after,
            )
        except Exception as error:  # noqa: BLE001 - one row's fetch: whatever a server provokes
            return Fetched("failed", words(error))

    def release(self, fetched: Fetched) -> None:
        """The caller is done with the body."""
        if fetched.held:
            self._memory.give_back(fetched.held)

    def rest(self) -> None:
        """No more URLs for now: end the connections that nobody uses."""
        self._connector.rest()

    def close(self) -> None:
        self._connector.close()

    def _fetch(self, hop: Hop, deadline: float, limit: int | None = None) -> Fetched:
        """Follows ``hop`` as long as it stays with its host. With ``limit``, a file about a site:
        no rule holds for it, and it is followed to its end, which is done once a site."""
        began = time.monotonic()
        url, target = hop.url, parse_url(hop.url)
        for redirects in range(hop.redirects + 1, self._config.max_redirects + 2):
            if limit is None and (objection := self._rules.objection(url, deadline)) is not None:
                raise FetchError("opted_out", objection)
            with translated(), Exchange(self._connector, target, deadline) as exchange:
                response = exchange.get(self._agent)
                location = self._judge(response, headers_count=limit is None)
                if location is None:
                    return self._body(response, deadline, limit)
            host = target.host
            url, target = _redirected(url, location)
            elsewhere = limit is None and target.host != host
            if elsewhere and redirects <= self._config.max_redirects:
                onward = Hop(url, redirects, hop.seconds + time.monotonic() - began)
                return Fetched("redirect", code=response.status, onward=onward)
        raise FetchError("redirect", f"more than {self._config.max_redirects} redirects")

    def _body(
        self, response: http.client.HTTPResponse, deadline: float, limit: int | None
    ) -> Fetched:
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            if size > _LARGE and not held:
                self._memory.take(size, deadline)
                held = size

        try:
            if limit is None:
                body = _read(response, self._config.max_bytes, hold)
            else:
                body = _read(response, limit, hold, cut=True)
        except BaseException:
            self._memory.give_back(held)
            raise
        kind = response.getheader("Content-Type", "")
        return Fetched("success", None, body, kind, response.status, held=held)

    def _site_file(self, url: str, deadline: float) -> tuple[int | None, bytes]:
        """robots.txt and the like, for `SiteRules`: their beginning, if they are long.

        Raises:
            FetchError: nobody knows what the file says, today.
        """
        try:
            found = self._fetch(Hop(url), deadline, _RULES_BYTES)
        except FetchError as error:
            if error.status in {"http_4xx", "redirect"} and not error.transient:
                return error.code, b""
            what = f"{url[-100:]}: {error}"
            raise FetchError(
                error.status, what, error.transient, error.code, error.retry_after
            ) from error
        return found.code, found.body

    def _judge(self, response: http.client.HTTPResponse, headers_count: bool) -> str | None:
        """Where a response redirects to, or None where its body is the answer."""
        code = response.status
        if code >= 400 or code < 200:
            status = {4: "http_4xx", 5: "http_5xx"}.get(code // 100, "broken_response")
            transient = status == "http_5xx" or code in TRY_AGAIN_CODES
            pause = _seconds(response.getheader("Retry-After")) if transient else None
            raise FetchError(status, f"HTTP {code}", transient, code, pause)
        if self._config.respect_opt_out and headers_count:
            objection = header_objection(
                response.headers, self._token, self._config.disallowed_directives
            )
            if objection is not None:
                raise FetchError("opted_out", objection, code=code)
        if code < 300:
            return None
        location = response.getheader("Location")
        if code not in _REDIRECTS or not location:
            raise FetchError("redirect", f"HTTP {code} without a location", code=code)
        return _utf8(location)


class _Budget:
    """Bytes that large bodies may take up together. Each asks once, for all that it may need: who
    has some never waits for more, so nobody waits for ever. They are served in turn, so that small
    ones do not pass a large one by for ever."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    def take(self, size: int, deadline: float) -> None:
        """Raises: FetchError: nothing came free in time, which is not the host's failure."""
        me = object()
        with self._changed:
            left = min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
            self._waiting.append(me)
            try:
                if not self._changed.wait_for(lambda: self._may_take(me, size), left):
                    raise FetchError("failed", "no memory came free in time", transient=True)
                self._left -= size
            finally:
                self._waiting.remove(me)
                self._changed.notify_all()

    def _may_take(self, who: object, size: int) -> bool:
        return self._waiting[0] is who and self._left >= size

    def give_back(self, size: int) -> None:
        with self._changed:
            self._left += size
            self._changed.notify_all()


def _redirected(url: str, location: str) -> tuple[str, Target]:
    try:
        url = urljoin(url, location)
        return url, parse_url(url)
    except (FetchError, ValueError) as error:
        raise FetchError("redirect", f"redirected to {location[:100]!r}: {error}") from error


def _read(
    response: http.client.HTTPResponse,
    limit: int,
    hold: Callable[[int], None],
    cut: bool = False,
) -> bytes:
    """The body, at most ``limit`` bytes before and after decompression; of a larger one, with
    ``cut``, the first ``limit`` bytes. ``hold`` is told how large it may become, before it does.

    Raises:
        FetchError: too_large or broken_response.
    """
    declared = response.length
    if declared is not None and declared > limit and not cut:
        raise FetchError("too_large", f"{declared} bytes, at most {limit}")
    encoding = response.getheader("Content-Encoding", "identity").strip().lower()
    plain = encoding in {"", "identity"}
    hold(min(declared or 0, limit) if plain else 0)
    expand = None if plain else _decoder(encoding)
    pieces: list[bytes] = []
    received = size = 0
    while came := response.read(_CHUNK):
        received += len(came)
        for piece in [came] if expand is None else expand(came):
            size += len(piece)
            if max(received, size) > limit:
                if cut:
                    return b"".join([*pieces, piece])[:limit]
                raise FetchError("too_large", f"more than {limit} bytes")
            if size > _LARGE:
                hold(limit)  # unless it was declared, and plain
            pieces.append(piece)
    if declared is not None and received < declared:
        detail = f"body cut short: {received} of {declared} bytes"
        raise FetchError("broken_response", detail, transient=True)
    return b"".join(pieces)


def _decoder(encoding: str) -> Callable[[bytes], Iterator[bytes]]:
    """Undoes a content encoding that nobody asked for, at most `_CHUNK` bytes at a time: a small
    body that expands without end is noticed, not expanded."""
    if encoding not in {"gzip", "x-gzip", "deflate"}:
        raise FetchError("broken_response", f"content encoding {encoding[:40]!r}, not asked for")
    inflate = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)

    def expand(piece: bytes) -> Iterator[bytes]:
        plain = b""
        while piece or len(plain) == _CHUNK:  # a full piece may leave some behind
            try:
                plain = inflate.decompress(piece, _CHUNK)
            except zlib.error as error:
                detail = f"content encoding {encoding}: {error}"
                raise FetchError("broken_response", detail) from error
            piece = inflate.unconsumed_tail
            yield plain

    return expand


def _seconds(retry_after: str | None) -> float | None:
    """The Retry-After header, seconds or a date, as seconds from now (RFC 9110, 10.2.3)."""
    text = (retry_after or "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


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
