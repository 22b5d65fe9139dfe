"""What the workers of a run know of hosts together: who may send how many requests to each, which
hosts fail, and which asked to be left alone.

A worker asks for all hosts of its shard when it begins, and again about those where something has
changed. What it was granted it uses without asking, so a request costs no message.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

SILENCE = 15.0
"""Seconds after which a worker that says nothing is taken for dead, and what it held is free."""

_FAILING = 100_000
"""Hosts that have failed, but not often enough to be set aside, of which this is remembered."""


class Claim(NamedTuple):
    """What a worker says of one host, and what it has seen since it last did."""

    running: int = 0
    """Requests that it has under way there."""
    left: int = 0
    """URLs of its shard that are not done, those under way among them."""
    useful: bool = False
    """Whether an answer of any use came …"""
    failures: int = 0
    """… and how many failures since then."""
    last: tuple[str, str] | None = None
    """Status and detail of the last failure."""
    pause: float = 0.0
    """Seconds for which the host asks to be left alone."""


class Word(NamedTuple):
    """What a worker is told of one host."""

    connections: int = 0
    """Requests that it may have under way there."""
    failures: int = 0
    """In a row, seen by all workers."""
    last: tuple[str, str] | None = None
    pause: float = 0.0
    """Seconds to leave the host alone."""


Ask: TypeAlias = Callable[[str, Mapping[str, Claim], bool], Mapping[str, Word]]
"""(worker, its claims by host, whether it holds nothing else) → a word about each of these hosts.
"""


@dataclass
class _Host:
    claims: dict[str, int] = field(default_factory=dict)
    """Worker → connections it holds, 0 where it waits."""
    failures: int = 0
    last: tuple[str, str] | None = None
    not_before: float = 0.0


class HostBook:
    """An `Ask`: grants each host's ``connections`` and counts its failures, up to the ``failures``
    that set it aside, for as long as the book lives."""

    def __init__(self, connections: int, failures: int) -> None:
        self._connections, self._failures = connections, failures
        self._hosts: dict[str, _Host] = {}  # that are claimed
        self._failing: OrderedDict[str, _Host] = OrderedDict()  # nobody claims them now
        self._aside: dict[str, _Host] = {}
        self._heard: dict[str, float] = {}

    def __call__(
        self, worker: str, claims: Mapping[str, Claim], begins: bool = False
    ) -> Mapping[str, Word]:
        """``begins``: what the worker held before is void, as it died and was started again."""
        now = time.monotonic()
        silent = [name for name, heard in self._heard.items() if now - heard > SILENCE]
        for gone in [worker, *silent] if begins else silent:
            self._free(gone, now)
        self._heard[worker] = now
        return {name: self._word(worker, name, claim, now) for name, claim in claims.items()}

    def _word(self, worker: str, name: str, claim: Claim, now: float) -> Word:
        host = self._find(name)
        host.failures = claim.failures + (0 if claim.useful else host.failures)
        host.last = claim.last or host.last
        host.not_before = max(host.not_before, now + claim.pause)
        granted = self._grant(host, worker, claim)
        self._keep(name, host, now)
        return Word(granted, host.failures, host.last, max(0.0, host.not_before - now))

    def _grant(self, host: _Host, worker: str, claim: Claim) -> int:
        """An even share, at least one, of what others leave. What is under way beyond it stays the
        worker's until it says that it has ended."""
        if not claim.left:
            host.claims.pop(worker, None)
            return 0
        host.claims[worker] = 0
        share = max(1, self._connections // len(host.claims))
        free = max(0, self._connections - sum(host.claims.values()))
        granted = min(claim.left, share, free)
        host.claims[worker] = max(claim.running, granted)
        return granted

    def _find(self, name: str) -> _Host:
        """Taken out of what nobody claims."""
        return (
            self._hosts.get(name)
            or self._aside.get(name)
            or self._failing.pop(name, None)
            or _Host()
        )

    def _keep(self, name: str, host: _Host, now: float) -> None:
        self._hosts.pop(name, None)
        if host.claims:
            self._hosts[name] = host
        elif host.failures >= self._failures:
            self._aside[name] = host
        elif host.failures or host.not_before > now:
            self._failing[name] = host
            if len(self._failing) > _FAILING:
                self._failing.popitem(last=False)

    def _free(self, worker: str, now: float) -> None:
        if self._heard.pop(worker, None) is None:
            return
        for name, host in list(self._hosts.items()):
            if host.claims.pop(worker, None) is not None:
                self._keep(name, host, now)
