"""Peak memory of a process and all that it started: PSS of the tree plus /dev/shm."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Self

_PAGE_KB = 1024


def tree_memory(root: int) -> int:
    """Bytes that the processes below ``root``, it included, hold now. Shared pages count once."""
    return sum(map(_pss, tree(root)))


def tree(root: int) -> list[int]:
    """Process ids below ``root``, it included, as of now."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended while we looked
        children.setdefault(int(after_name[1]), []).append(int(stat.parent.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def shared_memory() -> int:
    """Bytes in /dev/shm, where Ray keeps its objects."""
    return sum(f.stat().st_blocks * 512 for f in Path("/dev/shm").rglob("*") if f.is_file())


def _pss(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    sizes = {line.partition(":")[0]: line.split() for line in lines[1:]}
    # Objects of /dev/shm are counted by `shared_memory`.
    shmem = int(sizes["Pss_Shmem"][1]) if "Pss_Shmem" in sizes else 0
    return (int(sizes["Pss"][1]) - shmem) * _PAGE_KB


class Peak:
    """Samples `tree_memory` and `shared_memory` once a second; ``bytes`` is the largest sum."""

    def __init__(self, pid: int) -> None:
        self._pid, self.bytes = pid, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        before = shared_memory()
        while not self._stop.wait(1.0):
            now = tree_memory(self._pid) + max(0, shared_memory() - before)
            self.bytes = max(self.bytes, now)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
