"""What records say of the code."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pipeline
from pipeline.version import code_version

ROOT = Path(pipeline.__file__).parents[1]


def of_copy(folder: Path) -> str:
    """What a copy without git, as a job's workers have it, says of itself."""
    command = [sys.executable, "-m", "pipeline", "--version"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_copy_without_git_names_the_same_code_and_a_change_another(tmp_path):
    for package in ("pipeline", "stages"):
        shutil.copytree(ROOT / package, tmp_path / package)
    assert re.fullmatch(r"[\w.]+\+[0-9a-f]{12}", code_version())
    assert of_copy(tmp_path) == code_version()
    with (tmp_path / "stages/base.py").open("a") as file:
        file.write("# changed\n")
    assert of_copy(tmp_path) != code_version()
