"""The benchmark of a pretraining step runs, and both sides compute the same losses."""

import json
import subprocess
import sys
from pathlib import Path


def test_it_measures_both_sides(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    options = ["--size", "tiny", "--batch", "4", "--rounds", "2", "--threads", "1"]
    command = [sys.executable, "-m", "tests.bench.pretrain", *options, "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["metric"]: row for row in json.loads(file.read_text())}
    assert rows.keys() == {"images/s", "peak memory", "rate of the step"}
    assert all(row["value"] > 0 and row["ratio"] > 0 for row in rows.values())
