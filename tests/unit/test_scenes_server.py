"""The world over real HTTP on the loopback interface."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest

from stages.errors import SourceError
from stages.scenes.config import FaultConfig, WorldConfig
from stages.scenes.server import WorldServer, main
from stages.scenes.world import build_world

Row = dict[str, object]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds") / "world"
    config = WorldConfig(
        web_rows=200,
        human_images=1,
        dev_images=1,
        test_images=1,
        faults=FaultConfig(slow=2, pixel=1, hostile=1),
    )
    build_world(config, folder)
    return folder


@pytest.fixture(scope="module")
def server(world: Path) -> Iterator[WorldServer]:
    with WorldServer(world) as running:
        yield running


@pytest.fixture(scope="module")
def answers(world: Path) -> dict[str, Row]:
    return {row["url"]: row for row in pq.read_table(world / "responses.parquet").to_pylist()}


def connect(
    connect_to: dict[str, str], url: str, timeout: float = 10
) -> http.client.HTTPConnection:
    address, port = connect_to[urlsplit(url).netloc].split(":")
    return http.client.HTTPConnection(address, int(port), timeout=timeout)


def get(server: WorldServer, url: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    connection = connect(server.connect_to, url)
    connection.request(method, urlsplit(url).path, headers={"Host": urlsplit(url).netloc})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, dict(response.getheaders()), body


def test_every_answer_arrives_as_it_was_written(
    server: WorldServer, answers: dict[str, Row]
) -> None:
    for url, answer in answers.items():
        if answer["action"] == "answer":
            status, headers, body = get(server, url)
            assert (status, body) == (answer["status"], answer["body"])
            assert json.loads(str(answer["headers"])).items() <= headers.items()


def test_every_address_is_on_the_loopback_interface(server: WorldServer) -> None:
    assert {address.split(":")[0] for address in server.connect_to.values()} == {"127.0.0.1"}
    assert all(host.endswith(".scenes.example") for host in server.connect_to)


def test_dead_hosts_refuse(server: WorldServer, answers: dict[str, Row]) -> None:
    dead = [url for url, answer in answers.items() if answer["action"] == "refuse"]
    assert dead
    for url in dead:
        with pytest.raises(ConnectionRefusedError):
            get(server, url)


def test_other_paths_and_hosts_are_not_found(server: WorldServer) -> None:
    assert get(server, "http://images.scenes.example/nothing.png")[0] == 404
    connection = connect(server.connect_to, "http://images.scenes.example/")
    connection.request("GET", "/000001.png", headers={"Host": "elsewhere.example"})
    assert connection.getresponse().status == 404
    connection.close()


def test_head_has_no_body(server: WorldServer, answers: dict[str, Row]) -> None:
    url = next(url for url, answer in answers.items() if answer["status"] == 200)
    status, headers, body = get(server, url, "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) == len(bytes(answers[url]["body"]))  # type: ignore[arg-type]


def test_a_slow_host_holds_until_the_client_leaves(
    server: WorldServer, answers: dict[str, Row]
) -> None:
    url = next(url for url, answer in answers.items() if answer["action"] == "hang")
    before = set(threading.enumerate())
    connection = connect(server.connect_to, url, timeout=0.3)
    connection.request("GET", urlsplit(url).path, headers={"Host": urlsplit(url).netloc})
    with pytest.raises(TimeoutError):
        connection.getresponse()
    # Those of earlier tests may end in between: only new threads are this connection's.
    (holding,) = set(threading.enumerate()) - before
    connection.close()
    holding.join(10)
    assert not holding.is_alive()


def test_it_stops_while_clients_hang(world: Path, answers: dict[str, Row]) -> None:
    url = next(url for url, answer in answers.items() if answer["action"] == "hang")
    with WorldServer(world) as server:
        connection = connect(server.connect_to, url)
        connection.request("GET", urlsplit(url).path, headers={"Host": urlsplit(url).netloc})
        time.sleep(0.2)
        start = time.monotonic()
    assert time.monotonic() - start < 5
    connection.close()
    with pytest.raises(ConnectionRefusedError):
        get(server, url)


def test_a_burst_of_clients_is_served(server: WorldServer, answers: dict[str, Row]) -> None:
    urls = [url for url, answer in answers.items() if answer["status"] == 200] * 3
    with ThreadPoolExecutor(32) as pool:
        results = list(pool.map(lambda url: get(server, url)[2], urls))
    assert results == [answers[url]["body"] for url in urls]


def test_a_client_that_leaves_early_makes_no_noise(
    server: WorldServer, capfd: pytest.CaptureFixture[str]
) -> None:
    address, port = server.connect_to["images.scenes.example"].split(":")
    for _ in range(3):
        with socket.create_connection((address, int(port))) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.sendall(b"GET /000001.png HTTP/1.1\r\n")
    time.sleep(0.2)
    assert capfd.readouterr().err == ""


def test_a_folder_without_a_world_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SourceError, match="no sample world here"):
        WorldServer(tmp_path)
    assert main([str(tmp_path)]) == 2
    assert "no sample world" in capsys.readouterr().err


def test_it_serves_from_a_process_of_its_own(world: Path, answers: dict[str, Row]) -> None:
    url = next(url for url, answer in answers.items() if answer["status"] == 200)
    command = [sys.executable, "-m", "stages.scenes.server", str(world)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        connect_to = json.loads(process.stdout.readline())
        connection = connect(connect_to, url)
        connection.request("GET", urlsplit(url).path, headers={"Host": urlsplit(url).netloc})
        assert connection.getresponse().read() == answers[url]["body"]
        connection.close()
        process.kill()
