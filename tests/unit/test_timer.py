"""Firings by the clock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.lease import held
from pipeline.store import Store
from pipeline.timer import next_firing, seconds

ROOT = Path(__file__).parents[2]
HOUR = 3600
SMALL = ("world.web_rows=80", "world.human_images=8", "world.dev_images=8", "world.test_images=8")


@pytest.mark.parametrize(
    ("text", "found"), [("90s", 90), ("30m", 1800), ("6h", 6 * HOUR), ("1d", 24 * HOUR)]
)
def test_times(text: str, found: int) -> None:
    assert seconds(text) == found


@pytest.mark.parametrize("text", ["", "0h", "h", "6", "1.5h", "-1h", "6 h", "6H", "６h"])
def test_no_times(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{text}$"):
        seconds(text)


def test_firings_lie_on_a_grid() -> None:
    noon = 12 * HOUR
    assert next_firing(noon, HOUR) == noon + HOUR
    assert next_firing(noon + 1, HOUR) == noon + HOUR
    assert next_firing(noon + HOUR - 1, HOUR) == noon + HOUR


def test_missed_firings_are_caught_up_once() -> None:
    """A round took from noon to half past three: one firing at once, then the next at four."""
    noon, now = 12 * HOUR, 15.5 * HOUR
    assert next_firing(noon, HOUR) < now
    assert next_firing(now, HOUR) == 16 * HOUR


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "schedule", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_first_bad_input_ends_it() -> None:
    process = start("none.yaml", "--every", "1s")
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 2 and said.startswith("capfilt: none.yaml: cannot be read")


def test_it_stays_until_the_first_file_comes(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    overrides = (f"run={tmp_path}/run", f"sources.0.path={tmp_path}/in/*.csv")
    process = start("configs/tiny.yaml", *overrides, *SMALL, "--every", "1d")
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(2)]
    assert "sources.0.path: no file there yet" in said[0]
    assert "no round: 0 new rows" in said[1]
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 143


def test_it_ends_when_asked_to(tmp_path: Path) -> None:
    """Another driver is at work, so every firing is skipped, and the next one comes."""
    run = tmp_path / "run"
    with held(Store(str(run)), print):
        process = start("configs/tiny.yaml", f"run={run}", "--every", "1d")
        assert process.stderr is not None
        said = process.stderr.readline()
        assert said.startswith("capfilt: skipped: ") and f"held by process {os.getpid()}" in said
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=300)[1]
    assert process.returncode == 143 and said.startswith("capfilt: interrupted")
