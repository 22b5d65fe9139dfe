"""SIGKILL in the middle of a stage, run again: the same final dataset as an unbroken run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.runfolder import open_run, read_rounds
from pipeline.verify import verify

ROOT = Path(__file__).parents[2]
OVERRIDES = ("world.web_rows=80", "world.faults.slow=0", "world.faults.hostile=4")

KILLED_IN = {
    # Stage → what the run folder shows once the stage is under way.
    "download": "records/run/stage=sources/*.json",
    "caption": "records/round=01/stage=caption/*.json",
    "pretrain": "scratch/checkpoints/pretrain-*/last.json",
}


def start(run: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "pipeline", "run", "configs/tiny.yaml", f"run={run}"]
    return subprocess.Popen(
        [*command, *OVERRIDES],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(run: Path) -> None:
    process = start(run)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()[-2000:]


def kill_when(run: Path, pattern: str) -> None:
    """Kill the driver and all that it started, as a machine that loses power would."""
    process = start(run)
    deadline = time.time() + 240
    try:
        while not list(run.glob(pattern)):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.time() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def final_dataset(run: Path) -> dict[str, object]:
    """What the last round trains on: its index and the bytes of its tars, under any attempt."""
    store = open_run(str(run))
    record = store.read_record(read_rounds(store)[-1].records["assemble"][0])
    files = {payload.path.rpartition("/")[2]: payload for payload in record.payloads}
    index = pq.read_table(store.path(files.pop("index.parquet").path)).to_pylist()
    return {"index": index, **{name: payload.sha256 for name, payload in files.items()}}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[str, object]:
    run = tmp_path_factory.mktemp("unbroken")
    finish(run)
    return final_dataset(run)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", KILLED_IN)
def test_a_killed_run_ends_like_an_unbroken_one(tmp_path, unbroken, stage):
    kill_when(tmp_path, KILLED_IN[stage])
    records = (
        set(open_run(str(tmp_path)).record_names()) if (tmp_path / "run.json").exists() else set()
    )
    finish(tmp_path)
    store = open_run(str(tmp_path))
    assert final_dataset(tmp_path) == unbroken
    # No committed work was redone: every record of before the kill still stands.
    assert records <= store.record_names()
    assert verify(store).problems == []
