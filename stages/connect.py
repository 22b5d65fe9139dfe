"""Connections that reach only where they may: checked addresses, and waits that end.

An address is resolved once, judged, and that very address is connected to, so that a name server
which changes its answer in between gains nothing. A connection whose response has been read to
its end serves the next request to its host, without another look-up or TLS handshake.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import re
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

_BUFFER = 1 << 16
_IDLE_SECONDS = 4.0
"""How old an unused connection may be to serve another request; most servers close later."""
_HOST = re.compile(r"[A-Za-z0-9._-]+")
_SAFE_IN_URL = "%/:=&?~+!$,;'@()*[]"
# Reached from inside Azure although the address is public.
_METADATA_ADDRESSES = frozenset({"168.63.129.16"})
# Which Python 3.11 takes for global: IETF's protocols, 6to4 relays, site-local addresses.
_NOT_GLOBAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "fec0::/10")))
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


class FetchError(Exception):
    """One attempt failed. ``status`` is one of download.STATUSES; ``transient``: may pass.
    ``code`` is the HTTP status, ``retry_after`` the seconds for which the host asks for peace."""

    def __init__(
        self,
        status: str,
        detail: str,
        transient: bool = False,
        code: int | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.transient = transient
        self.code = code
        self.retry_after = retry_after


class Target(NamedTuple):
    """A URL taken apart for a connection."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def origin(self) -> str:
        """Scheme, host and port, in one spelling."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = self.port == (443 if self.scheme == "https" else 80)
        return f"{self.scheme}://{host}" + ("" if usual else f":{self.port}")


def parse_url(url: str) -> Target:
    """The connection that an http(s) URL asks for; non-ASCII parts are encoded.

    Raises:
        FetchError: invalid_url.
    """
    try:
        parts = urlsplit(url.strip())
        scheme, host, port = parts.scheme.lower(), parts.hostname, parts.port
        if scheme not in {"http", "https"}:
            raise FetchError("invalid_url", f"scheme {scheme[:20]!r}: only http and https")
        if not host:
            raise FetchError("invalid_url", "no host name")
        host = host.encode("idna").decode("ascii")
        # What IDNA makes of odd letters may hold spaces or worse.
        if not (_HOST.fullmatch(host) or is_address(host)):
            raise FetchError("invalid_url", f"host name {host[:60]!r}")
        path = quote(parts.path or "/", safe=_SAFE_IN_URL)
        if parts.query:
            path += "?" + quote(parts.query, safe=_SAFE_IN_URL)
    except ValueError as error:
        raise FetchError("invalid_url", str(error)[:200]) from error
    return Target(scheme, host, port or (443 if scheme == "https" else 80), path)


def is_public(address: str) -> bool:
    """Whether an IP address lies outside: not private, loopback, link-local, multicast, reserved
    or a cloud's metadata service, also where IPv6 wraps an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if str(ip) in _METADATA_ADDRESSES or any(ip in network for network in _NOT_GLOBAL):
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1]
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Connector:
    """Opens sockets for many threads.

    Args:
        timeout: seconds for a name look-up, for a connection, and between two arriving pieces.
        threads: how many may open sockets at once.
        connect_to: host → ``address:port`` to connect to instead of what the host resolves to.
        private_hosts: host names that may resolve to addresses inside the network.
    """

    def __init__(
        self,
        timeout: float,
        threads: int,
        connect_to: Mapping[str, str],
        private_hosts: Collection[str],
    ) -> None:
        self._timeout = timeout
        self._connect_to = connect_to
        self._private = frozenset(host.lower() for host in private_hosts)
        self._tls = ssl.create_default_context()
        # getaddrinfo knows no time-out: it runs where its caller can stop waiting for it. One whose
        # caller has stopped keeps its thread for some time, which nobody else should wait for.
        self._resolver = ThreadPoolExecutor(4 * threads, thread_name_prefix="resolve")
        self._most_idle = threads
        self._idle: deque[_Idle] = deque()  # the last one used at the end
        self._lock = threading.Lock()

    def close(self) -> None:
        self._resolver.shutdown(wait=False, cancel_futures=True)
        self._most_idle = 0  # threads that still wait for a server keep nothing any more
        self.rest()

    def rest(self) -> None:
        """End the connections that nobody uses."""
        with self._lock:
            while self._idle:
                self._idle.popleft().sock.close()

    def take(self, target: Target, deadline: float) -> TimedSocket | None:
        """A connection to the same host that was given to `keep` and looks usable, if any."""
        while (sock := self._taken(target[:3])) is not None:
            if not _has_word(sock):
                return TimedSocket(sock, deadline, self._timeout)
            sock.close()
        return None

    def _taken(self, server: tuple[str, str, int]) -> socket.socket | None:
        with self._lock:
            stale = time.monotonic() - _IDLE_SECONDS
            while self._idle and self._idle[0].since < stale:
                self._idle.popleft().sock.close()
            idle = next((one for one in reversed(self._idle) if one.server == server), None)
            if idle is not None:
                self._idle.remove(idle)
        return idle.sock if idle is not None else None

    def keep(self, target: Target, sock: socket.socket) -> None:
        """Nothing is to come on this connection but the answer to another request."""
        with self._lock:
            self._idle.append(_Idle(target[:3], sock, time.monotonic()))
            if len(self._idle) > self._most_idle:
                self._idle.popleft().sock.close()

    def open(self, target: Target, deadline: float) -> TimedSocket:
        """A connection to ``target``, unusable after ``deadline`` (of `time.monotonic`). Of several
        addresses, each but the last may take half of the time that is left to connect.

        Raises:
            FetchError: dns, timeout, blocked_address or refused.
            OSError: as sockets do; `translated` names them.
        """
        problem: OSError | None = None
        addresses = self._addresses(target, deadline)
        end = min(deadline, time.monotonic() + self._timeout)
        for number, (family, address) in enumerate(addresses, 1):
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                left = _left(end, self._timeout)
                sock.settimeout(left if number == len(addresses) else left / 2)
                return self._opened(sock, address, target, deadline)
            except OSError as error:
                sock.close()
                if isinstance(error, ssl.SSLError | ConnectionResetError):
                    raise
                problem = error
        if isinstance(problem, TimeoutError):
            raise problem
        raise FetchError("refused", words(problem or OSError("no address")), transient=True)

    def _opened(
        self, sock: socket.socket, address: Any, target: Target, deadline: float
    ) -> TimedSocket:
        sock.connect(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if target.scheme == "https":
            sock.settimeout(_left(deadline, self._timeout))
            sock = self._tls.wrap_socket(sock, server_hostname=target.host)
        return TimedSocket(sock, deadline, self._timeout)

    def _addresses(self, target: Target, deadline: float) -> list[tuple[int, Any]]:
        """(family, socket address) pairs that may be connected to."""
        override = self._connect_to.get(target.host)
        if override is not None:
            host, _, port = override.rpartition(":")
            return self._resolve(host.strip("[]"), int(port), deadline)
        found = self._resolve(target.host, target.port, deadline)
        if target.host in self._private:
            return found
        allowed = [(family, address) for family, address in found if is_public(address[0])]
        if not allowed:
            inside = ", ".join(sorted({address[0] for _, address in found}))
            raise FetchError("blocked_address", f"{target.host} is {inside}, inside the network")
        return allowed

    def _resolve(self, host: str, port: int, deadline: float) -> list[tuple[int, Any]]:
        if is_address(host):  # nobody needs to be asked, so there is nothing to wait for
            return _found(socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM))
        future = self._resolver.submit(socket.getaddrinfo, host, port, 0, socket.SOCK_STREAM)
        try:
            found = future.result(timeout=_left(deadline, self._timeout))
        except TimeoutError as error:
            future.cancel()
            raise FetchError("timeout", f"name look-up of {host}", transient=True) from error
        except socket.gaierror as error:
            again = error.errno == socket.EAI_AGAIN
            raise FetchError("dns", f"{host}: {error.strerror}", transient=again) from error
        return _found(found)


class _Idle(NamedTuple):
    server: tuple[str, str, int]
    sock: socket.socket
    since: float


def _has_word(sock: socket.socket) -> bool:
    """Whether something has come that nobody asked for: the end of the connection, mostly."""
    if isinstance(sock, ssl.SSLSocket) and sock.pending():
        return True
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _found(answers: Iterable[tuple[Any, ...]]) -> list[tuple[int, Any]]:
    return [(family, address) for family, _, _, _, address in answers]


class TimedSocket:
    """What http.client needs of a socket, every wait bounded: by ``timeout`` seconds, and all
    together by ``deadline``, however slowly bytes drip in."""

    def __init__(self, sock: socket.socket, deadline: float, timeout: float) -> None:
        self.sock = sock
        self._deadline = deadline
        self._timeout = timeout
        self._streams: list[_Stream] = []

    @property
    def surplus(self) -> bool:
        """Whether more has been received than was read."""
        return any(stream.surplus for stream in self._streams)

    def sendall(self, data: bytes) -> None:
        self.sock.settimeout(_left(self._deadline, self._timeout))
        self.sock.sendall(data)

    def receive_into(self, buffer: memoryview) -> int:
        self.sock.settimeout(_left(self._deadline, self._timeout))
        return self.sock.recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        self._streams.append(_Stream(_Reader(self), _BUFFER))
        return self._streams[-1]

    def close(self) -> None:
        """http.client closes its socket before it reads the last body: `shut` really closes."""

    def shut(self) -> None:
        self.sock.close()


class _Reader(io.RawIOBase):
    def __init__(self, sock: TimedSocket) -> None:
        self._sock = sock
        self.ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        return None if self.ended else self._sock.receive_into(buffer)


class _Stream(io.BufferedReader):
    """What http.client reads a response from, and closes at its end."""

    surplus = False

    def __init__(self, reader: _Reader, size: int) -> None:
        super().__init__(reader, size)
        self._reader = reader

    def read(self, size: int | None = -1, /) -> bytes:
        """Of a stated size: without one, as for a chunk of size -1, it would have no bound."""
        if size is None or size < 0:
            raise http.client.HTTPException("a chunk of negative size")
        return super().read(size)

    def close(self) -> None:
        if not self.closed:
            self._reader.ended = True  # so that nothing is waited for
            self.surplus = bool(self.peek(1))
        super().close()


@contextmanager
def translated() -> Iterator[None]:
    """Turns what sockets and http.client raise into `FetchError`."""
    try:
        yield
    except TimeoutError as error:
        raise FetchError("timeout", words(error), transient=True) from error
    except ssl.SSLError as error:
        raise FetchError("tls", words(error)) from error
    except http.client.InvalidURL as error:
        raise FetchError("invalid_url", words(error)) from error
    except (OSError, http.client.HTTPException) as error:
        passing = isinstance(error, OSError | http.client.IncompleteRead)
        raise FetchError("broken_response", words(error), transient=passing) from error


def _left(deadline: float, timeout: float) -> float:
    """Seconds that the next wait may take.

    Raises:
        TimeoutError: none are left.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("total time is up")
    return min(left, timeout)


def words(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
