"""A cluster that cannot be used: one clear line, exit code 2, within half a minute."""

import json
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray

from pipeline.config import EngineConfig
from pipeline.engine import cluster
from pipeline.engine.cluster import connected
from pipeline.store import Store
from stages.errors import ConfigError, StoreError
from tests.s3 import use_endpoint

ROOT = Path(__file__).parents[2]


def join(address: str | None, tmp_path: Path) -> None:
    with connected(EngineConfig(address=address, cpus=1), tmp_path / "ray.log"):
        pass


@contextmanager
def listener():
    """A port where something accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_no_cluster_at_the_address(tmp_path):
    with listener() as address:
        pass  # closed again
    command = [sys.executable, "-m", "pipeline", "run", "configs/tiny.yaml", f"run={tmp_path}/run"]
    done = subprocess.run(
        [*command, f"engine.address={address}", "world.web_rows=80"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"engine.address: cannot use the Ray cluster at {address}: nothing answers" in (
        done.stderr
    )
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run/records").rglob("*.json"))


def test_something_else_listens_at_the_address(tmp_path):
    with listener() as address, pytest.raises(ConfigError, match="no Ray answers there within"):
        join(address, tmp_path)


def test_addresses_that_no_driver_can_join(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="submit the run with `ray job`"):
        join("ray://127.0.0.1:10001", tmp_path)

    def nowhere(*_):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", nowhere)
    with pytest.raises(ConfigError, match=r"nothing answers there .*not known"):
        join("head.test:6379", tmp_path)


@pytest.mark.parametrize("which", ["ray", "python"])
def test_another_version_than_the_clusters(tmp_path, monkeypatch, which):
    """Ray compares what its head has noted with what the driver says; here the driver lies."""
    monkeypatch.setattr(cluster, "_check_reachable", lambda address: None)
    mine = ray._private.utils.compute_version_info()
    lie = ("2.41.0", mine[1]) if which == "ray" else (mine[0], "3.12.1")
    context = ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    address = context.address_info["gcs_address"]
    # The head ends with its driver, so a second process joins it.
    code = (
        "import sys; from pathlib import Path; import ray._private.utils as utils;"
        f"utils.compute_version_info = lambda: {lie!r};"
        "from pipeline.cli import main;"
        f"sys.exit(main(['run', 'configs/tiny.yaml', 'run={tmp_path}/run', 'world.web_rows=80',"
        f"'engine.address={address}']))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )
    finally:
        ray.shutdown()
    assert done.returncode == 2, done.stderr
    line = next(line for line in done.stderr.splitlines() if line.startswith("capfilt:"))
    assert "Version mismatch" in line
    assert lie[0] in line
    assert lie[1] in line


def test_a_runtime_environment_that_cannot_be_built(tmp_path, monkeypatch):
    missing = {"runtime_env": {"working_dir": f"file://{tmp_path}/missing.zip"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(missing))
    with pytest.raises(ConfigError, match=r"runtime_env: Ray cannot start a worker"):
        join(None, tmp_path)
    assert not ray.is_initialized()


class _Expired(BaseHTTPRequestHandler):
    """S3, as it answers a token of yesterday."""

    def _refuse(self) -> None:
        body = b"<Error><Code>ExpiredToken</Code><Message>The token has expired.</Message></Error>"
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_POST = _refuse

    def log_message(self, *_: object) -> None:
        pass


def test_expired_credentials(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Expired)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(StoreError, match=r"run folder 's3://bucket/run': .*expired") as told:
            Store("s3://bucket/run").ensure()
    finally:
        server.shutdown()
    assert "\n" not in str(told.value)
