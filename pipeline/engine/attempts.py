"""Tasks that are submitted again where Ray lost them, and not for ever."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

ATTEMPTS = 3
"""How often a task is submitted whose process, node or output is lost again and again."""


def gathered(submits: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the tasks return, in order. Each of ``submits`` starts one, whose ``max_retries`` is 0:
    Ray's own retries have no bound where it was a node's memory that ran out.

    Raises:
        RayTaskError: what a task raised; that is not tried again.
        RayError: the process, the node or the output of one was lost `ATTEMPTS` times.
    """
    results: list[Any] = [None] * len(submits)
    running = {submit(): (index, 1) for index, submit in enumerate(submits)}
    while running:
        (ended,), _ = ray.wait(list(running), num_returns=1)
        index, attempt = running.pop(ended)
        try:
            results[index] = ray.get(ended)
        except RayTaskError:
            raise
        except RayError:
            if attempt >= ATTEMPTS:
                raise
            running[submits[index]()] = index, attempt + 1
    return results
