"""A cluster that cannot be used: one clear line, exit code 2, within half a minute."""

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray

from pipeline.config import EngineConfig
from pipeline.engine import cluster
from pipeline.engine.cluster import connected, look
from stages.errors import ConfigError, RunError
from tests.s3 import use_endpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture
def address():
    """Of a cluster of one CPU. It ends with this process, so that others join it."""
    context = ray.init(address="local", num_cpus=1, num_gpus=0, include_dashboard=False)
    try:
        yield context.address_info["gcs_address"]
    finally:
        ray.shutdown()


@contextmanager
def listener():
    """A port where something accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def refused(
    tmp_path: Path,
    *overrides: str,
    command: str = "run",
    seconds: float = 30.0,
    before: Sequence[str] = ("-m", "pipeline"),
) -> str:
    """The one line with which the command line refuses, within half a minute, before any work."""
    given = [command, "configs/tiny.yaml", f"run={tmp_path}/run", "world.web_rows=80", *overrides]
    done = subprocess.run(
        [sys.executable, *before, *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=seconds,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert not list((tmp_path / "run/records").rglob("*.json"))
    return line


@pytest.mark.parametrize("command", ["run", "schedule"])
def test_no_cluster_at_the_address(tmp_path, command):
    with listener() as address:
        pass  # closed again
    # Nothing that takes long is done before: a model that is not there is not looked for.
    overrides = (f"engine.address={address}", "embed.model=no/such-model")
    line = refused(tmp_path, *overrides, command=command)
    assert f"engine.address: cannot use the Ray cluster at {address}: nothing answers" in line
    assert not (tmp_path / "run").exists()


def test_no_gpu_in_the_cluster(tmp_path, address):
    wanted = (f"engine.address={address}", "embed.model=no/such-model", "caption.resources.gpus=1")
    line = refused(tmp_path, *wanted)
    assert "caption.resources: no place for caption 1 x 1 GPU at once, Ray has 0 GPUs" in line
    assert not (tmp_path / "run").exists()


def test_no_gpu_on_this_machine(tmp_path):
    line = refused(tmp_path, "embed.model=no/such-model", "evaluate.resources.gpus=64")
    assert "evaluate.resources: no place for evaluate 1 x 64 GPU at once, Ray has " in line
    assert not (tmp_path / "run").exists()


def test_a_local_ray_does_not_grow(tmp_path):
    line = refused(tmp_path, "engine.grows_to={CPU: 8, GPU: 8}", command="schedule")
    assert "engine.grows_to: a local Ray does not grow" in line and "engine.grows_to=null" in line


def test_a_local_ray_that_takes_too_long_to_start(tmp_path, monkeypatch):
    def late(*_, **__):
        raise Exception("The current node timed out during startup.\nThis could happen")

    monkeypatch.setattr(ray, "init", late)  # half a minute by Ray's own clock, which is fixed
    with (
        pytest.raises(RunError, match=r"^cannot start a local Ray: .*startup\. This could happen$"),
        connected(EngineConfig(cpus=1), tmp_path / "ray.log"),
    ):
        pass


def test_something_else_listens_at_the_address():
    with listener() as address, pytest.raises(ConfigError, match="no Ray answers there within"):
        look(EngineConfig(address=address))


def test_addresses_that_no_driver_can_join(monkeypatch):
    with pytest.raises(ConfigError, match="submit the run with `ray job`"):
        look(EngineConfig(address="ray://127.0.0.1:10001"))
    with pytest.raises(ConfigError, match="no driver joins a URL"):
        look(EngineConfig(address="http://127.0.0.1:8265"))

    def nowhere(*_):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", nowhere)
    with pytest.raises(ConfigError, match=r"nothing answers there .*not known"):
        look(EngineConfig(address="head.test:6379"))


@pytest.mark.parametrize("which", ["ray", "python"])
def test_another_version_than_the_clusters(tmp_path, address, which):
    """Ray compares what its head has noted with what the driver says; here the driver lies."""
    mine = ray._private.utils.compute_version_info()
    lie = ("2.41.0", mine[1]) if which == "ray" else (mine[0], "3.12.1")
    code = (
        "import sys; from pathlib import Path; import ray._private.utils as utils;"
        f"utils.compute_version_info = lambda: {lie!r};"
        "from pipeline.cli import main; sys.exit(main())"
    )
    line = refused(tmp_path, f"engine.address={address}", before=("-c", code))
    assert "Version mismatch" in line
    assert lie[0] in line
    assert lie[1] in line


def test_a_runtime_environment_that_cannot_be_built(tmp_path, monkeypatch):
    missing = {"runtime_env": {"working_dir": f"file://{tmp_path}/missing.zip"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(missing))
    # A Ray starts first, which takes long where other tests run beside this one.
    line = refused(tmp_path, "engine.cpus=1", seconds=90.0)
    assert "runtime_env: Ray cannot start a worker for this driver: " in line
    assert "missing.zip" in line


def test_a_worker_that_starts_slowly_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_NOTICE_SECONDS", 0.0)
    told = []
    with connected(EngineConfig(cpus=1), tmp_path / "ray.log", told.append):
        assert told == [
            "Ray is still starting its first worker: the runtime environment is being built"
        ]
    monkeypatch.setattr(cluster, "_WORKER_SECONDS", 0.0)
    late = connected(EngineConfig(cpus=1), tmp_path / "ray.log", told.append)
    with pytest.raises(ConfigError, match=r"cannot start a worker .*: none within 0 s; mend"), late:
        pass
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


def test_expired_credentials(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Expired)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        line = refused(tmp_path, "run=s3://bucket/run")
    finally:
        server.shutdown()
    assert "run folder 's3://bucket/run': cannot list leases: " in line
    assert "The token has expired" in line
