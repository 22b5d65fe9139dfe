"""One HTTP request and its response, over a connection that may serve the next one as well."""

from __future__ import annotations

import http.client
import re
import socket
import ssl
from contextlib import suppress
from typing import cast

from stages.connect import Connector, Target, TimedSocket


class Exchange:
    """One request and its response, over a connection of `Connector`, which gets it back where the
    response was read to its end and the host lets it stand."""

    def __init__(self, connector: Connector, target: Target, deadline: float) -> None:
        self._connector, self._target, self._deadline = connector, target, deadline
        self._connection: TimedSocket | None = None
        self._response: http.client.HTTPResponse | None = None

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._connection is None:
            return
        response = self._response
        stands = kind is None and response is not None and _may_stand(response)
        if stands and not self._connection.surplus:
            self._connector.keep(self._target, self._connection.sock)
        else:
            self._connection.shut()

    def get(self, agent: str) -> http.client.HTTPResponse:
        """The response, its body not read yet.

        Raises:
            FetchError: as `Connector.open`.
            OSError, http.client.HTTPException: `translated` names them.
        """
        self._connection = self._connector.take(self._target, self._deadline)
        if self._connection is not None:
            # It may have ended by now, or bring what belongs to no request.
            with suppress(ConnectionError, http.client.HTTPException, ssl.SSLError):
                response = self._ask(self._connection, agent)
                if response.status != http.client.REQUEST_TIMEOUT:
                    return response
            self._connection.shut()
        self._connection = self._connector.open(self._target, self._deadline)
        return self._ask(self._connection, agent)

    def _ask(self, sock: TimedSocket, agent: str) -> http.client.HTTPResponse:
        target = self._target
        connection = http.client.HTTPConnection(target.host, target.port)
        connection.sock = cast(socket.socket, sock)
        host = f"[{target.host}]" if ":" in target.host else target.host
        default = 443 if target.scheme == "https" else 80
        headers = {
            "Host": host if target.port == default else f"{host}:{target.port}",
            "User-Agent": agent,
            "Accept": "image/*,*/*;q=0.8",
            "Accept-Encoding": "identity",
        }
        connection.request("GET", target.path, headers=headers)
        self._response = connection.getresponse()
        return self._response


def _may_stand(response: http.client.HTTPResponse) -> bool:
    """Whether the connection may serve another request: the body was read to its end, both sides
    agree on where that is, and the host does not close."""
    lengths, codings, connection = (
        [value.strip().lower() for value in response.headers.get_all(name, [])]
        for name in ("Content-Length", "Transfer-Encoding", "Connection")
    )
    counted = len(lengths) == 1 and re.fullmatch("[0-9]+", lengths[0]) and not codings
    framed = counted or (codings == ["chunked"] and not lengths)
    closes = response.will_close or any("close" in value for value in connection)
    whole = response.isclosed() and response.status == http.client.OK
    return whole and bool(framed) and not closes
