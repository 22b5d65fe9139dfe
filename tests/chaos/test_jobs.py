"""The run of README's "On a cluster": submitted with `ray job` to a head with its job server, on a
cluster of two more nodes with a fake GPU each; stopped, submitted again, finished."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus, JobSubmissionClient

from pipeline.lease import current
from pipeline.runfolder import open_run, read_rounds
from pipeline.verify import verify
from pipeline.version import code_version
from tests.integration.test_resume import orphans

ROOT = Path(__file__).parents[2]
GPU = "{cpus: 0.5, gpus: 0.5, memory_gb: 0.1, max_replicas: 2}"
OVERRIDES = (
    "world.web_rows=80",
    "world.faults.slow=0",
    "rounds.count=1",
    *(f"{stage}.resources={GPU}" for stage in ("caption", "filter", "embed")),
    *(f"{stage}.device=cpu" for stage in ("caption", "filter", "embed")),
    "engine.cpus=null",
)


def until_jobs_are_taken(jobs: JobSubmissionClient) -> None:
    """The dashboard answers before the agents are there that start jobs."""
    while True:
        try:
            jobs.submit_job(entrypoint="true", submission_id="ready")
            return
        except RuntimeError as error:
            assert "No available agent" in str(error)
            time.sleep(0.5)


@pytest.fixture(scope="module")
def dashboard():
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": 0,
        },
    )
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, num_gpus=1)
        address = f"http://{cluster.webui_url}"
        until_jobs_are_taken(JobSubmissionClient(address))
        yield address
    finally:
        cluster.shutdown()


def command_of_the_readme(address: str, *arguments: str) -> list[str]:
    """What the README tells people to type, with our config and address in place of theirs."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    told = re.search(r"ray job submit (.*) -- python -m pipeline run configs/cluster\.yaml", text)
    assert told is not None
    words = told[1].split()
    assert words[:4] == ["--address", "http://HEAD:8265", "--working-dir", "."]
    assert " ".join(words[4:]) == '--runtime-env-json "$(cat infra/runtime-env.json)"'
    environment = (ROOT / "infra/runtime-env.json").read_text(encoding="utf-8")
    return [
        *[sys.executable, "-m", "ray.scripts.scripts", "job", "submit"],
        *["--address", address, "--working-dir", ".", "--runtime-env-json", environment],
        *arguments,
    ]


def submit(address: str, run: Path, *options: str, config: str = "configs/tiny.yaml"):
    entrypoint = [sys.executable, "-m", "pipeline", "run", config, f"run={run}", *OVERRIDES]
    return subprocess.run(
        [*command_of_the_readme(address, *options), "--", *entrypoint],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(600)
def test_a_job_is_stopped_and_submitted_again(dashboard, tmp_path):
    jobs = JobSubmissionClient(dashboard)
    done = submit(dashboard, tmp_path, "--no-wait", "--submission-id", "first")
    assert done.returncode == 0, done.stderr
    while not list(tmp_path.glob("records/run/stage=download/*.json")):
        assert not jobs.get_job_status("first").is_terminal(), jobs.get_job_logs("first")
        time.sleep(0.2)
    jobs.stop_job("first")
    while not jobs.get_job_status("first").is_terminal():
        time.sleep(0.2)
    assert jobs.get_job_status("first") == JobStatus.STOPPED
    assert current(open_run(str(tmp_path))).released
    before = open_run(str(tmp_path)).record_names()
    left = orphans(tmp_path, before)

    done = submit(dashboard, tmp_path, "--submission-id", "second")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert jobs.get_job_status("second") == JobStatus.SUCCEEDED
    assert "round 1" in done.stdout.lower()  # what the run says comes back

    store = open_run(str(tmp_path))
    assert orphans(tmp_path, before) == left  # nothing that was published has been done again
    assert verify(store).problems == []
    assert [found.number for found in read_rounds(store)] == [0, 1]
    # The uploaded copy is no git checkout, and says the same of itself as this one.
    versions = {record.code_version for record in store.read_records(store.record_names())}
    assert versions == {code_version()}


def test_a_job_that_fails_says_so(dashboard, tmp_path):
    done = submit(dashboard, tmp_path, "--submission-id", "bad", config="configs/missing.yaml")
    assert done.returncode == 1
    assert "capfilt: configs/missing.yaml: cannot be read" in done.stdout + done.stderr
    info = JobSubmissionClient(dashboard).get_job_info("bad")
    assert (info.status, info.driver_exit_code) == (JobStatus.FAILED, 2)


def test_only_what_is_needed_is_uploaded(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    environment = json.loads((ROOT / "infra/runtime-env.json").read_text(encoding="utf-8"))
    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True, excludes=environment["excludes"])
    import zipfile

    with zipfile.ZipFile(package) as uploaded:
        parts = {name.partition("/")[0] for name in uploaded.namelist()}
    assert {"pipeline", "stages", "configs"} <= parts
    assert parts.isdisjoint({"tests", "runs", "data", ".git", ".venv", "infra"})
    assert package.stat().st_size < 2 << 20
