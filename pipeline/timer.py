"""``capfilt schedule --every``: firings by the clock, for machines without cron or systemd."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from pipeline.lease import Terminated, terminable

_LONGEST_SLEEP = 60.0
"""Seconds; a clock that is set anew is noticed after so long."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(text: str) -> int:
    """``90s``, ``30m``, ``6h`` or ``1d`` in seconds.

    Raises:
        ValueError: it is nothing of the kind.
    """
    found = re.fullmatch(r"([1-9][0-9]*)([smhd])", text)
    if found is None:
        raise ValueError(text)
    return int(found[1]) * _UNITS[found[2]]


def repeat(every: int, arguments: Sequence[str]) -> int:
    """Fire now, and then whenever the UTC time is a multiple of ``every`` seconds.

    Each firing is a process of its own, ``capfilt schedule`` with ``arguments``: it reads the
    config anew, and whatever becomes of it, the next one comes. Ends by a signal only, which a
    firing that is under way gets as well, or where the very first finds bad input.

    Returns:
        The exit code of that first firing, 2.
    """
    first = True
    with terminable():
        while True:
            fired = time.time()
            code = _fire_apart(arguments)
            if first and code == 2:
                return code
            first = False
            _sleep_until(next_firing(fired, every))


def next_firing(fired: float, every: int) -> float:
    """When to fire after a firing that began at ``fired``, seconds since the epoch. It lies in the
    past, however far, if firings were missed meanwhile: they are caught up by one."""
    return (fired // every + 1) * every


def _fire_apart(arguments: Sequence[str]) -> int:
    # In a session of its own, so that a terminal's Ctrl-C reaches it once, from here.
    command = [sys.executable, "-m", "pipeline", "schedule", *arguments]
    child = subprocess.Popen(command, start_new_session=True)
    try:
        return child.wait()
    except KeyboardInterrupt as error:
        child.send_signal(signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
        child.wait()
        raise


def _sleep_until(moment: float) -> None:
    while (left := moment - time.time()) > 0:
        time.sleep(min(left, _LONGEST_SLEEP))
