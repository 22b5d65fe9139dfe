from __future__ import annotations

import io

import pytest

from pipeline.terminal import breakdown, clean, console, duration, grid, size


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a plain text", "a plain text"),
        ("two\nlines\r\n\tand   spaces ", "two lines and spaces"),
        ("\x1b[31mred\x1b[0m \x9b2J", "�[31mred�[0m �2J"),
        ("\x1b]0;title\x07", "�]0;title�"),
        ("safe\u202etxt.exe", "safe�txt.exe"),
        ("\u2066isolated\u2069", "�isolated�"),
        ("Straße 日本 مرحبا 😀", "Straße 日本 مرحبا 😀"),
        ("👩\u200d🚀", "👩🚀"),
        ("no\u00a0break\u2028line", "no break line"),
        ("null\x00 byte", "null� byte"),
        (None, "None"),
    ],
)
def test_clean(text: object, shown: str) -> None:
    assert clean(text) == shown


def test_clean_cuts() -> None:
    assert clean("abcdef", 6) == "abcdef"
    assert clean("abcdefg", 6) == "abcde…"
    assert clean("x" * 10_000_000, 5) == "xxxx…"
    assert clean(" " * 1000 + "x", 5) in {"x", "…"}


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-1, "0.0 s"),
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
    ],
)
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (3_400_000, "3.4 MB"),
        (5 * 10**15, "5000.0 TB"),
    ],
)
def test_size(count: int, shown: str) -> None:
    assert size(count) == shown


def test_breakdown_begins_with_the_most_frequent() -> None:
    assert breakdown({}) == ""
    assert breakdown({"b": 2, "a": 2, "ok": 2000}) == "2,004: 2,000 ok, 2 a, 2 b"
    assert "\x1b" not in breakdown({"\x1b[2J": 1})


def test_a_console_takes_no_text_for_markup() -> None:
    out = io.StringIO()
    console(out).print("[bold]dog[/bold] :smile:")
    table = grid("text", "n", right=frozenset({"n"}))
    table.add_row("word " * 60, "1")
    console(out).print(table)
    lines = out.getvalue().splitlines()
    assert lines[0] == "[bold]dog[/bold] :smile:"
    assert len(lines) > 4 and max(map(len, lines)) <= 100
