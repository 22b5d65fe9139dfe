"""Which code runs: the distribution's version and a hash of the source itself.

A job's upload is neither a git checkout nor an installed package, so neither can say it.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("pipeline", "stages")


@cache
def code_version() -> str:
    """``0.1.0+1f2e3d4c5b6a``: the installed version, 0 where there is none, and 48 bits over path
    and content of every Python file of both packages, as 12 hex digits."""
    try:
        installed = version("capfilt")
    except PackageNotFoundError:
        installed = "0"
    root = Path(__file__).parents[1]
    state = hashlib.sha256()
    for package in _PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            state.update(file.relative_to(root).as_posix().encode() + b"\0")
            state.update(hashlib.sha256(file.read_bytes()).digest())
    return f"{installed}+{state.hexdigest()[:12]}"
