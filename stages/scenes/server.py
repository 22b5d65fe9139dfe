"""The web of a sample world, over HTTP on the loopback interface.

URLs of a world name hosts and no ports, so that ids are equal in every run. A client reaches them
as with ``curl --connect-to``: by the map `WorldServer.connect_to`.

``python -m stages.scenes.server FOLDER`` serves a world from a process of its own.
"""

from __future__ import annotations

import json
import select
import socket
import socketserver
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import pyarrow.parquet as pq

from stages.errors import SourceError

_ADDRESS = "127.0.0.1"


@dataclass(frozen=True)
class _Answer:
    action: str
    status: int
    headers: dict[str, str]
    body: bytes


class WorldServer:
    """Serves what `world.build_world` wrote, from ``__enter__`` to ``__exit__``.

    Raises:
        SourceError: ``folder`` holds no world.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "responses.parquet"
        if not self._file.is_file():
            raise SourceError(f"{folder}: no sample world here; build one with build_world")
        self.connect_to: dict[str, str] = {}
        """Host name to ``address:port``. Hosts that refuse connections map to a closed port."""

    def __enter__(self) -> Self:
        self._server = _Server((_ADDRESS, 0), _Handler)
        self._server.answers = _load(self._file)
        self._closed = socket.socket()
        # Bound and never listened on: connections are refused, and nobody else gets the port.
        self._closed.bind((_ADDRESS, 0))
        for (host, _), answer in self._server.answers.items():
            bound = self._closed if answer.action == "refuse" else self._server.socket
            self.connect_to[host] = f"{_ADDRESS}:{bound.getsockname()[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._closed.close()
        self._thread.join()


def _load(file: Path) -> dict[tuple[str, str], _Answer]:
    answers = {}
    for row in pq.read_table(file).to_pylist():
        url = urlsplit(row["url"])
        answer = _Answer(row["action"], row["status"], json.loads(row["headers"]), row["body"])
        answers[url.netloc, url.path] = answer
    return answers


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 512
    """A shorter queue makes bursts of connections wait a second for TCP's first repetition."""

    answers: dict[tuple[str, str], _Answer]

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.stopping = threading.Event()
        super().__init__(address, handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients may leave when they like; anything else is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    wbufsize = -1
    """Buffered, so that headers and body leave in one piece."""

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").partition(":")[0]
        answer = self.server.answers.get((host, urlsplit(self.path).path), _NOTHING_HERE)
        if answer.action == "hang":
            self._hang()
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    do_HEAD = do_GET

    def _hang(self) -> None:
        """Say nothing until the client leaves or the server stops."""
        while not self.server.stopping.is_set():
            readable, _, _ = select.select([self.connection], [], [], 0.1)
            if readable and not self.connection.recv(4096):
                return

    def version_string(self) -> str:
        return "scenes"

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


_NOTHING_HERE = _Answer("answer", 404, {"Content-Type": "text/plain"}, b"nothing here\n")


def main(arguments: list[str]) -> int:
    """Serve the world in the named folder until killed; print ``connect_to`` as JSON first."""
    if len(arguments) != 1:
        print("usage: python -m stages.scenes.server FOLDER", file=sys.stderr)
        return 2
    try:
        with WorldServer(Path(arguments[0])) as server:
            print(json.dumps(server.connect_to), flush=True)
            threading.Event().wait()
    except SourceError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
