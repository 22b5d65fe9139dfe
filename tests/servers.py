"""A web server on loopback that behaves well, or badly in every way the web does.

    with WebServer() as web:
        good = web.serve("/cat.jpg", jpeg)          # any body, status and headers
        url = web.url("/hang")                      # one of the built-in faults

``web.url`` keeps a host name (``web.test``) that only `web.connect_to` leads here, so that tests
use real-looking URLs without a name server, and nothing has to be allowed on loopback.

Built-in paths: ``/404``, ``/410``, ``/429``, ``/500``, ``/hang`` (no answer), ``/drip`` (a byte
now and then), ``/dripheader``, ``/reset``, ``/cut`` (shorter than declared), ``/endless``,
``/declared`` (says it is huge), ``/gzipbomb``, ``/hugeheader``, ``/nothttp``, ``/empty``,
``/html``, ``/htmlimage`` (HTML called image/jpeg), ``/svg``, ``/loop``,
``/to?URL`` (redirects there), ``/noai`` ``/noindex`` ``/foragent`` (opt-out headers),
``/flaky/N/...`` (503 for the first N requests), ``/slow/S/...`` (an image after S seconds),
``/later/S/...`` (429 once, asking for S seconds of peace).
"""

from __future__ import annotations

import gzip
import io
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self
from urllib.parse import unquote

import numpy as np
from PIL import Image

HTML = b"<!doctype html><html><body>Sign in to see this picture.</body></html>"
SVG = (
    b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'
)


def picture(width: int = 64, height: int = 48, seed: int = 0, format: str = "JPEG") -> bytes:
    """An encoded image of smooth noise: every seed another picture, also to a perceptual hash."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, format)
    return out.getvalue()


@cache
def gzip_bomb() -> bytes:
    """50 kB that expand to 50 MB."""
    return gzip.compress(bytes(50_000_000), 9)


def known_locally(host: str, *args: object) -> object:
    """`socket.getaddrinfo` without a name server: names that end in .invalid are unknown."""
    if host.endswith(".invalid"):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return _getaddrinfo(host, *args)  # type: ignore[arg-type]


_getaddrinfo = socket.getaddrinfo


@dataclass(frozen=True)
class Page:
    body: bytes
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


def certified(host: str, folder: Path) -> tuple[ssl.SSLContext, Path]:
    """What a TLS server called ``host`` needs, and the certificate that it signed by itself.
    Raises FileNotFoundError where there is no openssl."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={host}"]
    command += ["-addext", f"subjectAltName=DNS:{host}", "-keyout", str(key)]
    subprocess.run([*command, "-out", certificate], capture_output=True, check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, certificate


class WebServer:
    """Serves until the ``with`` block ends. ``hits`` counts requests by path, ``agents`` keeps the
    user agents that came, ``most_at_once`` how many requests were open together."""

    def __init__(self, host: str = "web.test", seconds: float = 30.0) -> None:
        self.host = host
        self.seconds = seconds  # how long a server that hangs does so
        self.hits: Counter[str] = Counter()
        self.times: dict[str, list[float]] = {}  # of `time.monotonic`, a request each
        self.at_once = self.most_at_once = 0
        self.agents: set[str] = set()
        self.pages: dict[str, Page] = {}
        self.closing = threading.Event()
        self.counting = threading.Lock()
        owner = self

        class Handler(_Handler):
            web = owner

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def connect_to(self) -> dict[str, str]:
        return {self.host: self.address}

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    def serve(
        self,
        path: str,
        body: bytes,
        content_type: str = "image/jpeg",
        status: int = 200,
        **headers: str,
    ) -> str:
        """Serve ``body`` at ``path``; header names with underscores for dashes. Returns the URL."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.pages[path] = Page(body, status, {"Content-Type": content_type, **named})
        return self.url(path)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up on a bad server are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes, the second would wait
    web: ClassVar[WebServer]

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        path = unquote(self.path)
        if path not in self.web.pages:
            self.close_connection = True
        self.web.hits[path] += 1
        self.web.agents.add(self.headers.get("User-Agent", ""))
        self.web.times.setdefault(path, []).append(time.monotonic())
        if path in self.web.pages:
            page = self.web.pages[path]
            return self.answer(page.body, page.status, **page.headers)
        kind = path.split("/")[1] if path.count("/") > 1 else ""
        if kind in {"flaky", "slow", "later"}:
            return {"flaky": self.flaky, "slow": self.slow, "later": self.later}[kind](path)
        if path.startswith("/to?"):
            return self.answer(b"", 302, Location=path.removeprefix("/to?"))
        name = path.strip("/")
        if name.isdigit():
            return self.answer(b"no", int(name))
        fault: Callable[[], None] | None = getattr(self, f"fault_{name}", None)
        return fault() if fault else self.answer(b"not found", 404)

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def flaky(self, path: str) -> None:
        failures = int(path.split("/")[2])
        if self.web.hits[path] <= failures:
            return self.answer(b"busy", 503)
        return self.answer(picture())

    def slow(self, path: str) -> None:
        with self.web.counting:
            self.web.at_once += 1
            self.web.most_at_once = max(self.web.most_at_once, self.web.at_once)
        self.wait(float(path.split("/")[2]))
        with self.web.counting:
            self.web.at_once -= 1
        self.answer(picture())

    def later(self, path: str) -> None:
        if self.web.hits[path] > 1:
            return self.answer(picture())
        return self.answer(b"slow down", 429, **{"Retry-After": path.split("/")[2]})

    def wait(self, seconds: float | None = None) -> bool:
        """False once the server closes."""
        return not self.web.closing.wait(seconds if seconds is not None else self.web.seconds)

    def start(self, **headers: str) -> None:
        """A response without a length."""
        self.send_response(200)
        for name, value in {"Content-Type": "image/jpeg", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def fault_hang(self) -> None:
        self.wait()

    def fault_drip(self) -> None:
        self.start()
        end = time.monotonic() + self.web.seconds
        while time.monotonic() < end and self.wait(0.05):
            self.wfile.write(b"\xff")
            self.wfile.flush()

    def fault_dripheader(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        end = time.monotonic() + self.web.seconds
        while time.monotonic() < end and self.wait(0.05):
            self.wfile.write(b"a")
            self.wfile.flush()

    def fault_reset(self) -> None:
        self.connection.close()

    def fault_cut(self) -> None:
        self.start(Content_Length="100000")
        self.wfile.write(picture())

    def fault_endless(self) -> None:
        self.start()
        while self.wait(0):
            self.wfile.write(b"\xff" * 65536)

    def fault_declared(self) -> None:
        self.start(Content_Length=str(10**12))

    def fault_gzipbomb(self) -> None:
        self.answer(gzip_bomb(), **{"Content-Encoding": "gzip"})

    def fault_hugeheader(self) -> None:
        self.start(X_Big="a" * 1_000_000)

    def fault_nothttp(self) -> None:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")

    def fault_empty(self) -> None:
        self.answer(b"")

    def fault_html(self) -> None:
        self.answer(HTML, **{"Content-Type": "text/html"})

    def fault_htmlimage(self) -> None:
        self.answer(HTML, **{"Content-Type": "image/jpeg"})

    def fault_svg(self) -> None:
        self.answer(SVG, **{"Content-Type": "image/svg+xml"})

    def fault_loop(self) -> None:
        self.answer(b"", 302, Location="/loop")

    def fault_noai(self) -> None:
        self.answer(picture(), **{"X-Robots-Tag": "noarchive, noai"})

    def fault_noindex(self) -> None:
        self.answer(picture(), **{"X-Robots-Tag": "noindex"})

    def fault_foragent(self) -> None:
        self.answer(picture(), **{"X-Robots-Tag": "capfilt: noimageai"})
