"""`make install` says at once that a Python will not do, before pip tries."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def make(folder: Path, python: Path | str) -> subprocess.CompletedProcess[str]:
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    command = ["make", "--no-print-directory", f"PYTHON={python}", "test"]
    # Of the make that may run these tests, nothing.
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def pretending(folder: Path, version: tuple[int, int]) -> Path:
    """An interpreter that says it is of ``version``, and goes no further than that."""
    path = folder / "python"
    path.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] || {{ echo "Python {version[0]}.{version[1]}.7"; exit 9; }}\n'
        f'exec "{sys.executable}" -c "import sys; sys.version_info = {version}; $2"\n'
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("version", [(3, 10), (3, 13)])
def test_another_python_is_refused(tmp_path: Path, version: tuple[int, int]) -> None:
    python = pretending(tmp_path, version)
    done = make(tmp_path, python)
    told = done.stderr.splitlines()[0]
    assert told.startswith(
        f"{python}: Python {version[0]}.{version[1]}.7; capfilt needs Python 3.11"
    )
    assert told.endswith("make PYTHON=python3.12 test")
    assert "-m venv" not in done.stdout


def test_a_python_that_is_not_there(tmp_path: Path) -> None:
    done = make(tmp_path, "no-such-python")
    assert "not found; capfilt needs Python 3.11 or 3.12" in done.stderr


@pytest.mark.parametrize("version", [(3, 11), (3, 12)])
def test_the_pythons_of_the_lock_go_on(tmp_path: Path, version: tuple[int, int]) -> None:
    assert "-m venv .venv" in make(tmp_path, pretending(tmp_path, version)).stdout
