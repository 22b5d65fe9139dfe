"""What sites say about the use of their images."""

from __future__ import annotations

import json
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.message import Message

import pytest

from stages import optout
from stages.connect import FetchError
from stages.crawl import Crawler
from stages.fetch import FetchConfig, Fetched, Fetcher, Hop
from stages.optout import OPT_OUT_DIRECTIVES, SiteRules, header_objection
from tests.servers import WebServer, picture


@pytest.mark.parametrize(
    ("headers", "objection"),
    [
        ([], None),
        (["all"], None),
        (["noarchive"], None),
        (["noai"], "noai"),
        (["NoImageAI"], "noimageai"),
        (["noarchive , noindex"], "noindex"),
        (["noarchive", "noimageindex"], "noimageindex"),
        (["capfilt: noai"], "noai"),
        (["CapFilt: noarchive, noai"], "noai"),
        (["otherbot: noai"], None),
        (["otherbot: noai, noindex"], None),
        (["otherbot: noai, capfilt: noindex"], "noindex"),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], "noai"),
        (["max-image-preview: large, noai"], "noai"),
        (["otherbot: max-snippet: 5, noai"], None),
        (["unavailable_after: Wed, 25 Jun 2030 15:00:00 GMT, noai"], "noai"),
        (["none"], "none"),
        (["otherbot: none"], None),
        (["noarchive; noai"], "noai"),
        (["otherbot: noarchive; noai"], None),
        ([":"], None),
        ([",,,:,"], None),
    ],
)
def test_robots_headers(headers: list[str], objection: str | None) -> None:
    message = Message()
    for header in headers:
        message["X-Robots-Tag"] = header
    found = header_objection(message, "capfilt", OPT_OUT_DIRECTIVES)
    assert found == (None if objection is None else f"X-Robots-Tag: {objection}")


def test_none_counts_where_noindex_does() -> None:
    message = Message()
    message["X-Robots-Tag"] = "none"
    assert header_objection(message, "capfilt", {"noindex"}) is not None
    assert header_objection(message, "capfilt", {"noai"}) is None


@pytest.mark.parametrize(("value", "reserved"), [("1", True), (" 1 ", True), ("0", False)])
def test_tdm_reservation_header(value: str, reserved: bool) -> None:
    message = Message()
    message["tdm-reservation"] = value
    assert (header_objection(message, "capfilt", ()) is not None) == reserved


@pytest.fixture
def web() -> Iterator[WebServer]:
    with WebServer() as server:
        for path in ("/open/a.jpg", "/closed/a.jpg", "/closed/but.jpg"):
            server.serve(path, picture())
        yield server


def crawl(web: WebServer, *paths: str, **options: object) -> dict[str, Fetched]:
    crawler = Crawler(FetchConfig(connect_to=web.connect_to, retries=0, timeout=2.0, **options))
    found = dict(crawler.fetch_all({path: web.url(path) for path in paths}))
    crawler.close()
    return found


ROBOTS = b"""User-agent: capfilt
Disallow: /closed/
User-agent: *
Disallow: /
"""


def test_robots_txt_is_asked_once_and_kept_to(web: WebServer) -> None:
    web.serve("/robots.txt", ROBOTS, "text/plain", X_Robots_Tag="noindex")
    paths = ("/open/a.jpg", "/closed/a.jpg")
    found = crawl(web, *paths, respect_robots=True)
    assert {path: f.status for path, f in found.items()} == {
        "/open/a.jpg": "success",
        "/closed/a.jpg": "opted_out",
    }
    assert found["/closed/a.jpg"].detail == "robots.txt"
    assert web.hits["/robots.txt"] == 1
    assert web.hits["/closed/a.jpg"] == 0
    assert {f.status for f in crawl(web, *paths).values()} == {"success"}, "off by default"
    assert web.hits["/robots.txt"] == 1


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        (404, b"", "success"),
        (403, b"", "success"),
        (200, b"", "success"),
        (200, b"\xff\xfe\x00garbage\n" * 99, "success"),
        (200, b"Disallow: /\n", "success"),  # for no agent
    ],
)
def test_robots_txt_that_says_nothing(
    web: WebServer, status: int, body: bytes, outcome: str
) -> None:
    web.serve("/robots.txt", body, "text/plain", status)
    assert crawl(web, "/open/a.jpg", respect_robots=True)["/open/a.jpg"].status == outcome


@pytest.mark.parametrize(
    ("file", "option"),
    [("/robots.txt", "respect_robots"), ("/.well-known/tdmrep.json", "respect_tdmrep")],
)
@pytest.mark.parametrize(
    ("status", "outcome", "code"), [(500, "http_5xx", 500), (429, "http_4xx", 429)]
)
def test_rules_that_cannot_be_read_may_be_read_later(
    web: WebServer, file: str, option: str, status: int, outcome: str, code: int
) -> None:
    web.serve(file, b"busy", "text/plain", status)
    options = {"connect_to": web.connect_to, "retries": 0, "timeout": 2.0, option: True}
    crawler = Crawler(FetchConfig(**options))
    urls = {"it": web.url("/open/a.jpg")}
    ((_, fetched),) = crawler.fetch_all(urls)
    assert (fetched.status, fetched.code, fetched.transient) == (outcome, code, True)
    assert file in (fetched.detail or "")
    assert web.hits["/open/a.jpg"] == 0
    del web.pages[file]
    ((_, fetched),) = crawler.fetch_all(urls)
    assert fetched.status == "success"
    crawler.close()


def test_who_waits_for_rules_that_fail_to_come_does_not_ask_again() -> None:
    """Or a host that hangs would hang for each of its URLs in turn."""
    threads, asked, came = 6, Counter[str](), threading.Semaphore(0)

    def read(url: str, _: float) -> tuple[int | None, bytes]:
        asked[url] += 1
        if asked.total() == 1:
            for _ in range(threads):
                came.acquire()
            time.sleep(0.2)  # for all of them to stand in line
        raise FetchError("timeout", "it hangs", transient=True)

    rules = SiteRules(read, "capfilt", robots=True, tdmrep=False)

    def ask() -> str:
        came.release()
        with pytest.raises(FetchError) as raised:
            rules.objection("http://web.test/a.jpg")
        return raised.value.status

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(ask) for _ in range(threads)]
        assert {future.result() for future in futures} == {"timeout"}
    assert asked.total() < threads


def test_who_waits_for_rules_waits_no_longer_than_its_own_time() -> None:
    asked, end = threading.Event(), threading.Event()

    def read(url: str, deadline: float) -> tuple[int | None, bytes]:
        asked.set()
        end.wait()
        return 404, b""

    rules = SiteRules(read, "capfilt", robots=True, tdmrep=False)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(rules.objection, "http://web.test/a.jpg")
        asked.wait()
        late = time.monotonic() + 0.1
        second = pool.submit(rules.objection, "http://web.test/b.jpg", late)
        try:
            with pytest.raises(FetchError, match=r"rules of http://web\.test") as raised:
                second.result(timeout=20)
        finally:
            end.set()
        assert (raised.value.status, raised.value.transient) == ("timeout", True)
        assert first.result() is None


def test_asking_for_rules_is_part_of_an_attempt(web: WebServer) -> None:
    config = FetchConfig(connect_to=web.connect_to, respect_robots=True, total_timeout=20.0)
    fetcher = Fetcher(config)
    assert fetcher.fetch(Hop(web.url("/open/a.jpg"), 1, 20.0)).status == "timeout"
    fetcher.close()
    assert not web.hits, "nothing was left to ask with"


def test_a_long_robots_txt_is_cut_not_ignored(web: WebServer) -> None:
    web.serve("/robots.txt", ROBOTS + b"# and so on\n" * 100_000, "text/plain")
    paths = ("/open/a.jpg", "/closed/a.jpg")
    found = crawl(web, *paths, respect_robots=True)
    assert [found[path].status for path in paths] == ["success", "opted_out"]


@pytest.mark.parametrize(
    ("lines", "closed"),
    [
        (["User-agent: *", "Disallow: /*.jpg"], True),
        (["User-agent: *", "Disallow: /*.png"], False),
        (["User-agent: *", "Disallow: /*.jpg$"], True),
        (["User-agent: *", "Disallow: /c/a$"], False),
        (["User-agent: *", "Disallow: /", "Allow: /c/"], False),
        (["User-agent: *", "Allow: /", "Disallow: /c/"], True),
        (["User-agent: *", "Allow: /c", "Disallow: /*a.jpg"], True),
        (["User-agent: *", "Disallow: /c", "Allow: /c"], False),
        (["User-agent: *", "Disallow: /%63/"], True),
        (["User-agent: capfilt", "Disallow: /x/", "User-agent: CapFilt", "Disallow: /c/"], True),
        (["User-agent: other", "User-agent: capfilt", "Disallow: /c/"], True),
        (["User-agent: capfilt", "", "Disallow: /x/", "", "Disallow: /c/"], True),
        (["User-agent: capfilt", "Sitemap: http://web.test/s.xml", "Disallow: /c/"], True),
        (["\ufeffUser-agent: *", "Disallow: /c/"], True),
        (["User-agent: *", "Disallow: /", "User-agent: capfilt", "Disallow: /x/"], False),
        (["User-agent: capfilt", "Disallow:", "User-agent: *", "Disallow: /"], False),
        (["User-agent: *", "Disallow: /x/", "User-agent: capfilt", "Disallow: /c/"], True),
        (["User-agent: *", "Allow: /", "User-agent: capfilt/1.0 # us", "Disallow: /c/"], True),
        (["User-agent: *", "Disallow: /", "User-agent: cap", "Allow: /"], True),
        (["User-agent: *", "Disallow: /", "User-agent: capfilt-news", "Allow: /"], True),
        (["User-agent: other", "Disallow: /"], False),
        (["user agent *", "disallow: /c/"], True),
    ],
)
def test_robots_txt_is_read_as_rfc_9309_says(lines: list[str], closed: bool) -> None:
    for end in ("\n", "\r\n", "\r"):
        body = end.join(lines).encode()
        rules = SiteRules(lambda *_, body=body: (200, body), "capfilt", robots=True, tdmrep=False)
        found = rules.objection("http://web.test/c/a.jpg")
        assert found == ("robots.txt" if closed else None)


def test_robots_txt_of_thousands_of_agents_rules_and_wildcards_is_bounded() -> None:
    agents = "".join(f"user-agent:{number}\n" for number in range(2_000))
    rules = "".join(f"allow:{number}\n" for number in range(2_000))
    body = (agents + rules + "user-agent:*\n" + "disallow:*ab\n" * 10_000).encode()
    site = SiteRules(lambda *_: (200, body), "capfilt", robots=True, tdmrep=False)
    tracemalloc.start()
    try:
        assert site.objection("http://web.test/a.jpg") is None
        assert site.objection("http://web.test/ab.jpg") == "robots.txt"
        long = site.objection("http://web.test/" + "a" * 60_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert long == "robots.txt: 10001 wildcards for a URL of 60016 characters"
    assert peak < 50_000_000


def test_robots_txt_holds_behind_redirects_too(web: WebServer) -> None:
    web.serve("/robots.txt", ROBOTS, "text/plain")
    path = "/to?/closed/a.jpg"
    assert crawl(web, path, respect_robots=True)[path].status == "opted_out"


@pytest.mark.parametrize(
    ("file", "body", "option"),
    [
        ("/robots.txt", ROBOTS, "respect_robots"),
        (
            "/.well-known/tdmrep.json",
            b'[{"location": "/closed/", "tdm-reservation": 1}]',
            "respect_tdmrep",
        ),
    ],
)
def test_what_a_host_says_holds_for_who_is_redirected_to_it(
    web: WebServer, file: str, body: bytes, option: str
) -> None:
    with WebServer("other.test") as other:
        other.serve(file, body)
        other.serve("/closed/a.jpg", picture())
        path = f"/to?{other.url('/closed/a.jpg')}"
        both = {**web.connect_to, **other.connect_to}
        crawler = Crawler(FetchConfig(connect_to=both, retries=0, **{option: True}))
        ((_, found),) = crawler.fetch_all({"it": web.url(path)})
        crawler.close()
        assert found.status == "opted_out"
        assert other.hits["/closed/a.jpg"] == 0


@pytest.mark.parametrize(
    ("document", "outcomes"),
    [
        (b'[{"location": "/closed/", "tdm-reservation": 1}]', ("success", "opted_out")),
        (
            b'[{"location": "/closed/but.jpg$", "tdm-reservation": 0},'
            b' {"location": "/*.jpg", "tdm-reservation": 1}]',
            ("opted_out", "opted_out", "success"),
        ),
        (b'{"location": "/", "tdm-reservation": 1}', ("success", "success")),
        (b'[{"location": ["/"], "tdm-reservation": 1}, 7, null]', ("success", "success")),
        (b"[" * 100_000, ("success", "success")),
    ],
)
def test_tdm_reservation_file(web: WebServer, document: bytes, outcomes: tuple[str, ...]) -> None:
    web.serve("/.well-known/tdmrep.json", document, "application/json")
    paths = ("/open/a.jpg", "/closed/a.jpg", "/closed/but.jpg")[: len(outcomes)]
    found = crawl(web, *paths, respect_tdmrep=True)
    assert tuple(found[path].status for path in paths) == outcomes


def test_one_host_is_asked_once_however_it_is_spelt() -> None:
    asked: list[str] = []

    def read(url: str, deadline: float) -> tuple[int | None, bytes]:
        asked.append(url)
        return 200, b"User-agent: *\nDisallow: /private"

    rules = SiteRules(read, "capfilt", robots=True, tdmrep=False)
    for host in ("a.test", "1@a.test", "2:x@A.test", "a.test:80"):
        assert rules.objection(f"http://{host}/private/x.jpg") == "robots.txt"
    assert asked == ["http://a.test/robots.txt"]
    assert rules.objection("http://[2606:4700::1]:81/x.jpg") is None
    assert asked[1:] == ["http://[2606:4700::1]:81/robots.txt"]


def test_what_hosts_say_takes_a_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optout, "_BYTES_REMEMBERED", 1_000)
    asked = Counter[str]()

    def read(url: str, deadline: float) -> tuple[int | None, bytes]:
        asked[url] += 1
        return 200, b"#" * 400

    rules = SiteRules(read, "capfilt", robots=True, tdmrep=False)
    for host in "ababc":
        rules.objection(f"http://{host}.test/x.jpg")
    assert len(rules._known) == 2 and rules._size == 800
    rules.objection("http://b.test/x.jpg")
    rules.objection("http://a.test/x.jpg")
    times = {"a": 2, "b": 1, "c": 1}
    assert asked == {f"http://{host}.test/robots.txt": n for host, n in times.items()}


def test_a_tdmrep_json_of_thousands_of_locations_is_no_permission() -> None:
    entries = [{"location": f"/{n}", "tdm-reservation": 0} for n in range(1_001)]

    def read(url: str, deadline: float) -> tuple[int | None, bytes]:
        return 200, json.dumps(entries).encode()

    rules = SiteRules(read, "capfilt", robots=False, tdmrep=True)
    expected = "tdmrep.json: 1001 locations, at most 1000 are read"
    assert rules.objection("http://a.test/x.jpg") == expected
    entries.pop()
    assert rules.objection("http://b.test/x.jpg") is None


def test_redirects_that_lead_nowhere_are_told() -> None:
    rules = SiteRules(lambda *_: (None, b""), "capfilt", robots=True, tdmrep=False)
    told = rules.objection("http://a.test/x.jpg")
    assert told == "robots.txt cannot be read (its redirects lead nowhere)"


def test_hosts_that_fail_are_forgotten_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optout, "_HOSTS_REMEMBERED", 2)

    def read(url: str, deadline: float) -> tuple[int | None, bytes]:
        raise FetchError("timeout", "silent", transient=True)

    rules = SiteRules(read, "capfilt", robots=True, tdmrep=False)
    for host in "abcd":
        with pytest.raises(FetchError):
            rules.objection(f"http://{host}.test/x.jpg")
    assert len(rules._known) == 2
