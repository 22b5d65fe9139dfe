"""The stages run where Ray is not installed."""

import pkgutil
import subprocess
import sys

import stages

_IMPORT_ALL = """
import importlib, sys
sys.modules["ray"] = None  # any `import ray` now fails
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_no_module_of_stages_needs_ray() -> None:
    names = [module.name for module in pkgutil.walk_packages(stages.__path__, "stages.")]
    assert "stages.training.loop" in names and "stages.models.med" in names
    command = [sys.executable, "-c", _IMPORT_ALL, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
