"""Connections that serve one request after another, as far as the host lets them."""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from stages import connect
from stages.connect import Target
from stages.crawl import Crawler
from stages.fetch import FetchConfig, Fetched, Fetcher, Hop
from tests.servers import certified


class Script:
    """A host whose nth connection gives its nth list of answers, one a request, and then ends; an
    answer that is None never comes. ``asked`` counts the requests of each connection."""

    def __init__(self, *connections: Sequence[bytes | None]) -> None:
        self.asked: list[int] = []
        self.tls: ssl.SSLContext | None = None
        self.closing = threading.Event()
        self._connections = connections
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        for number, answers in enumerate(self._connections):
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.asked.append(0)
            self._threads.append(
                threading.Thread(target=self._answer, args=(number, sock, answers), daemon=True)
            )
            self._threads[-1].start()

    def _answer(self, number: int, sock: socket.socket, answers: Sequence[bytes | None]) -> None:
        if self.tls is not None:
            sock = self.tls.wrap_socket(sock, server_side=True)
        with sock, sock.makefile("rb") as requests:
            for answer in answers:
                while (line := requests.readline()) not in {b"\r\n", b""}:
                    pass
                if not line:
                    return
                self.asked[number] += 1
                if answer is None:
                    self.closing.wait(10)
                    return
                sock.sendall(answer)

    def close(self) -> None:
        self.closing.set()
        self._listener.close()


@pytest.fixture
def script() -> Iterator[Callable[..., tuple[Script, Fetcher]]]:
    made: list[tuple[Script, Fetcher]] = []

    def start(*connections: Sequence[bytes | None], **options: object) -> tuple[Script, Fetcher]:
        host = Script(*connections)
        config = FetchConfig(connect_to={"web.test": host.address}, timeout=5.0, **options)
        made.append((host, Fetcher(config)))
        return made[-1]

    yield start
    for host, fetcher in made:
        fetcher.close()
        host.close()


def ok(body: bytes, *headers: bytes, version: bytes = b"1.1") -> bytes:
    lines = (b"HTTP/" + version + b" 200 OK", b"Content-Length: %d" % len(body), *headers)
    return b"\r\n".join((*lines, b"", body))


def get(fetcher: Fetcher, host: str = "web.test") -> Fetched:
    return fetcher.fetch(Hop(f"http://{host}/x.jpg"))


def test_a_connection_is_used_again(script) -> None:
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\ntwo\r\n0\r\n\r\n"
    host, fetcher = script([ok(b"one"), chunked, ok(b""), ok(b"four")])
    assert [get(fetcher).body for _ in range(4)] == [b"one", b"two", b"", b"four"]
    assert host.asked == [4]


CHUNKED = b"Transfer-Encoding: chunked"
BAD = {
    "close": ok(b"one", b"Connection: close"),
    "close, said late": ok(b"one", b"Connection: keep-alive", b"Connection: close"),
    "HTTP/1.0": ok(b"one", version=b"1.0"),
    "two framings": ok(b"3\r\none\r\n0\r\n\r\n", CHUNKED),
    "two lengths": ok(b"one", b"Content-Length: 4"),
    "another coding": ok(b"one", b"Transfer-Encoding: gzip, chunked"),
    "an odd length": b"HTTP/1.1 200 OK\r\nContent-Length: 0_3\r\n\r\none",
    "more than it said": ok(b"one") + b"HTTP",
    "too large": ok(b"larger than it may be"),
    "redirect": b"HTTP/1.1 302 Found\r\nContent-Length: 3\r\nLocation: ftp://x\r\n\r\none",
    "404": b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\none",
}


@pytest.mark.parametrize("first", BAD.values(), ids=BAD)
def test_one_that_cannot_be_used_again_is_closed(script, first: bytes) -> None:
    host, fetcher = script([first, ok(b"wrong")], [ok(b"two")], max_bytes=20)
    get(fetcher)
    assert not fetcher._connector._idle
    assert get(fetcher).body == b"two"
    assert host.asked == [1, 1]


@pytest.mark.parametrize("first", [b"HTTP/1.1 200 OK\r\n\r\none", ok(b"one")[:-1]])
def test_one_that_ended_with_its_body_is_closed(script, first: bytes) -> None:
    _, fetcher = script([first])
    get(fetcher)
    assert not fetcher._connector._idle


def test_one_that_the_host_has_closed_costs_no_attempt(script) -> None:
    host, fetcher = script([ok(b"one")], [ok(b"two")], [ok(b"three")])
    assert [get(fetcher).body for _ in range(3)] == [b"one", b"two", b"three"]
    assert host.asked == [1, 1, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        b"garbage\r\n\r\n",
        b"a" * 70_000,
        b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n",
    ],
    ids=["garbage", "a long line", "408"],
)
def test_what_is_no_answer_costs_no_attempt(script, wrong: bytes) -> None:
    host, fetcher = script([ok(b"one"), wrong], [ok(b"two")])
    assert [get(fetcher).body for _ in range(2)] == [b"one", b"two"]
    assert host.asked == [2, 1]


def test_a_host_that_falls_silent_is_not_asked_once_more(script) -> None:
    host, fetcher = script([ok(b"one"), None], [ok(b"two")], total_timeout=0.3)
    assert [get(fetcher).status for _ in range(2)] == ["success", "timeout"]
    assert host.asked == [2]


def test_each_host_has_connections_of_its_own(script) -> None:
    host, fetcher = script([ok(b"one"), ok(b"three")], [ok(b"two")])
    fetcher._connector._connect_to["other.test"] = host.address
    hosts = ("web.test", "other.test", "web.test")
    assert [get(fetcher, name).body for name in hosts] == [b"one", b"two", b"three"]
    assert host.asked == [2, 1]


def test_idle_ones_are_closed_after_a_while(script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "_IDLE_SECONDS", -1.0)
    host, fetcher = script([ok(b"one"), ok(b"wrong")], [ok(b"two"), ok(b"wrong")])
    assert [get(fetcher).body for _ in range(2)] == [b"one", b"two"]
    assert host.asked == [1, 1]


def test_no_more_are_kept_than_there_are_threads(script) -> None:
    host, fetcher = script([ok(b"one"), ok(b"wrong")], [ok(b"two")], [ok(b"three")], threads=1)
    fetcher._connector._connect_to["other.test"] = host.address
    hosts = ("web.test", "other.test", "web.test")
    assert [get(fetcher, name).body for name in hosts] == [b"one", b"two", b"three"]
    assert len(fetcher._connector._idle) == 1


def test_close_ends_them_and_those_to_come(script) -> None:
    host, fetcher = script([ok(b"one"), ok(b"two")], [ok(b"three")])
    get(fetcher)
    (idle,) = fetcher._connector._idle
    fetcher.close()
    assert idle.sock.fileno() == -1
    late = socket.create_connection(host.address.split(":"))
    fetcher._connector.keep(Target("http", "web.test", 80, "/"), late)
    assert late.fileno() == -1


def test_none_is_left_after_a_shard(script) -> None:
    host, _ = script([ok(b"one"), ok(b"two")])
    crawler = Crawler(FetchConfig(connect_to={"web.test": host.address}, host_connections=1))
    urls = {str(n): f"http://web.test/{n}.jpg" for n in range(2)}
    assert {fetched.body for _, fetched in crawler.fetch_all(urls)} == {b"one", b"two"}
    assert host.asked == [2]
    assert not crawler._fetcher._connector._idle


def test_a_chunk_of_negative_size_is_not_read(script) -> None:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    _, fetcher = script([head + b"-1\r\n" + b"a" * 100_000], max_bytes=1000)
    fetched = get(fetcher)
    assert (fetched.status, fetched.detail) == (
        "broken_response",
        "HTTPException: a chunk of negative size",
    )


@pytest.fixture
def tls(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of a server, and of a client that trusts it."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    server, certificate = certified("web.test", tmp_path)
    return server, ssl.create_default_context(cafile=str(certificate))


def test_what_tls_has_decrypted_is_waiting(tls) -> None:
    server, client = tls
    here, there = socket.socketpair()
    ends: list[ssl.SSLSocket] = []  # the server's, open to the end

    def speak() -> None:
        ends.append(server.wrap_socket(there, server_side=True))
        ends[0].sendall(b"abcdef")

    speaking = threading.Thread(target=speak)
    speaking.start()
    with client.wrap_socket(here, server_hostname="web.test") as sock:
        speaking.join()
        assert sock.recv(3) == b"abc"
        assert connect._has_word(sock)
        assert sock.recv(3) == b"def"
        assert not connect._has_word(sock)


def test_tls_is_spoken_over_one_connection(script, tls) -> None:
    host, fetcher = script([ok(b"one"), ok(b"two")], [ok(b"three")])
    host.tls, fetcher._connector._tls = tls
    bodies = [fetcher.fetch(Hop("https://web.test/x.jpg")).body for _ in range(2)]
    assert bodies == [b"one", b"two"]
    assert host.asked == [2]
