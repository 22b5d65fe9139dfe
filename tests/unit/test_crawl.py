"""Many URLs of many hosts at once: politeness, patience, and an end."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import format_datetime
from itertools import pairwise

import pytest

from stages.crawl import Crawler, _Shard, _Url
from stages.fetch import FetchConfig, Fetched, Hop, _seconds
from stages.hostbook import Claim, HostBook
from tests.servers import WebServer, picture


@pytest.fixture
def web() -> Iterator[WebServer]:
    with WebServer() as server:
        yield server


def crawl(web: WebServer, *paths: str, **options: object) -> dict[str, Fetched]:
    with_defaults = {"timeout": 5.0, "retries": 0, "backoff": 0.01, "connect_to": web.connect_to}
    crawler = Crawler(FetchConfig(**{**with_defaults, **options}))
    found = list(crawler.fetch_all({path: web.url(path) for path in paths}))
    crawler.close()
    assert sorted(key for key, _ in found) == sorted(paths), "each key once"
    return dict(found)


def statuses(found: dict[str, Fetched]) -> dict[str, str]:
    return {path: fetched.status for path, fetched in found.items()}


def test_one_host_gets_so_many_requests_at_a_time(web: WebServer) -> None:
    paths = [f"/slow/0.05/{i}" for i in range(12)]
    assert set(statuses(crawl(web, *paths, host_connections=3, threads=12)).values()) == {"success"}
    assert web.most_at_once <= 3


def test_a_slow_host_delays_nobody_else(web: WebServer) -> None:
    with WebServer("other.test") as other:
        both = {**web.connect_to, **other.connect_to}
        config = FetchConfig(timeout=1.0, retries=0, connect_to=both, host_connections=1, threads=2)
        urls = {f"slow {i}": web.url("/slow/0.3/x") for i in range(3)}
        urls |= {f"fast {i}": other.serve(f"/{i}.jpg", picture()) for i in range(8)}
        crawler = Crawler(config)
        order = [key for key, _ in crawler.fetch_all(urls)]
        crawler.close()
    assert order[-1].startswith("slow")
    assert order.index("slow 1") > max(order.index(f"fast {i}") for i in range(8))


def test_retries_wait_longer_each_time(web: WebServer) -> None:
    paths = [f"/flaky/9/{i}" for i in range(6)]
    options = {"retries": 2, "backoff": 0.1, "host_failures": 10**6, "threads": 6}
    found = crawl(web, *paths, **options)
    assert set(statuses(found).values()) == {"http_5xx"}
    pauses = [[b - a for a, b in pairwise(web.times[path])] for path in paths]
    assert [len(one) for one in pauses] == [2] * 6
    # A wait is at least what it was asked to be: a half to one and a half of 0.1 s, then of 0.2 s.
    assert all(first >= 0.05 and second >= 0.1 for first, second in pauses)


def test_how_long_a_retry_waits(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Doubled each time, with jitter, and never less than the host asks for."""
    config = FetchConfig(backoff=0.5, retries=4)
    drawn: list[tuple[float, float]] = []

    def least(low: float, high: float) -> float:
        drawn.append((low, high))
        return low

    monkeypatch.setattr(random, "uniform", least)
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    shard = _Shard(config, None, HostBook(8, 20), math.inf)  # type: ignore[arg-type]  # nothing is fetched
    busy = Fetched("http_5xx", "HTTP 503", transient=True)

    def tried(attempts: int) -> _Url:
        return _Url("it", "http://web.test/u", Hop("http://cdn.test/u", 1), "cdn.test", attempts)

    for attempts in (1, 2, 3, 4):
        assert shard._retried(tried(attempts), busy)
    assert sorted(entry[0] - 1000.0 for entry in shard._later) == [0.25, 0.5, 1.0, 2.0]
    assert set(drawn) == {(0.5, 1.5)}
    assert not shard._retried(tried(5), busy)
    asked = Fetched("http_5xx", "HTTP 503", transient=True, retry_after=7.0)
    assert shard._retried(tried(1), asked)
    assert max(entry[0] - 1000.0 for entry in shard._later) == 7.0
    assert {host for _, _, _, host in shard._later} == {"web.test"}, "from the beginning"


def test_a_pause_that_the_host_asks_for_is_kept(web: WebServer) -> None:
    start = time.monotonic()
    found = crawl(web, "/later/1/1", "/later/1/2", retries=1)
    assert set(statuses(found).values()) == {"success"}
    assert time.monotonic() - start >= 1
    assert len(web.times["/later/1/1"]) == 2
    first, again = web.times["/later/1/1"]
    assert again - first >= 1


def test_who_asks_for_too_long_a_pause_is_set_aside(web: WebServer) -> None:
    paths = [f"/later/3600/{i}" for i in range(5)]
    found = crawl(web, *paths, retries=2, host_connections=1)
    assert set(statuses(found).values()) == {"http_4xx"}
    assert {fetched.transient for fetched in found.values()} == {True}
    assert sum(web.hits[path] for path in paths) == 1
    assert sum("set aside" in (fetched.detail or "") for fetched in found.values()) == 4


def test_a_host_that_keeps_failing_is_set_aside(web: WebServer) -> None:
    options = {"host_failures": 4, "host_connections": 2, "retries": 0}
    config = FetchConfig(connect_to=web.connect_to, **options)
    crawler = Crawler(config)
    urls = {f"{i}": web.url(f"/flaky/99/{i}") for i in range(20)}
    found = dict(crawler.fetch_all(urls))
    tried = sum(web.hits[f"/flaky/99/{i}"] for i in range(20))
    assert {fetched.status for fetched in found.values()} == {"http_5xx"}
    assert 4 <= tried <= 5
    # It is left alone for the run.
    web.serve("/good.jpg", picture())
    urls = {"good": web.url("/good.jpg")}
    assert {f.status for _, f in crawler.fetch_all(urls)} == {"http_5xx"}
    assert web.hits["/good.jpg"] == 0
    crawler.close()


def test_a_success_ends_a_series_of_failures(web: WebServer) -> None:
    config = FetchConfig(connect_to=web.connect_to, host_failures=3, host_connections=1, retries=0)
    crawler = Crawler(config)
    web.serve("/good.jpg", picture())
    fail, fine = ["/flaky/99/a", "/flaky/99/b"], ["/good.jpg"]
    for paths in (fail + fine, fail, fine, fail, fine):  # in a shard, and over several
        found = {path: f.status for path, f in crawler.fetch_all({p: web.url(p) for p in paths})}
        assert found == {path: "http_5xx" if path in fail else "success" for path in paths}
    crawler.close()


def test_a_crawler_that_is_started_again_leaves_what_it_held(web: WebServer) -> None:
    config = FetchConfig(connect_to=web.connect_to, host_connections=1)
    book = HostBook(config.host_connections, config.host_failures)
    book("one", {"other.test": Claim(left=9)})  # and died
    crawler = Crawler(config, book, "one")
    url = web.serve("/good.jpg", picture())
    assert statuses(dict(crawler.fetch_all({"it": url}))) == {"it": "success"}
    assert not book._hosts
    crawler.close()


def test_crawlers_that_share_a_book_share_each_host(web: WebServer) -> None:
    """More of them than connections: a host still gets no more at a time, and nobody starves."""
    config = FetchConfig(connect_to=web.connect_to, host_connections=2, retries=0, timeout=20.0)
    book = HostBook(config.host_connections, config.host_failures)
    crawlers = [Crawler(config, book) for _ in range(4)]

    def crawl_all(number: int) -> set[str]:
        urls = {f"{i}": web.url(f"/slow/0.05/{number}-{i}") for i in range(10)}
        return {fetched.status for _, fetched in crawlers[number].fetch_all(urls)}

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(crawl_all, range(4))) == [{"success"}] * 4
    assert web.most_at_once <= 2
    assert not book._hosts, "all that was claimed is given back"


def test_crawlers_that_share_a_book_set_a_host_aside_together(web: WebServer) -> None:
    config = FetchConfig(connect_to=web.connect_to, host_failures=4, host_connections=1, retries=0)
    book = HostBook(config.host_connections, config.host_failures)
    for number in range(2):
        crawler = Crawler(config, book)
        urls = {f"{i}": web.url(f"/flaky/99/{number}-{i}") for i in range(3)}
        assert {fetched.status for _, fetched in crawler.fetch_all(urls)} == {"http_5xx"}
    crawler = Crawler(config, book)
    urls = {f"{i}": web.url(f"/flaky/99/last-{i}") for i in range(3)}
    found = [fetched for _, fetched in crawler.fetch_all(urls)]
    assert all("set aside after 4 failures" in (fetched.detail or "") for fetched in found)
    assert sum(web.hits.values()) == 4


def sent_on(web: WebServer, paths: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """(path → URL on a host of its own that redirects to it, where all these hosts are)."""
    hosts = {f"{number}.test": web.address for number in range(len(paths))}
    urls = {
        path: f"http://{host}/to?{web.url(path)}" for path, host in zip(paths, hosts, strict=True)
    }
    return urls, {**hosts, **web.connect_to}


def test_a_host_that_many_redirect_to_gets_so_many_requests_at_a_time(web: WebServer) -> None:
    paths = [f"/slow/0.05/{i}" for i in range(24)]
    urls, hosts = sent_on(web, paths)
    config = FetchConfig(connect_to=hosts, host_connections=2, threads=24, retries=0, timeout=20.0)
    book = HostBook(config.host_connections, config.host_failures)
    parts = [dict(list(urls.items())[n::3]) for n in range(3)]  # of workers that share the host

    def crawl_one(part: dict[str, str]) -> dict[str, str]:
        crawler = Crawler(config, book)
        found = dict(crawler.fetch_all(part))
        crawler.close()
        return statuses(found)

    with ThreadPoolExecutor(len(parts)) as pool:
        for part, found in zip(parts, pool.map(crawl_one, parts), strict=True):
            assert found == dict.fromkeys(part, "success")
    assert web.most_at_once <= 2
    assert [web.hits[path] for path in paths] == [1] * 24
    assert not book._hosts, "all that was claimed is given back"


def test_a_host_that_waits_to_be_asked_delays_nobody_who_sends_others_there(
    web: WebServer,
) -> None:
    urls, hosts = sent_on(web, [f"/slow/0.3/{i}" for i in range(4)])
    config = FetchConfig(connect_to=hosts, host_connections=1, threads=2, retries=0, timeout=20.0)
    web.serve("/good.jpg", picture())
    urls |= {f"fast {i}": f"http://{i}.test/good.jpg" for i in range(4)}
    crawler = Crawler(config)
    order = [key for key, _ in crawler.fetch_all(urls)]
    crawler.close()
    assert {key.startswith("fast") for key in order[:4]} == {True}


def test_redirects_that_go_round_between_hosts_end(web: WebServer) -> None:
    web.serve("/one", b"", status=302, Location="http://other.test/two")
    web.serve("/two", b"", status=302, Location=web.url("/one"))
    both = {**web.connect_to, "other.test": web.address}
    found = crawl(web, "/one", connect_to=both, max_redirects=4, shard_timeout=20.0)["/one"]
    assert (found.status, found.detail) == ("redirect", "more than 4 redirects")
    assert (web.hits["/one"], web.hits["/two"]) == (3, 2)


def test_behind_redirects_a_host_that_is_set_aside_is_not_asked(web: WebServer) -> None:
    fail = [f"/flaky/99/{i}" for i in range(3)]
    urls, hosts = sent_on(web, [*fail, "/good.jpg"])
    web.serve("/good.jpg", picture())
    config = FetchConfig(connect_to=hosts, host_failures=3, retries=0)
    crawler = Crawler(config)
    good = urls.pop("/good.jpg")
    assert set(statuses(dict(crawler.fetch_all(urls))).values()) == {"http_5xx"}
    ((_, found),) = crawler.fetch_all({"it": good})
    crawler.close()
    assert found.status == "http_5xx"
    assert "set aside after 3 failures" in (found.detail or "")
    assert web.hits["/good.jpg"] == 0
    assert sum(web.hits[path] for path in fail) == 3


def test_behind_redirects_a_pause_that_the_host_asks_for_is_kept(web: WebServer) -> None:
    paths = ["/later/1/x", "/good.jpg"]
    urls, hosts = sent_on(web, paths)
    web.serve("/good.jpg", picture())
    crawler = Crawler(FetchConfig(connect_to=hosts, retries=0))
    found = [fetched for path in paths for _, fetched in crawler.fetch_all({path: urls[path]})]
    crawler.close()
    assert [(fetched.status, fetched.code) for fetched in found] == [
        ("http_4xx", 429),
        ("success", 200),
    ]
    ((asked,), (then,)) = (web.times[path] for path in paths)
    assert then - asked >= 1


def test_an_attempt_that_was_redirected_is_made_again_from_its_beginning(web: WebServer) -> None:
    urls, hosts = sent_on(web, ["/flaky/2/x"])
    crawler = Crawler(FetchConfig(connect_to=hosts, retries=2, backoff=0.01))
    assert statuses(dict(crawler.fetch_all(urls))) == {"/flaky/2/x": "success"}
    crawler.close()
    assert web.hits["/flaky/2/x"] == 3
    assert web.hits[f"/to?{web.url('/flaky/2/x')}"] == 3


def test_what_never_comes_is_a_timeout_when_the_shard_is_over(web: WebServer) -> None:
    start = time.monotonic()
    web.serve("/good.jpg", picture())
    found = crawl(
        web, "/good.jpg", "/hang", "/drip", timeout=60.0, total_timeout=60.0, shard_timeout=0.6
    )
    assert statuses(found) == {"/good.jpg": "success", "/hang": "timeout", "/drip": "timeout"}
    assert time.monotonic() - start < 10
    for path in ("/hang", "/drip"):
        assert found[path].transient


def test_large_bodies_share_a_bounded_memory(web: WebServer) -> None:
    body = b"\xff\xd8\xff" + bytes(5 << 20)
    paths = [f"/large{i}.jpg" for i in range(12)]
    for path in paths:
        web.serve(path, body)
    crawler = Crawler(FetchConfig(connect_to=web.connect_to, max_bytes=6 << 20, threads=12))
    crawler._fetcher._memory._left = 12 << 20
    at_once = []
    for _, fetched in crawler.fetch_all({path: web.url(path) for path in paths}):
        assert fetched.status == "success", fetched.detail
        at_once.append(crawler._fetcher._memory._left)
        crawler.release(fetched)
    assert min(at_once) >= 0
    deadline = time.monotonic() + 5
    while crawler._fetcher._memory._left < 12 << 20 and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert crawler._fetcher._memory._left == 12 << 20
    crawler.close()


@pytest.mark.parametrize("text", ["", "soon", "-1", "1.5", "Mon, 99 Nov 2099", "٣", "0x10"])
def test_a_pause_that_cannot_be_read_is_none(text: str) -> None:
    assert _seconds(text) is None


def test_pauses_are_seconds_or_dates() -> None:
    import datetime

    assert _seconds("120") == 120
    assert _seconds("9" * 400) == 999_999_999
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=100)
    found = _seconds(format_datetime(later, usegmt=True))
    assert found is not None
    assert 90 < found <= 100
    assert _seconds("Sun, 06 Nov 1994 08:49:37 GMT") == 0
