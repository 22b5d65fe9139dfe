"""What every worker imports: without torch, so that hundreds of them start soon and stay small."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "faiss", "img2dataset", "scipy")


@pytest.mark.parametrize(
    "module",
    ["pipeline.config", "pipeline.dag", "pipeline.engine.board", "pipeline.engine.data"],
)
def test_what_is_heavy_is_imported_by_those_who_need_it(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
