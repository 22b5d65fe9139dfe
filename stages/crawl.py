"""Many URLs at once: polite to each host, patient with what may pass, and over in time.

No thread ever sleeps for a host. A URL that waits, for its host's turn or for a retry, waits in a
queue, so that a slow host delays nobody else's images. So does a URL that is redirected to another
host: it waits there for its turn, as that host's own URLs do.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial

from stages.connect import FetchError, parse_url
from stages.fetch import FetchConfig, Fetched, Fetcher, Hop
from stages.hostbook import SILENCE, Ask, Claim, HostBook, Word

_HOST_FAILURES = frozenset({"dns", "refused", "timeout", "tls", "http_5xx", "broken_response"})
_CONSULT = 0.5
"""Seconds between two looks into the book that workers share."""
_HEARTBEAT = SILENCE / 6


@dataclass
class _Url:
    key: str
    url: str
    """As it was given, where each attempt begins."""
    hop: Hop
    host: str
    """That ``hop`` asks, on whose account the URL is."""
    attempts: int = 0
    """Begun so far."""


@dataclass
class _Host:
    """One host during a shard: what the book says of it, and what the book does not know yet."""

    connections: int = 0
    """Requests that may be under way at a time."""
    running: int = 0
    left: int = 0
    """URLs that are not done."""
    failures: int = 0
    """In a row, without an answer of any use in between."""
    last: tuple[str, str] | None = None
    """Status and detail of the last failure."""
    not_before: float = 0.0
    queue: deque[_Url] = field(default_factory=deque)
    useful: bool = False
    failed: int = 0
    """Since the book was told; `useful` too."""


class Crawler:
    """Fetches the URLs of one shard after another.

    Args:
        ask: the book that all workers of a run share; by default one of its own.
        worker: how the book tells this one, which has the same name if it is started again.
    """

    def __init__(
        self, config: FetchConfig, ask: Ask | None = None, worker: str | None = None
    ) -> None:
        self._config = config
        self._fetcher = Fetcher(config)
        book = ask or HostBook(config.host_connections, config.host_failures)
        self._ask = partial(book, worker or uuid.uuid4().hex)

    def close(self) -> None:
        self._fetcher.close()

    def release(self, fetched: Fetched) -> None:
        """The caller is done with the body."""
        self._fetcher.release(fetched)

    def fetch_all(
        self, urls: Mapping[str, str], deadline: float = math.inf
    ) -> Iterator[tuple[str, Fetched]]:
        """(key, what became of its URL), each key once, in the order of arrival. What has not
        come when ``shard_timeout`` is up, or by ``deadline`` (of `time.monotonic`), is
        ``timeout``. Hand each result to `release`, or bodies fill the memory that is set aside for
        them, and no more come."""
        yield from _Shard(self._config, self._fetcher, self._ask, deadline).run(urls)


class _Shard:
    """The crawl of one shard."""

    def __init__(
        self,
        config: FetchConfig,
        fetcher: Fetcher,
        ask: Callable[[Mapping[str, Claim], bool], Mapping[str, Word]],
        deadline: float,
    ) -> None:
        self._config, self._fetcher, self._ask = config, fetcher, ask
        self._deadline = min(deadline, time.monotonic() + config.shard_timeout)
        self._hosts: dict[str, _Host] = {}
        self._untold: set[str] = set()  # hosts of which the book must hear, or be asked again
        self._consulted = -math.inf
        self._turn: deque[str] = deque()  # hosts that have a URL queued, perhaps several times
        self._later: list[tuple[float, int, _Url | None, str]] = []
        self._order = itertools.count()
        self._running: dict[Future[Fetched], _Url] = {}
        self._refused: list[tuple[str, Fetched]] = []

    def run(self, urls: Mapping[str, str]) -> Iterator[tuple[str, Fetched]]:
        left = set(urls)
        pool = ThreadPoolExecutor(self._config.threads, thread_name_prefix="fetch")
        try:
            for key, url in urls.items():
                self._enqueue(key, url)
            while left and time.monotonic() < self._deadline:
                self._consult()
                self._start(pool)
                for key, fetched in self._given_up() or self._finished():
                    left.discard(key)
                    yield key, fetched
        finally:
            # Threads that still wait for a server end at the deadline by themselves.
            pool.shutdown(wait=False, cancel_futures=True)
            for future in self._running:
                future.add_done_callback(self._abandoned)
            self._fetcher.rest()
            last = {name: self._claim(host)._replace(left=0) for name, host in self._open()}
            self._ask(last, False)
        seconds = self._config.shard_timeout
        late = Fetched("timeout", f"the shard's {seconds:g} seconds were up", transient=True)
        yield from ((key, late) for key in urls if key in left)

    def _abandoned(self, future: Future[Fetched]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._fetcher.release(future.result())

    def _enqueue(self, key: str, url: str) -> None:
        try:
            entry = _Url(key, url, Hop(url), parse_url(url).host)
        except FetchError as error:
            self._refused.append((key, Fetched(error.status, str(error))))
            return
        self._account(entry).queue.append(entry)

    def _account(self, url: _Url) -> _Host:
        """The host that the URL asks next, which has one more to do."""
        host = self._hosts.setdefault(url.host, _Host())
        host.left += 1
        self._settled(url.host)
        return host

    def _hand_on(self, url: _Url, hop: Hop) -> None:
        """Redirected to another host."""
        url.hop, url.host = hop, parse_url(hop.url).host
        self._account(url).queue.append(url)
        self._turn.append(url.host)

    def _given_up(self) -> list[tuple[str, Fetched]]:
        given_up, self._refused = self._refused, []
        return given_up

    # ---- the book ----------------------------------------------------------------------------

    def _consult(self) -> None:
        """Tell the book what is new, and take over what it says, now and then."""
        since = time.monotonic() - self._consulted
        if since < (_CONSULT if self._untold else _HEARTBEAT):
            return
        told, self._untold = self._untold, set()
        claims = {name: self._claim(self._hosts[name]) for name in told}
        words = self._ask(claims, self._consulted == -math.inf)
        now = self._consulted = time.monotonic()
        for name, word in words.items():
            host = self._hosts[name]
            more = word.connections - max(host.connections, host.running)
            host.connections, host.failures, host.last = word.connections, word.failures, word.last
            host.not_before = max(host.not_before, now + word.pause)
            host.useful, host.failed = False, 0
            self._turn.extend([name] * min(more, len(host.queue)))
            if host.failures >= self._config.host_failures:
                self._set_aside(host)
            self._settled(name)

    def _claim(self, host: _Host) -> Claim:
        pause = max(0.0, host.not_before - time.monotonic())
        return Claim(host.running, host.left, host.useful, host.failed, host.last, pause)

    def _open(self) -> list[tuple[str, _Host]]:
        """Hosts of which the book has claims, or has not heard all."""
        return [
            (name, host)
            for name, host in self._hosts.items()
            if host.connections or host.left or name in self._untold
        ]

    def _settled(self, name: str) -> None:
        """Ask the book again where the host has other than it can use; and where it can use any
        number: others may want their share of it."""
        host = self._hosts[name]
        most = self._config.host_connections
        if host.left > most or host.connections != host.left:
            self._untold.add(name)

    # ---- starting ----------------------------------------------------------------------------

    def _start(self, pool: ThreadPoolExecutor) -> None:
        """Hand over what may go now: not more than twice as many as there are threads, so that
        none idles while the caller decodes."""
        now = time.monotonic()
        while self._later and self._later[0][0] <= now:
            _, _, url, host = heapq.heappop(self._later)
            if url is not None:
                self._hosts[host].queue.append(url)
            self._turn.append(host)
        while self._turn and len(self._running) < 2 * self._config.threads:
            self._give_turn(self._turn.popleft(), now, pool)

    def _give_turn(self, name: str, now: float, pool: ThreadPoolExecutor) -> None:
        """Start one URL of the host, unless it is set aside, busy, or asked to be left alone."""
        host = self._hosts[name]
        if host.failures >= self._config.host_failures:
            self._set_aside(host)
        elif host.queue and host.not_before > now:
            heapq.heappush(self._later, (host.not_before, next(self._order), None, name))
        elif host.queue and host.running < host.connections:
            url = host.queue.popleft()
            url.attempts += url.hop.redirects == 0
            host.running += 1
            self._running[pool.submit(self._fetcher.fetch, url.hop, self._deadline)] = url

    def _set_aside(self, host: _Host) -> None:
        status, detail = host.last or ("timeout", "")
        told = f"not tried: host set aside after {host.failures} failures; last: {detail}"
        given_up = Fetched(status, told[:300], transient=True)
        host.left -= len(host.queue)
        while host.queue:
            self._refused.append((host.queue.popleft().key, given_up))

    # ---- ending ------------------------------------------------------------------------------

    def _finished(self) -> Iterator[tuple[str, Fetched]]:
        """The final results among those that have come by now; waits for one where it must."""
        seconds = max(0.0, self._next_event() - time.monotonic())
        if not self._running:
            if not self._turn:
                time.sleep(seconds)
            return
        done, _ = wait(self._running, seconds, FIRST_COMPLETED)
        for future in done:
            url = self._running.pop(future)
            fetched = future.result()
            self._note(url.host, fetched)
            if fetched.onward is not None:
                self._hand_on(url, fetched.onward)
            elif not self._retried(url, fetched):
                yield url.key, fetched

    def _next_event(self) -> float:
        """When something may happen that no request brings."""
        asked = self._consulted + (_CONSULT if self._untold else _HEARTBEAT)
        return min([self._deadline, asked, *(entry[0] for entry in self._later[:1])])

    def _note(self, name: str, fetched: Fetched) -> None:
        """The host is done with a URL, for now."""
        host = self._hosts[name]
        host.running -= 1
        host.left -= 1
        # Every URL that was refused a slot lost its turn: the host gets as many as it has queued
        # URLs for the slots it has now.
        self._turn.extend([name] * min(len(host.queue), host.connections))
        pause = fetched.retry_after or 0.0
        failures = int(fetched.status in _HOST_FAILURES or fetched.code == 429)
        if pause > self._config.max_retry_after:
            failures = max(1, self._config.host_failures - host.failures)
        if failures or pause or host.failures:
            self._untold.add(name)
        if failures:
            host.failures, host.failed = host.failures + failures, host.failed + failures
            host.last = fetched.status, fetched.detail or ""
        else:
            host.useful, host.failures, host.failed = True, 0, 0
        host.not_before = max(host.not_before, time.monotonic() + pause)
        self._settled(name)

    def _retried(self, url: _Url, fetched: Fetched) -> bool:
        """Whether the URL will be tried again, and so has no result yet."""
        config = self._config
        pause = config.backoff * 2 ** (url.attempts - 1) * random.uniform(0.5, 1.5)
        pause = max(pause, fetched.retry_after or 0.0)
        if not fetched.transient or url.attempts > config.retries:
            return False
        if (fetched.retry_after or 0.0) > config.max_retry_after:
            return False
        url.hop, url.host = Hop(url.url), parse_url(url.url).host
        self._account(url)
        heapq.heappush(self._later, (time.monotonic() + pause, next(self._order), url, url.host))
        return True
