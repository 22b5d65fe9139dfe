"""SIGKILL in the middle of stages, run again: the same final dataset as an unbroken run."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.runfolder import open_run, read_rounds
from pipeline.verify import verify

ROOT = Path(__file__).parents[2]
OVERRIDES = ("world.web_rows=80", "world.faults.slow=0", "world.faults.hostile=4")

KILLED_IN = {
    # Stage → what the run folder shows once the stage is under way; in the order of a run.
    "download": "records/run/stage=download/*.json",
    "pretrain": "scratch/checkpoints/pretrain-*/last.json",
    "caption": "records/round=01/stage=caption/*.json",
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


def orphans(run: Path, names: Iterable[str]) -> set[str]:
    """Files in the folders of the work that those records publish which no record names: written
    by an attempt that was killed, or by doing again what was done."""
    store = open_run(str(run))
    records = store.read_records(store.record_names())
    published = {payload.path for record in records for payload in record.payloads}
    folders = {
        folder_of(payload.path, record.shard)
        for record in store.read_records(names)
        for payload in record.payloads
    }
    written = {path for path in store.files() if path.endswith((".parquet", ".tar", "tensors"))}
    return {
        path
        for path in written - published
        if {folder_of(path, "000000"), folder_of(path, "all")} & folders
    }


def folder_of(path: str, shard: str) -> str:
    """What all attempts at a piece of work share: a whole round's makes a folder each."""
    return "/".join(path.split("/")[:2]) if shard == "all" else path.rpartition("/")[0]


@pytest.mark.timeout(900)
def test_a_run_that_is_killed_again_and_again_ends_like_an_unbroken_one(tmp_path):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    kill_when(unbroken, "records/round=01/stage=assemble/*.json")  # unbroken as far as it matters
    done: list[tuple[set[str], set[str]]] = []
    for pattern in KILLED_IN.values():
        kill_when(killed, pattern)
        names = set(open_run(str(killed)).record_names())
        done.append((names, orphans(killed, names)))
    finish(killed)
    # Nothing that was published when the run was killed has been worked on again.
    for names, before in done:
        assert orphans(killed, names) == before
    assert final_dataset(killed) == final_dataset(unbroken)
    assert verify(open_run(str(killed))).problems == []
