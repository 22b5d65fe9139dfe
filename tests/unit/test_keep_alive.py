"""Connections that serve one request after another, as far as the host lets them."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from stages import connect
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


@pytest.mark.parametrize(
    "first",
    [
        ok(b"one", b"Connection: close"),
        ok(b"one", version=b"1.0"),
        b"HTTP/1.1 200 OK\r\n\r\none",  # its end is the connection's
        ok(b"one")[:-1],
        ok(b"larger than it may be"),
        b"HTTP/1.1 302 Found\r\nContent-Length: 3\r\nLocation: ftp://x\r\n\r\none",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\none",
    ],
    ids=["close", "1.0", "endless", "cut", "too_large", "redirect", "404"],
)
def test_one_that_cannot_be_used_again_is_closed(script, first: bytes) -> None:
    more = [] if b"Length" not in first or first == ok(b"one")[:-1] else [ok(b"wrong")]
    host, fetcher = script([first, *more], [ok(b"two")], max_bytes=10)
    get(fetcher)
    assert get(fetcher).body == b"two"
    assert host.asked == [1, 1]


def test_one_that_the_host_has_closed_costs_no_attempt(script) -> None:
    host, fetcher = script([ok(b"one")], [ok(b"two")], [ok(b"three")])
    assert [get(fetcher).body for _ in range(3)] == [b"one", b"two", b"three"]
    assert host.asked == [1, 1, 1]


@pytest.mark.parametrize("late", [False, True])
def test_what_nobody_asked_for_is_never_an_answer(script, late: bool) -> None:
    wrong = b"garbage\r\n\r\n"
    answers = [ok(b"one"), wrong] if late else [ok(b"one") + wrong, ok(b"two")]
    host, fetcher = script(answers, [ok(b"two")])
    assert [get(fetcher).body for _ in range(2)] == [b"one", b"two"]
    assert host.asked[0] == 2 if late else sum(host.asked) == 2


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


def test_close_ends_them(script) -> None:
    _, fetcher = script([ok(b"one"), ok(b"two")])
    get(fetcher)
    (idle,) = fetcher._connector._idle
    fetcher.close()
    assert idle.sock.fileno() == -1


def test_tls_is_spoken_over_one_connection(script, tmp_path: Path) -> None:
    host, fetcher = script([ok(b"one"), ok(b"two")], [ok(b"three")])
    host.tls, certificate = certified("web.test", tmp_path)
    fetcher._connector._tls = ssl.create_default_context(cafile=str(certificate))
    bodies = [fetcher.fetch(Hop("https://web.test/x.jpg")).body for _ in range(2)]
    assert bodies == [b"one", b"two"]
    assert host.asked == [2]
