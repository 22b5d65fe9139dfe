"""Text on a terminal: web text made harmless, numbers made readable, at most 100 columns."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import NoReturn, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from stages.errors import ConfigError

COLUMNS = 100
_LOG_FORMAT = "CAPFILT_LOG_FORMAT"


def clean(text: object, limit: int | None = None) -> str:
    """``text`` in one line without control characters, at most ``limit`` characters long.

    Captions and addresses come from the web: an escape sequence among them could rewrite the
    screen, and a bidirectional override could reorder what is read. Both become ``�``.
    """
    whole = str(text)
    # A long text is cut first, so that a row of megabytes costs no more than a short one.
    start = whole if limit is None else whole[: 4 * limit + 100]
    shown = "".join(map(_harmless, start))
    shown = " ".join(shown.split())
    if limit is not None and (len(shown) > limit or len(start) < len(whole)):
        return shown[: max(0, limit - 1)] + "…"
    return shown


def _harmless(character: str) -> str:
    if character.isprintable():
        return character
    if character == "\u200d":  # joins emoji; harmless, but not every terminal knows it
        return ""
    return " " if character.isspace() else "�"


def json_wanted() -> bool:
    """Whether what a run tells shall be JSON, a line each, instead of words for a person."""
    return os.environ.get(_LOG_FORMAT) == "json"


def check_log_format() -> None:
    """Raise `ConfigError` where CAPFILT_LOG_FORMAT holds anything unknown."""
    given = os.environ.get(_LOG_FORMAT, "plain")
    if given not in ("plain", "json"):
        raise ConfigError(f"{_LOG_FORMAT}: {given!r} is not allowed: plain or json")


def json_line(message: str, level: str, **where: str | int | None) -> str:
    """One log line as a JSON object: time (UTC, ISO 8601), level, what of ``where`` is known, and
    the message, cleaned."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    known = {key: value for key, value in where.items() if value is not None}
    return json.dumps({"time": now, "level": level, **known, "message": clean(message)})


def duration(seconds: float) -> str:
    """``0.4 s``, ``41 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: int) -> str:
    """A number of bytes in decimal units: ``512 B``, ``3.4 MB``."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def breakdown(counts: dict[str, int]) -> str:
    """``2,400: 1,790 success, 610 timeout``, the most frequent first."""
    if not counts:
        return ""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts = ", ".join(f"{count:,} {clean(name, 40)}" for name, count in ordered)
    return f"{sum(counts.values()):,}: {parts}"


@contextmanager
def unread(file: TextIO) -> Iterator[None]:
    """Inside, it is no error if the reader of ``file``, `head` for one, has seen enough. What is
    left to write then goes nowhere, also what Python itself would write when the program ends."""
    try:
        yield
    except BrokenPipeError:
        with suppress(OSError):  # a file that is only in memory
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, file.fileno())
            os.close(nowhere)


def say(line: str, file: TextIO) -> None:
    """One line, at once; whether anybody still reads it does not matter."""
    with unread(file):
        print(line, file=file, flush=True)


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        """rich ends the program with exit code 1; what a broken pipe means, `unread` says."""
        raise BrokenPipeError


def console(file: TextIO) -> Console:
    """A console of at most 100 columns that takes no text for markup."""
    made = _Console(file=file, highlight=False, markup=False, emoji=False)
    made.width = min(made.width, COLUMNS) if made.is_terminal else COLUMNS
    return made


def grid(*headings: str, right: frozenset[str] = frozenset()) -> Table:
    """A table without lines; the columns named in ``right`` are aligned to the right.

    Its cells must be `clean` already: rich keeps escape sequences.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    return table
