"""The screen of a run: plain lines in a file, a live region in a real terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.progress import Notices, Screen
from stages.errors import ConfigError

STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
HOSTILE = "\x1b[2J[bold]x[/bold]\nsecond"


def plain(seconds: float = 0.0) -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    return Screen(out, seconds=seconds), out


def lines(out: io.StringIO) -> list[str]:
    """What was said, without the time, which every line must begin with."""
    said = out.getvalue().splitlines()
    assert all(STAMP.match(line) for line in said), said
    return [STAMP.sub("", line) for line in said]


def notices(done: int = 0, rows: int = 0) -> Notices:
    return Notices(
        running={("caption", "000001"): 1.0},
        done={"caption": done} if done else {},
        counts={"caption": {"success": rows}} if rows else {},
    )


def test_a_shard_stage_from_begin_to_end() -> None:
    screen, out = plain()
    screen.begin_round(1, "bootstrapping")
    screen.begin("caption", total=10, done=4)
    screen.update(notices())
    time.sleep(0.02)
    screen.update(notices(done=2, rows=1500))
    time.sleep(0.02)
    screen.update(notices(done=6, rows=4000))
    screen.end("caption")
    said = lines(out)
    assert said[0] == "round 1: bootstrapping"
    assert re.match(r"  caption +6/10  1,500 rows  [\d,.]+ rows/s  0\.0 s", said[-3])
    assert re.match(r"  caption +10/10  4,000 rows", said[-2])
    last = r"  caption +10 shards \(4 of them earlier\); rows 4,000: 4,000 success; 0\.0 s$"
    assert re.match(last, said[-1])


def test_a_training_stage_shows_its_steps() -> None:
    screen, out = plain()
    screen.begin("pretrain", total=1)
    screen.update(Notices(progress={"pretrain": ("loss 4.21", 40, 1100)}))
    screen.end("pretrain", seconds=75, line="loss 1.3")
    assert re.match(r"  pretrain +40/1100  loss 4\.21  0\.0 s", lines(out)[0])
    assert re.match(r"  pretrain +1 min 15 s; loss 1\.3$", lines(out)[1])


def test_stages_that_follow_each_other_share_no_time() -> None:
    screen, out = plain(seconds=9)
    for stage in ("pretrain", "finetune_captioner"):
        screen.begin(stage, total=1)
    screen.update(Notices(progress={"pretrain": ("", 1, 2)}))
    time.sleep(0.25)
    progress = {"pretrain": ("", 2, 2), "finetune_captioner": ("", 1, 2)}
    screen.update(Notices(progress=progress))
    time.sleep(0.5)
    screen.end("pretrain")
    screen.end("finetune_captioner")
    took = [float(line.split()[-2]) for line in lines(out)]
    assert 0.2 <= took[0] <= 0.4 and 0.4 <= took[1] <= 0.9


def test_what_is_published_is_said_to_be() -> None:
    screen, out = plain()
    screen.begin("embed", total=3, done=3)
    screen.update(notices(done=2))
    screen.end("embed")
    screen.end("never begun")
    assert lines(out)[0].split() == ["embed", "already", "published"]


def test_a_stage_speaks_only_now_and_then() -> None:
    screen, out = plain(seconds=0.2)
    screen.begin("caption", total=100)
    start = time.monotonic()
    for done in range(30):
        screen.update(notices(done))
        time.sleep(0.02)
    periods = (time.monotonic() - start) / 0.2
    assert 2 <= len(lines(out)) <= periods + 1


def test_what_waits_is_silent() -> None:
    screen, out = plain()
    screen.begin("filter", total=3)
    screen.update(notices(done=1))
    assert lines(out) == []


def test_a_failure_is_told_once_and_cannot_touch_the_terminal() -> None:
    screen, out = plain(seconds=60)
    screen.begin("caption", total=3)
    failed = Notices(errors={("caption", "000002"): ("ValueError", HOSTILE)})
    screen.update(failed)
    screen.update(failed)
    assert lines(out) == ["  caption shard 000002: ValueError: �[2J[bold]x[/bold] second"]
    screen.note(f"model {HOSTILE}")
    assert lines(out)[1] == "model �[2J[bold]x[/bold] second"


@pytest.mark.parametrize("log", ["plain", "json"])
@pytest.mark.parametrize("live", [False, True])
def test_a_reader_that_has_gone_does_not_end_the_run(log: str, live: bool, tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from pipeline.progress import Screen
screen = Screen(live={live})
for number in range(3):
    screen.note(str(number))
Path({str(tmp_path / "ended")!r}).touch()
"""
    reader, writer = os.pipe()
    os.close(reader)
    env = os.environ | {"CAPFILT_LOG_FORMAT": log, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=env, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "ended").exists()


def test_a_new_round_forgets_the_last() -> None:
    screen, out = plain()
    screen.begin("caption", total=3)
    screen.begin_round(2, "bootstrapping")
    screen.update(notices(done=1))
    assert lines(out) == ["round 2: bootstrapping"]


def test_updates_may_come_from_other_threads() -> None:
    screen, out = plain()
    failed: list[BaseException] = []

    def update() -> None:
        try:
            for done in range(200):
                screen.update(notices(done, rows=done))
        except BaseException as error:  # noqa: BLE001 - reported below
            failed.append(error)

    threads = [threading.Thread(target=update) for _ in range(4)]
    for thread in threads:
        thread.start()
    for number in range(200):
        screen.begin(f"stage{number}", total=2)
        screen.end(f"stage{number}")
    for thread in threads:
        thread.join()
    assert not failed
    assert sum(" stage" in line for line in lines(out)) == 200


LIVE = """
import time
from pipeline.progress import Notices, Screen
with Screen() as screen:
    screen.begin_round(1, "bootstrapping")
    screen.begin("caption", total=4)
    screen.begin("pretrain", total=1)
    screen.begin("finetune_captioner", total=1)
    for step in range(1, 4):
        screen.update(Notices(
            running={("caption", "000000"): 1.0},
            done={"caption": step},
            counts={"caption": {"success": 12345 * step}},
            errors={("caption", "000009"): ("ValueError", "\\x1b]0;owned\\x07[red]x[/red]")},
            progress={"pretrain": ("loss \\x1b[5m " + "long " * 60, step * 10, 100)},
        ))
        time.sleep(0.4)
    screen.end("caption")
    screen.end("pretrain")
"""


def in_terminal(script: str, columns: int, **env: str) -> str:
    """What a script writes to a terminal of so many columns."""
    leader, follower = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    root = str(Path(__file__).parents[2])
    known = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=follower,
        stderr=subprocess.STDOUT,
        env=known | {"TERM": "xterm-256color", "PYTHONPATH": root} | env,
    )
    os.close(follower)
    said = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the other side is closed
            break
        if not chunk:
            break
        said += chunk
    os.close(leader)
    assert process.wait() == 0, said.decode()
    return said.decode()


def visible(said: str) -> list[str]:
    """Lines without colours and cursor movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said).replace("\r", "\n").split("\n")


@pytest.mark.parametrize("columns", [200, 100, 60])
def test_a_terminal_gets_bars_that_fit(columns: int) -> None:
    said = in_terminal(LIVE, columns)
    shown = visible(said)
    assert "━" in said and any("waits" in line for line in shown)
    assert any("3/4" in line and "37,035" in line for line in shown)
    assert any(re.search(r"caption +4 shards; rows 37,035: 37,035 success", line) for line in shown)
    assert "\x1b]0;" not in said and "\x1b[5m" not in said and "\x07" not in said
    assert "[red]x[/red]" in said
    bars = [line for line in shown if "━" in line or "loss" in line]
    assert bars and max(map(len, bars)) <= min(columns, 100)
    assert said.rstrip().endswith("\x1b[?25h") or said.count("\x1b[?25l") == said.count("\x1b[?25h")


BUSY = """
import faulthandler, threading
from pipeline.progress import Notices, Screen
faulthandler.dump_traceback_later(30, exit=True)
with Screen() as screen:
    screen._live._live.refresh_per_second = 10_000
    screen.begin("caption", total=4000)
    def update():
        for step in range(2000):
            errors = {("caption", str(step)): ("E", "x")}
            screen.update(Notices(done={"caption": step}, errors=errors))
    other = threading.Thread(target=update)
    other.start()
    for number in range(500):
        screen.note(f"note {number}")
    other.join()
"""


def test_the_screen_and_its_live_region_never_wait_for_each_other() -> None:
    said = in_terminal(BUSY, 100)
    assert "note 499" in said


def test_a_dumb_terminal_gets_plain_lines() -> None:
    said = in_terminal(LIVE, 100, TERM="dumb")
    assert "\x1b" not in said
    assert all(STAMP.match(line) for line in said.replace("\r", "").splitlines())


def test_a_failing_run_gives_the_terminal_back() -> None:
    script = (
        "from pipeline.progress import Screen\n"
        "try:\n"
        "    with Screen() as screen:\n"
        "        screen.begin('caption', 3)\n"
        "        raise ValueError\n"
        "except ValueError:\n"
        "    print('after')\n"
    )
    said = in_terminal(script, 100)
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h") == 1
    assert said.index("\x1b[?25h") < said.index("after")


def test_json_lines_say_run_round_stage_and_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPFILT_LOG_FORMAT", "json")
    out = io.StringIO()
    screen = Screen(out, seconds=0.0, run="s3://bucket/run")
    screen.note("before any round")
    screen.begin_round(1, "bootstrapping")
    screen.begin("caption", total=2)
    screen.update(Notices(errors={("caption", "000001"): ("ShardError", HOSTILE)}))
    screen.update(Notices(ended=[("caption", "000002", {"success": 9, "failed": 1})]))
    screen.end("caption", seconds=1.0)
    said = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line.pop("message") for line in said] == [
        "before any round",
        "round 1: bootstrapping",
        "caption shard 000001: ShardError: �[2J[bold]x[/bold] second",
        "caption shard 000002: rows 10: 9 success, 1 failed",
        "caption 2 shards; 1.0 s",
    ]
    assert all(datetime.fromisoformat(line.pop("time")).tzinfo == UTC for line in said)
    run = {"level": "info", "run": "s3://bucket/run"}
    assert said == [
        run,
        run | {"round": 1},
        run | {"level": "warning", "round": 1, "stage": "caption", "shard": "000001"},
        run | {"round": 1, "stage": "caption", "shard": "000002"},
        run | {"round": 1, "stage": "caption"},
    ]


def test_a_terminal_gets_json_lines_too() -> None:
    said = in_terminal(LIVE, 100, CAPFILT_LOG_FORMAT="json")
    assert "\x1b" not in said and all(map(json.loads, said.replace("\r", "").splitlines()))


def test_an_unknown_log_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPFILT_LOG_FORMAT", "xml")
    with pytest.raises(ConfigError, match="'xml' is not allowed: plain or json"):
        Screen(io.StringIO())


def test_a_long_silence_is_worth_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an autoscaler cannot start, Ray waits for without a word."""
    screen, out = plain()
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def after(seconds: float, told: Notices) -> bool:
        clock[0] += seconds
        before = len(lines(out))
        screen.update(told)
        return "`ray status`" in "".join(lines(out)[before:])

    screen.begin("caption", total=10)
    assert not after(1, Notices())
    assert not after(299, Notices())
    assert after(2, Notices()) and not after(900, Notices())
    assert not after(900, notices())  # one is at work, for long
    assert not after(900, notices())
    assert after(2800, notices())  # or was lost
    ended = Notices(done={"caption": 1})
    assert not after(1, ended) and not after(200, ended) and after(200, ended)
    assert not after(1, Notices(progress={"dedup": ("comparing", 1, 2)}))
    screen.end("caption")
    assert not after(900, Notices()) and not after(900, Notices())
