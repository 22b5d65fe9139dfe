"""The quickstart over several seeds: what it takes, and what it makes of its web.

    python -m tests.bench.quickstart [--seeds 0 1 2] [--json FILE]

Ours is the model of the last round, trained on the bootstrapped pairs; the alternative is the
model of round 0: same architecture, steps and human pairs, trained on the raw pairs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline.runfolder import open_run
from pipeline.status import read_status
from tests.bench.memory import Peak

Metrics = dict[tuple[int, str, str, str], float]
"""(round, split, model, metric) → value."""

FACTS = (
    "wrong_before",
    "wrong_after",
    "wrong_after_web",
    "wrong_after_synthetic",
    "filter_precision",
    "filter_recall",
    "synthetic_right_before",
    "synthetic_right_after",
    "duplicate_recall",
)


def run(seed: int, folder: Path, config: str) -> tuple[float, int]:
    """Run once. Returns (seconds, peak bytes of memory)."""
    command = [sys.executable, "-m", "pipeline", "run", config, f"run={folder}", f"seed={seed}"]
    started = time.monotonic()
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process,
        Peak(process.pid) as peak,
    ):
        output = process.communicate()[0].decode()
    if process.returncode != 0:
        sys.exit(f"seed {seed} failed:\n{output[-3000:]}")
    return time.monotonic() - started, peak.bytes


def read(folder: Path) -> Metrics:
    """Every metric of every round of a finished run."""
    status = read_status(open_run(str(folder)))
    return {
        (round_.number, *key): value
        for round_ in status.rounds
        for key, value in round_.metrics.items()
    }


def rows(seconds: list[float], peaks: list[int], found: list[Metrics]) -> list[dict[str, object]]:
    """One row a metric: mean and spread over the seeds, and the ratio where there is another."""
    last = max(number for number, *_ in found[0])
    made: list[dict[str, object]] = [
        _row("wall time", seconds, "s"),
        _row("peak memory", [peak / 2**30 for peak in peaks], "GiB"),
    ]
    for metric in ("tr_at_1", "ir_at_1"):
        ours = [m[last, "test", "med", metric] for m in found]
        raw = [m[0, "test", "med", metric] for m in found]
        made.append(_row(f"test {metric}, raw pairs", raw, "share"))
        made.append({**_row(f"test {metric}, bootstrapped", ours, "share"), **_against(ours, raw)})
    for number in range(1, last + 1):
        for fact in FACTS:
            # A fact about nothing, such as kept synthetic texts where there are none, is no figure.
            values = [m.get((number, "truth", "data", fact), math.nan) for m in found]
            made.append(_row(f"round {number} {fact}", values, "share"))
    return made


def _row(metric: str, values: list[float], unit: str) -> dict[str, object]:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"metric": metric, "value": statistics.fmean(values), "spread": spread, "unit": unit,
            "values": values, "against": None, "ratio": None}  # fmt: skip


def _against(ours: list[float], raw: list[float]) -> dict[str, object]:
    base = statistics.fmean(raw)
    return {"against": "raw pairs", "ratio": statistics.fmean(ours) / base if base else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seconds, peaks, found = [], [], []
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            took, peak = run(seed, Path(scratch) / "run", options.config)
            found.append(read(Path(scratch) / "run"))
        seconds.append(took)
        peaks.append(peak)
    table = rows(seconds, peaks, found)
    for row in table:
        each = ", ".join(f"{value:.3g}" for value in row["values"])  # type: ignore[attr-defined]
        print(
            f"{row['metric']:<34} {row['value']:8.3f} ± {row['spread']:.3f} {row['unit']}  ({each})"
        )
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
