"""Many URLs at once: polite to each host, patient with what may pass, and over in time.

No thread ever sleeps for a host. A URL that waits, for its host's turn or for a retry, waits in a
queue, so that a slow host delays nobody else's images.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from stages.connect import FetchError, parse_url
from stages.fetch import FetchConfig, Fetched, Fetcher

_HOST_FAILURES = frozenset({"dns", "refused", "timeout", "tls", "http_5xx", "broken_response"})


@dataclass
class _Url:
    key: str
    url: str
    host: str
    attempts: int = 0


@dataclass
class _Host:
    """What is known of one host. Failures outlive a shard, the rest does not."""

    failures: int = 0
    """In a row, without an answer of any use in between."""
    last: Fetched | None = None
    running: int = 0
    not_before: float = 0.0
    queue: deque[_Url] = field(default_factory=deque)


class Crawler:
    """Fetches the URLs of one shard after another; keeps what it learns about hosts."""

    def __init__(self, config: FetchConfig) -> None:
        self._config = config
        self._fetcher = Fetcher(config)
        self._hosts: dict[str, _Host] = {}

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
        shard = _Shard(self._config, self._fetcher, self._hosts, deadline)
        yield from shard.run(urls)
        # A host that was set aside is asked once more by the next shard: it may have come back.
        most = self._config.host_failures - 1
        self._hosts = {
            name: _Host(min(host.failures, most), host.last)
            for name, host in self._hosts.items()
            if host.failures
        }


class _Shard:
    """The crawl of one shard."""

    def __init__(
        self, config: FetchConfig, fetcher: Fetcher, hosts: dict[str, _Host], deadline: float
    ) -> None:
        self._config, self._fetcher, self._hosts = config, fetcher, hosts
        self._deadline = min(deadline, time.monotonic() + config.shard_timeout)
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
                self._start(pool)
                for key, fetched in itertools.chain(self._given_up(), self._finished()):
                    left.discard(key)
                    yield key, fetched
        finally:
            # Threads that still wait for a server end at the deadline by themselves.
            pool.shutdown(wait=False, cancel_futures=True)
            for future in self._running:
                future.add_done_callback(self._abandoned)
        seconds = self._config.shard_timeout
        late = Fetched("timeout", f"the shard's {seconds:g} seconds were up", transient=True)
        yield from ((key, late) for key in urls if key in left)

    def _abandoned(self, future: Future[Fetched]) -> None:
        if not future.cancelled() and future.exception() is None:
            self._fetcher.release(future.result())

    def _enqueue(self, key: str, url: str) -> None:
        try:
            host = parse_url(url).host
        except FetchError as error:
            self._refused.append((key, Fetched(error.status, str(error))))
            return
        self._hosts.setdefault(host, _Host()).queue.append(_Url(key, url, host))
        self._turn.append(host)

    def _given_up(self) -> list[tuple[str, Fetched]]:
        given_up, self._refused = self._refused, []
        return given_up

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
        elif host.queue and host.running < self._slots(host):
            url = host.queue.popleft()
            url.attempts += 1
            host.running += 1
            self._running[pool.submit(self._fetcher.fetch, url.url, self._deadline)] = url

    def _slots(self, host: _Host) -> int:
        """Requests at once. A host about to be set aside gets one try, not a volley."""
        last_try = host.failures == self._config.host_failures - 1 and host.failures > 0
        return 1 if last_try else self._config.host_connections

    def _set_aside(self, host: _Host) -> None:
        last = host.last
        assert last is not None
        detail = f"not tried: host set aside after {host.failures} failures; last: {last.detail}"
        given_up = Fetched(last.status, detail[:300], host=last.host, transient=True)
        while host.queue:
            self._refused.append((host.queue.popleft().key, given_up))

    # ---- ending ------------------------------------------------------------------------------

    def _finished(self) -> Iterator[tuple[str, Fetched]]:
        """The final results among those that have come by now; waits for one where it must."""
        soonest = min([self._deadline, *(entry[0] for entry in self._later[:1])])
        seconds = max(0.0, soonest - time.monotonic())
        if not self._running:
            if not self._turn:
                time.sleep(seconds if self._later else 0)
            return
        done, _ = wait(self._running, seconds, FIRST_COMPLETED)
        for future in done:
            url = self._running.pop(future)
            fetched = future.result()
            self._note(url, fetched)
            if not self._retried(url, fetched):
                yield url.key, fetched

    def _note(self, url: _Url, fetched: Fetched) -> None:
        own = self._hosts[url.host]
        own.running -= 1
        # Every URL that was refused a slot lost its turn: the host gets as many as it has queued
        # URLs for the slots it has now.
        self._turn.extend([url.host] * min(len(own.queue), self._config.host_connections))
        # A redirect may have led elsewhere: who failed is to blame, not who sent us there.
        told = self._hosts.setdefault(fetched.host or url.host, _Host())
        if fetched.status in _HOST_FAILURES or fetched.code == 429:
            told.failures, told.last = told.failures + 1, fetched
        else:
            told.failures = 0
        pause = fetched.retry_after or 0.0
        if pause > self._config.max_retry_after:
            told.failures, told.last = max(told.failures, self._config.host_failures), fetched
        told.not_before = max(told.not_before, time.monotonic() + pause)

    def _retried(self, url: _Url, fetched: Fetched) -> bool:
        """Whether the URL will be tried again, and so has no result yet."""
        config = self._config
        pause = config.backoff * 2 ** (url.attempts - 1) * random.uniform(0.5, 1.5)
        pause = max(pause, fetched.retry_after or 0.0)
        if not fetched.transient or url.attempts > config.retries:
            return False
        if (fetched.retry_after or 0.0) > config.max_retry_after:
            return False
        heapq.heappush(self._later, (time.monotonic() + pause, next(self._order), url, url.host))
        return True
