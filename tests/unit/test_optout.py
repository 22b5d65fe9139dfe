"""What sites say about the use of their images."""

from __future__ import annotations

from collections.abc import Iterator
from email.message import Message

import pytest

from stages.crawl import Crawler
from stages.fetch import FetchConfig, Fetched
from stages.optout import OPT_OUT_DIRECTIVES, header_objection
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
        (500, b"", "opted_out"),
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


def test_robots_txt_holds_behind_redirects_too(web: WebServer) -> None:
    web.serve("/robots.txt", ROBOTS, "text/plain")
    path = "/to?/closed/a.jpg"
    assert crawl(web, path, respect_robots=True)[path].status == "opted_out"


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
