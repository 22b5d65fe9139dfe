"""What a run tells the person who waits: live in a terminal, plain lines elsewhere, or JSON lines
for a program that reads along (``CAPFILT_LOG_FORMAT=json``)."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TextIO

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.terminal import (
    breakdown,
    check_log_format,
    clean,
    console,
    duration,
    json_line,
    json_wanted,
    say,
    unread,
)

_SECONDS = 5.0
_QUIET, _STILL = 300.0, 3600.0
"""Seconds of silence that are worth a line: where nobody is at work, and where somebody may be."""
_BAR = 16


@dataclass
class Notices:
    """What the workers of a run have told so far, at one moment."""

    running: dict[tuple[str, str], float] = field(default_factory=dict)
    """(stage, shard) → when it began, seconds since the epoch."""
    done: dict[str, int] = field(default_factory=dict)
    """Stage → shards ended well."""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Stage → rows by status."""
    errors: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    """(stage, shard) → (class name, message) of what it raised."""
    progress: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    """Whole-round stage → (message, done, total)."""
    ended: list[tuple[str, str, dict[str, int]]] = field(default_factory=list)
    """(stage, shard, rows by status) of what has ended well since this was last taken."""


@dataclass
class _Stage:
    """One stage on the screen. Times are of the monotonic clock, in seconds."""

    name: str
    total: int
    before: int
    """Of ``total``, what was published before this run began."""
    begun: float
    done: int = 0
    """Shards ended in this run."""
    counts: dict[str, int] = field(default_factory=dict)
    """Rows of this run by status."""
    step: tuple[str, int, int] | None = None
    """Whole-round stages: message, done, total."""
    shards: bool = False
    """It tells of shards, so it may share its time with other stages."""
    first: float | None = None
    """When it first gave a sign of life; None while it waits."""
    last: float = 0.0
    """When it last ended a shard."""
    said: float = 0.0
    told: tuple[int, int] | None = None
    """The share that was said last."""

    @property
    def rate(self) -> float:
        """Rows a second since the first sign of life; 0 while unknown."""
        seconds = self.last - self.first if self.first is not None else 0.0
        return sum(self.counts.values()) / seconds if seconds > 0 else 0.0

    @property
    def share(self) -> tuple[int, int]:
        """(done, total) for the bar."""
        if self.step is not None:
            return self.step[1], self.step[2]
        return self.before + self.done, self.total


class Screen:
    """Shows the stages of a round as they go on; a ``with`` block brings the terminal back.

    `update` may be called from another thread. Texts may hold anything: they are cleaned here. A
    reader that goes away does not end the run.

    Args:
        file: where to; None is the standard output.
        live: redraw lines in place; None does so in a terminal only.
        seconds: outside a terminal, how often a stage may speak.
        run: the run folder, for JSON lines.

    Raises:
        ConfigError: CAPFILT_LOG_FORMAT is neither plain nor json.
    """

    def __init__(
        self,
        file: TextIO | None = None,
        live: bool | None = None,
        seconds: float = _SECONDS,
        run: str | None = None,
    ) -> None:
        check_log_format()
        self._file = file or sys.stdout
        self._json, self._run = json_wanted(), run
        self._round: int | None = None
        self._seconds = seconds
        self._lock = threading.RLock()
        self._stages: dict[str, _Stage] = {}
        self._told: set[tuple[str, str, str]] = set()
        self._handed_over = 0.0
        """When the last whole-round stage ended."""
        capable = self._file.isatty() and os.environ.get("TERM") != "dumb" and not self._json
        self._live = _Live(self) if (capable if live is None else live) else None
        self._signs: object = None
        self._last_sign = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def file(self) -> TextIO:
        return self._file

    def begin_round(self, round: int, title: str) -> None:
        with self._lock:
            self._stages.clear()
            self._told.clear()
            self._round = round
        self.note(f"round {round}: {title}")

    def begin(self, stage: str, total: int, done: int = 0) -> None:
        """A stage of ``total`` shards (1 where it takes the whole round), ``done`` published."""
        with self._lock:
            self._last_sign = time.monotonic()
            self._stages[stage] = _Stage(stage, total, done, self._last_sign)
            if self._live is not None:
                self._live.start()

    def update(self, notices: Notices) -> None:
        """Show what the workers have told by now."""
        now = time.monotonic()
        with self._lock:
            for stage in self._stages.values():
                _take(stage, notices, now)
            for (name, shard), (kind, message) in list(notices.errors.items()):
                self._tell(name, shard, f"{kind}: {message}")
            if self._json:
                for name, shard, counts in notices.ended:
                    line = f"  {clean(name)} shard {clean(shard)}: rows {breakdown(counts)}"
                    self._print(line, name, shard)
            if self._live is None:
                self._speak(now)
            self._break_silence(notices, now)

    def end(self, stage: str, seconds: float | None = None, line: str = "") -> None:
        """The stage is published as a whole; ``line`` says what is worth saying about it."""
        now = time.monotonic()
        with self._lock:
            ended = self._stages.pop(stage, None) or _Stage(stage, 1, 0, now)
            took = self._took(ended, now) if seconds is None else seconds
            more = f"; {clean(line)}" if line else ""
            self._print(f"  {clean(stage):<18}  {_summary(ended, took)}{more}", stage)

    def note(self, line: str) -> None:
        """One line that stays."""
        with self._lock:
            self._print(clean(line))

    def render(self) -> Table:
        """The stages that are not ended, one line each, with bars."""
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(width=20)
        table.add_column(width=_BAR)
        table.add_column(width=11, justify="right", no_wrap=True)
        table.add_column(ratio=1, no_wrap=True)
        now = time.monotonic()
        # Called under rich's lock, which `_print` takes while it holds ours: without a lock here,
        # so that the two can never wait for each other. A figure may be half a second old.
        for stage in list(self._stages.values()):
            done, total = stage.share
            bar = ProgressBar(total=max(total, 1), completed=done, width=_BAR)
            detail = Text(_detail(stage, now), no_wrap=True, overflow="ellipsis")
            table.add_row(Text(f"  {clean(stage.name)}"), bar, Text(f"{done}/{total}"), detail)
        return table

    def _tell(self, stage: str, shard: str, problem: str) -> None:
        if (stage, shard, problem) not in self._told:
            self._told.add((stage, shard, problem))
            line = f"  {clean(stage)} shard {clean(shard)}: {clean(problem, 200)}"
            self._print(line, stage, shard, "warning")

    def _speak(self, now: float) -> None:
        """Plain lines of the stages that moved and have been silent for long enough."""
        for stage in self._stages.values():
            if stage.first is None or (stage.share == stage.told and stage.step is not None):
                continue
            if now - max(stage.said, stage.first) < self._seconds:
                continue
            stage.said, stage.told = now, stage.share
            done, total = stage.share
            line = f"  {clean(stage.name):<18}  {done}/{total}  {_detail(stage, now)}"
            self._print(line, stage.name)

    def _break_silence(self, notices: Notices, now: float) -> None:
        """Say once that no worker says anything: what the autoscaler cannot start, Ray waits for
        without a word."""
        signs = dict(notices.running), dict(notices.done), dict(notices.progress)
        limit = _STILL if notices.running else _QUIET  # who was lost may still count as running
        if signs != self._signs:
            self._signs, self._last_sign = signs, now
        elif self._stages and now - self._last_sign > limit:
            self._last_sign = math.inf
            self._print(
                f"  no worker has said anything for {duration(limit)}; if Ray has no place for "
                "one, `ray status` says what it waits for",
                level="warning",
            )

    def _took(self, ended: _Stage, now: float) -> float:
        """Seconds that the stage was at work, as far as its signs tell."""
        if ended.shards:
            return ended.last - (ended.first or ended.last)
        # Stages that are begun together follow each other: the next one's first sign ends this.
        following = [s.first for s in self._stages.values() if s.first is not None]
        start, self._handed_over = max(ended.begun, self._handed_over), min([now, *following])
        return max(0.0, self._handed_over - start)

    def _print(
        self, line: str, stage: str | None = None, shard: str | None = None, level: str = "info"
    ) -> None:
        """``line`` as it is; its parts must be clean already. The rest is for JSON lines."""
        if self._json:
            where = {"run": self._run, "round": self._round, "stage": stage, "shard": shard}
            say(json_line(line, level, **where), self._file)
            return
        if self._live is not None:
            with unread(self._file):
                self._live.print(line)
            return
        moment = time.strftime("%Y-%m-%d %H:%M:%S")
        say(f"{moment} {line}", self._file)


class _Live:
    """rich's live region at the foot of a terminal; lines that stay scroll by above it."""

    def __init__(self, screen: Screen) -> None:
        self._console = console(screen.file)
        self._live = Live(
            get_renderable=screen.render,
            console=self._console,
            transient=True,
            refresh_per_second=4,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def start(self) -> None:
        if not self._live.is_started:
            self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def print(self, line: str) -> None:
        self._console.print(Text(line))


def _take(stage: _Stage, notices: Notices, now: float) -> None:
    """Bring one stage up to what the notices say."""
    done = notices.done.get(stage.name, 0)
    runs = done > 0 or any(name == stage.name for name, _ in list(notices.running))
    stage.shards = stage.shards or runs
    if stage.name in notices.progress:
        stage.step = notices.progress[stage.name]
    if stage.first is None and (runs or stage.step is not None):
        stage.first = now
    if done != stage.done:
        stage.done, stage.last = done, now
    stage.counts = dict(notices.counts.get(stage.name, {}))


def _detail(stage: _Stage, now: float) -> str:
    """What stands behind the bar."""
    if stage.first is None:
        return "published" if stage.before >= stage.total else "waits"
    return "  ".join(_details(stage, now))


def _details(stage: _Stage, now: float) -> Iterator[str]:
    assert stage.first is not None
    elapsed = now - stage.first
    if stage.step is not None:
        yield clean(stage.step[0], 32)
    if stage.shards:
        yield f"{sum(stage.counts.values()):,} rows"
    if stage.rate:
        yield f"{stage.rate:,.1f} rows/s"
    done, total = stage.share
    fresh = done - stage.before if stage.shards else done
    yield duration(elapsed)
    if fresh > 0 and done < total and elapsed > 2:
        yield f"{duration(elapsed / fresh * (total - done))} left"


def _summary(stage: _Stage, seconds: float) -> str:
    """What is said of a stage at its end."""
    if stage.before >= stage.total:
        return "already published"
    parts = []
    if stage.total != 1:
        earlier = f" ({stage.before} of them earlier)" if stage.before else ""
        parts.append(f"{stage.total} shards{earlier}")
    if stage.counts:
        parts.append(f"rows {breakdown(stage.counts)}")
    parts.append(duration(seconds))
    return "; ".join(parts)
