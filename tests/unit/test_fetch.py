"""Fetching from a server that does everything wrong."""

import http.client
import math
import shutil
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from stages.connect import FetchError
from stages.crawl import Crawler
from stages.fetch import FetchConfig, Fetched, Fetcher, Hop, _Budget, _read
from tests.servers import WebServer, certified, gzip_bomb, known_locally, picture

Fetch = Callable[..., Fetched]


@pytest.fixture(scope="module")
def web() -> Iterator[WebServer]:
    with WebServer() as server:
        server.serve("/good.jpg", picture())
        yield server


@pytest.fixture
def fetch(web: WebServer) -> Iterator[Fetch]:
    made: list[Crawler] = []

    def fetch(path: str, **options: object) -> Fetched:
        patient = {"timeout": 5.0, "retries": 0, "backoff": 0.01, "connect_to": web.connect_to}
        made.append(Crawler(FetchConfig(**{**patient, **options})))
        url = web.url(path) if path.startswith("/") else path
        ((_, fetched),) = made[-1].fetch_all({"it": url})
        return fetched

    yield fetch
    for fetcher in made:
        fetcher.close()


def test_a_good_image_comes_as_it_is(fetch: Fetch) -> None:
    fetched = fetch("/good.jpg")
    assert (fetched.status, fetched.detail) == ("success", None)
    assert fetched.body == picture()
    assert fetched.content_type == "image/jpeg"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/404", "http_4xx"),
        ("/410", "http_4xx"),
        ("/429", "http_4xx"),
        ("/500", "http_5xx"),
        ("/304", "redirect"),
        ("/301", "redirect"),
        ("/loop", "redirect"),
        ("/to?file:///etc/passwd", "redirect"),
        ("/to?ftp://web.test/x.jpg", "redirect"),
        ("/to?http://[broken/", "redirect"),
        ("/to?http://169.254.169.254/latest/meta-data/", "blocked_address"),
        ("/to?http://127.0.0.1:1/", "blocked_address"),
        ("/to?http://localhost:1/", "blocked_address"),
        ("/noai", "opted_out"),
        ("/noindex", "opted_out"),
        ("/foragent", "opted_out"),
        ("/reset", "broken_response"),
        ("/cut", "broken_response"),
        ("/nothttp", "broken_response"),
        ("/hugeheader", "broken_response"),
        ("/endless", "too_large"),
        ("/declared", "too_large"),
        ("/gzipbomb", "too_large"),
        ("file:///etc/passwd", "invalid_url"),
        ("http://127.0.0.1/x.jpg", "blocked_address"),
        ("http://[::1]/x.jpg", "blocked_address"),
    ],
)
def test_each_fault_has_its_status(fetch: Fetch, path: str, status: str) -> None:
    start = time.monotonic()
    fetched = fetch(path)
    assert (fetched.status, fetched.body) == (status, b"")
    assert fetched.detail
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("path", ["/hang", "/drip", "/dripheader"])
def test_slow_servers_are_given_up_in_time(fetch: Fetch, path: str) -> None:
    start = time.monotonic()
    fetched = fetch(path, timeout=0.4, total_timeout=0.8)
    assert fetched.status == "timeout"
    assert time.monotonic() - start < 3


def test_a_name_that_nobody_knows_is_dns(fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", known_locally)
    assert fetch("http://no-such-name.invalid/x.jpg").status == "dns"


def test_redirects_are_followed_relative_and_to_other_hosts(fetch: Fetch, web: WebServer) -> None:
    assert fetch("/to?/good.jpg").body == picture()
    both = {**web.connect_to, "cdn.test": web.address}
    assert fetch("/to?http://cdn.test/good.jpg", connect_to=both).body == picture()
    assert fetch("/to?/good.jpg", max_redirects=0).status == "redirect"


def test_what_an_attempt_has_used_up_goes_on_with_it_to_another_host(web: WebServer) -> None:
    both = {**web.connect_to, "cdn.test": web.address}
    fetcher = Fetcher(FetchConfig(connect_to=both, max_redirects=3, total_timeout=20.0))
    url = web.url("/to?http://cdn.test/good.jpg")
    onward = fetcher.fetch(Hop(url, 2, 5.0)).onward
    assert onward is not None
    assert onward[:2] == ("http://cdn.test/good.jpg", 3)
    assert onward.seconds > 5.0
    assert fetcher.fetch(onward).body == picture()
    before = web.hits.copy()
    assert fetcher.fetch(onward._replace(seconds=20.0)).status == "timeout"
    assert web.hits == before, "nothing was left to ask with"
    last = fetcher.fetch(Hop(url, 3))
    assert (last.status, last.onward) == ("redirect", None)
    assert last.detail == "more than 3 redirects"
    fetcher.close()


def test_compressed_bodies_are_expanded(fetch: Fetch, web: WebServer) -> None:
    import gzip

    body = gzip.compress(picture())
    web.serve("/gzip.jpg", body, Content_Encoding="gzip")
    fetched = fetch("/gzip.jpg")
    assert (fetched.body, fetched.held) == (picture(), 0)  # a small one waits for no memory
    web.serve("/brotli.jpg", body, Content_Encoding="br")
    assert "br" in (fetch("/brotli.jpg").detail or "")
    web.serve("/bad.jpg", b"not gzip", Content_Encoding="gzip")
    assert fetch("/bad.jpg").status == "broken_response"


def test_what_expands_is_told_before_it_does() -> None:
    """20 kB of gzip become 19 MB; a piece of it at a time is made before memory is asked for."""
    body = zlib.compress(bytes(19_000_000), wbits=zlib.MAX_WBITS | 16)
    answer = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(body)}\r\n\r\n"
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(answer.encode() + body)
        theirs.close()
        response = http.client.HTTPResponse(ours)
        response.begin()
        tracemalloc.start()
        made = []
        try:
            data = _read(
                response,
                20 << 20,
                lambda size: made.append((size, tracemalloc.get_traced_memory())),
            )
        finally:
            tracemalloc.stop()
    assert data == bytes(19_000_000)
    size, (_, peak) = next(entry for entry in made if entry[0])
    assert size == 20 << 20 and peak < 3 << 20


def test_the_size_limit_is_exact(fetch: Fetch) -> None:
    size = len(picture())
    assert fetch("/good.jpg", max_bytes=size).status == "success"
    assert fetch("/good.jpg", max_bytes=size - 1).status == "too_large"


def test_a_bomb_is_not_expanded_in_memory(fetch: Fetch) -> None:
    import tracemalloc

    assert len(gzip_bomb()) < 1_000_000  # made here, not while memory is traced
    tracemalloc.start()
    fetched = fetch("/gzipbomb", max_bytes=1_000_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert fetched.status == "too_large"
    assert peak < 10_000_000


@pytest.mark.parametrize(
    ("path", "requests"),
    [
        ("/flaky/1/a", 2),
        ("/flaky/2/b", 3),
        ("/flaky/9/c", 3),
        ("/404", 1),
        ("/noai", 1),
        ("/429", 3),
    ],
)
def test_only_what_may_pass_is_tried_again(
    fetch: Fetch, web: WebServer, path: str, requests: int
) -> None:
    before = web.hits[path]
    fetched = fetch(path, retries=2)
    assert web.hits[path] - before == requests
    assert (fetched.status == "success") == path.startswith(("/flaky/1", "/flaky/2"))


def test_opt_outs_can_be_ignored_or_named_otherwise(fetch: Fetch) -> None:
    assert fetch("/noai", respect_opt_out=False).status == "success"
    assert fetch("/noindex", disallowed_directives=["NoAI"]).status == "success"
    assert fetch("/noai", disallowed_directives=["NoAI "]).status == "opted_out"
    assert fetch("/foragent", user_agent="other/1").status == "success"


def test_the_user_agent_is_honest(fetch: Fetch, web: WebServer) -> None:
    web.agents.clear()
    fetch("/good.jpg", contact="https://capfilt.test/bot")
    (agent,) = web.agents
    assert agent.startswith("capfilt/")
    assert agent.endswith("(+https://capfilt.test/bot)")
    assert "Mozilla" not in agent


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl")
def test_a_certificate_that_nobody_signed_is_tls(fetch: Fetch, tmp_path: Path) -> None:
    context, _ = certified("web.test", tmp_path)
    with WebServer() as secure:
        secure._server.socket = context.wrap_socket(secure._server.socket, server_side=True)
        fetched = fetch("https://web.test/good.jpg", connect_to=secure.connect_to)
        plain = fetch("https://web.test/good.jpg")  # a server that speaks no TLS
    assert (fetched.status, plain.status) == ("tls", "tls")


def test_one_fetcher_serves_many_threads(fetch: Fetch, web: WebServer) -> None:
    fetcher = Fetcher(FetchConfig(connect_to=web.connect_to))
    bodies: list[bytes] = []
    good = Hop(web.url("/good.jpg"))
    work = [
        threading.Thread(target=lambda: bodies.append(fetcher.fetch(good).body)) for _ in range(40)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    fetcher.close()
    assert bodies == [picture()] * 40


def test_unforeseen_errors_stay_with_their_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("what\nnow")

    fetcher = Fetcher(FetchConfig())
    monkeypatch.setattr(fetcher._connector, "open", explode)
    fetched = fetcher.fetch(Hop("http://web.test/x.jpg"))
    assert fetched == Fetched("failed", "RuntimeError: what now")


def test_addresses_to_connect_to_are_checked() -> None:
    with pytest.raises(ValidationError, match="must be address:port"):
        FetchConfig(connect_to={"web.test": "127.0.0.1"})


def test_nothing_happens_at_import() -> None:
    code = (
        "import stages.download, sys; assert not {'img2dataset', 'cv2', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["user_agent", "contact"])
@pytest.mark.parametrize("text", ["a\r\nHost: b", "a\n", "a\x00", "bot ✓", "\x85"])
def test_what_webmasters_are_told_fits_a_header(name: str, text: str) -> None:
    with pytest.raises(ValidationError, match="one line of Latin-1"):
        FetchConfig(**{name: text})
    assert FetchConfig(**{name: "Bücherei https://a.test/bot?x=1"})


def test_waiting_for_memory_is_not_the_hosts_failure() -> None:
    budget = _Budget(100)
    budget.take(80, math.inf)
    with pytest.raises(FetchError, match="no memory came free in time") as caught:
        budget.take(50, time.monotonic() + 0.05)
    assert caught.value.status == "failed" and caught.value.transient
    budget.take(20, math.inf)


def test_large_bodies_are_served_in_turn() -> None:
    """However many small ones come after it, the large one is next."""
    budget, served = _Budget(100), list[int]()

    def take(size: int) -> None:
        budget.take(size, time.monotonic() + 30)
        served.append(size)

    budget.take(60, math.inf)
    threads = []
    for number, size in enumerate((90, 30, 10), 1):
        threads.append(threading.Thread(target=take, args=(size,)))
        threads[-1].start()
        while len(budget._waiting) < number:
            time.sleep(0.001)
    assert served == []
    budget.give_back(60)
    threads[0].join(30)
    threads[2].join(0.05)
    assert served == [90]
    budget.give_back(90)
    for thread in threads:
        thread.join(30)
    assert sorted(served) == [10, 30, 90]
