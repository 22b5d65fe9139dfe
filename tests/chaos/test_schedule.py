"""Firings of a schedule, end to end: too little data, enough, ended by SIGTERM, gone on, done."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.lease import current
from pipeline.runfolder import open_run, read_rounds
from pipeline.store import Store
from pipeline.verify import verify

ROOT = Path(__file__).parents[2]
SMALL = ("world.web_rows=80", "world.faults.slow=0", "world.faults.hostile=4")


def command(what: str, run: Path, *more: str) -> list[str]:
    config = ["configs/tiny.yaml", f"run={run}", *SMALL]
    return [sys.executable, "-m", "pipeline", what, *config, *more]


def capfilt(what: str, run: Path, *more: str) -> str:
    done = subprocess.run(
        command(what, run, *more), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def stopped_at_work(run: Path) -> int:
    """A firing that gets SIGTERM, the driver alone, once it is at work. Its exit code."""
    process = subprocess.Popen(
        command("schedule", run), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        while not list(run.glob("records/**/stage=download/*.json")):
            assert process.poll() is None, process.communicate()[0].decode()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        said = process.communicate()[0].decode()
        assert said.splitlines()[-1].startswith("capfilt: interrupted"), said
    finally:
        process.kill()
    return process.returncode


@pytest.mark.timeout(600)
def test_firings(tmp_path: Path) -> None:
    run = tmp_path / "run"
    few = "schedule.min_new_rows=1000"
    assert "no round: 128 new rows, schedule.min_new_rows is 1000" in capfilt("schedule", run, few)
    store = Store(str(run))
    assert not (run / "run.json").exists() and not (run / "round=00").exists()
    assert len(list(run.glob("records/run/stage=sources/*.json"))) == 3

    assert stopped_at_work(run) == 143
    lease = current(store)
    assert lease is not None and lease.token == 2 and lease.released

    # What was begun is ended, with however few rows new.
    said = capfilt("schedule", run, few)
    assert "round 0 was begun before" in said and "round 1: bootstrapping" in said
    assert [round_.number for round_ in read_rounds(open_run(str(run)))] == [0, 1]
    assert verify(store).problems == []
    tokens = {record.token for record in store.read_records(store.record_names())}
    assert tokens == {1, 2, 3}

    # Nothing is new, and nothing is done.
    before = store.record_names()
    assert "no round: 0 new rows" in capfilt("schedule", run)
    assert store.record_names() == before
    files = set(store.files())

    # Another threshold selects anew and trains anew, and labels nothing.
    said = capfilt("run", run, "--dry-run", "select.threshold=0.9")
    (line,) = [line for line in said.splitlines() if "round 1: " in line]
    assert line.partition("to do: ")[2].split(", ")[0] == "select"
    assert "round 0: nothing to do" in said
    assert "round 1: nothing to do" in capfilt("run", run, "--dry-run")
    assert "round 2: to do: " in capfilt("run", run, "--dry-run", "--rounds", "2")
    assert set(store.files()) == files

    # A second file arrives, and the next firing goes to the next round with its rows.
    more = tmp_path / "more.parquet"
    pq.write_table(pq.read_table(run / "world/web.parquet").slice(0, 24), more)
    downloads = set(run.glob("records/run/stage=download/*.json"))
    said = capfilt(
        "schedule", run, f'sources=[{{path: "{{world}}/web.parquet"}}, {{path: {more}}}]'
    )
    assert "24 new rows" in said and "round 2: bootstrapping" in said
    *_, earlier, last = read_rounds(open_run(str(run)))
    new = last.shards.keys() - earlier.shards.keys()
    assert last.number == 2 and earlier.shards.items() <= last.shards.items()
    fetched = set(run.glob("records/run/stage=download/*.json")) - downloads
    assert {path.name.partition("-")[0] for path in fetched} == new
    (source,) = store.read_records(last.shards[shard][1] for shard in new)
    assert source.counts == {"rows": 24}
    assert verify(store).problems == []
