"""Where connections may lead."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from stages.connect import Connector, FetchError, Target, is_public, parse_url


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("http://a.test", ("http", "a.test", 80, "/")),
        ("HTTPS://A.Test:8443/x?q=1#frag", ("https", "a.test", 8443, "/x?q=1")),
        ("http://user:secret@a.test/x", ("http", "a.test", 80, "/x")),
        ("http://bücher.test/ü b?é=1", ("http", "xn--bcher-kva.test", 80, "/%C3%BC%20b?%C3%A9=1")),
        ("http://a.test/already%20quoted", ("http", "a.test", 80, "/already%20quoted")),
        ("http://[2001:db8::1]:80/x", ("http", "2001:db8::1", 80, "/x")),
    ],
)
def test_urls_are_taken_apart(url: str, target: tuple[str, str, int, str]) -> None:
    assert parse_url(url) == target


@pytest.mark.parametrize(
    "url",
    [
        "",
        "not a url",
        "/relative.jpg",
        "file:///etc/passwd",
        "ftp://a.test/x.jpg",
        "data:image/png;base64,AAAA",
        "javascript:alert(1)",
        "http://",
        "http:///x.jpg",
        "http://a.test:port/",
        "http://a.test:99999/",
        "http://[::1/",
        "http://" + "a" * 64 + ".test/",
        "http://a..test/",
        "http://\ud800.test/",
    ],
)
def test_what_is_no_web_address_is_an_invalid_url(url: str) -> None:
    with pytest.raises(FetchError) as caught:
        parse_url(url)
    assert caught.value.status == "invalid_url"
    assert not caught.value.transient


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "8.8.8.8", "2606:4700::1", "64:ff9b::808:808"]
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "100.100.100.200",  # Alibaba's metadata
        "169.254.169.254",  # metadata of most clouds
        "168.63.129.16",  # Azure's wire server
        "224.0.0.1",
        "255.255.255.255",
        "240.0.0.1",
        "::1",
        "::",
        "::127.0.0.1",
        "fe80::1%eth0",
        "fc00::1",
        "fd00:ec2::254",  # EC2's metadata
        "ff02::1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "192.0.0.192",  # Oracle's metadata
        "192.0.0.8",
        "192.88.99.1",
        "::ffff:192.0.0.192",
        "fec0::1",
        "feff::1",
    ],
)
def test_addresses_inside_the_network(address: str) -> None:
    assert not is_public(address)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def connector(**options: object) -> Connector:
    return Connector(
        **{"timeout": 2.0, "threads": 1, "connect_to": {}, "private_hosts": (), **options}
    )


def soon() -> float:
    return time.monotonic() + 5


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "2130706433", "0x7f.1", "127.1", "0"])
def test_loopback_is_refused_however_it_is_spelt(host: str, listener: socket.socket) -> None:
    target = Target("http", host, listener.getsockname()[1], "/")
    with pytest.raises(FetchError) as caught:
        connector().open(target, soon())
    assert caught.value.status in {"blocked_address", "dns"}  # a resolver may know no such spelling
    if host in {"localhost", "127.0.0.1"}:
        assert caught.value.status == "blocked_address"
    listener.settimeout(0.05)
    with pytest.raises(TimeoutError):
        listener.accept()  # nobody knocked


def test_named_hosts_may_be_private(listener: socket.socket) -> None:
    target = Target("http", "localhost", listener.getsockname()[1], "/")
    connector(private_hosts=("LocalHost",)).open(target, soon()).shut()
    listener.accept()[0].close()


def test_connect_to_leads_elsewhere_whatever_the_name(listener: socket.socket) -> None:
    address = f"127.0.0.1:{listener.getsockname()[1]}"
    target = Target("http", "no.such.host.invalid", 80, "/")
    connector(connect_to={"no.such.host.invalid": address}).open(target, soon()).shut()
    listener.accept()[0].close()


def test_a_closed_port_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(FetchError) as caught:
        connector(private_hosts=("localhost",)).open(Target("http", "localhost", port, "/"), soon())
    assert (caught.value.status, caught.value.transient) == ("refused", True)


def test_an_address_that_hangs_leaves_time_for_the_next(
    monkeypatch: pytest.MonkeyPatch, listener: socket.socket
) -> None:
    """As where IPv6 has an address and no route."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as held:
        hangs = full.getsockname()
        for _ in range(8):  # the kernel lets nobody in once the queue is full
            waiting = held.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(hangs)
        answers = [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", address)
            for address in (hangs, listener.getsockname())
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: answers)
        calm = connector(private_hosts=("two.test",))
        target = Target("http", "two.test", 80, "/")
        calm.open(target, soon()).shut()
        listener.settimeout(1)
        listener.accept()[0].close()
        del answers[1]
        with pytest.raises(TimeoutError):
            calm.open(target, soon())


def test_a_slow_look_up_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()

    def never(*_: object) -> list[object]:
        stop.wait(10)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", never)
    start = time.monotonic()
    with pytest.raises(FetchError) as caught:
        connector(timeout=0.2).open(Target("http", "slow.test", 80, "/"), soon())
    stop.set()
    assert caught.value.status == "timeout"
    assert time.monotonic() - start < 2


def test_names_that_nobody_looks_up_hold_up_no_other(
    monkeypatch: pytest.MonkeyPatch, listener: socket.socket
) -> None:
    """As many as there are threads hang; their callers have gone."""
    stop, real = threading.Event(), socket.getaddrinfo

    def slow(host: str, *rest: object) -> object:
        if host.startswith("slow"):
            stop.wait(10)
            return []
        return real("127.0.0.1", *rest)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    patient = connector(timeout=0.2, private_hosts=("good.test",))
    try:
        for number in range(3):
            with pytest.raises(FetchError):
                patient.open(Target("http", f"slow{number}.test", 80, "/"), soon())
        port = listener.getsockname()[1]
        patient.open(Target("http", "good.test", port, "/"), soon()).close()
    finally:
        stop.set()


def test_an_answer_that_changes_cannot_slip_through(
    monkeypatch: pytest.MonkeyPatch, listener: socket.socket
) -> None:
    port = listener.getsockname()[1]
    answers = ["203.0.113.9", "127.0.0.1"]  # rebinding: outside when checked, inside when used
    calls: list[str] = []

    def rebinding(host: str, *_: object) -> list[object]:
        calls.append(host)
        address = answers[min(len(calls), len(answers)) - 1]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    connected: list[object] = []

    class Spy(socket.socket):
        def connect(self, address: object) -> None:
            connected.append(address)
            raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(socket, "socket", Spy)
    monkeypatch.setattr("stages.connect.is_public", lambda address: address == "203.0.113.9")
    with pytest.raises(FetchError):
        connector().open(Target("http", "rebind.test", port, "/"), soon())
    assert connected == [("203.0.113.9", port)]
    assert calls == ["rebind.test"]
