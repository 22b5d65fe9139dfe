"""What ``--help`` says, which is all that a person on a server has at hand."""

from __future__ import annotations

import pytest

from pipeline.options import parser
from stages.errors import UserError

COMMANDS = (
    "run",
    "schedule",
    "status",
    "verify",
    "inspect",
    "report",
    "trace",
    "forget",
    "import-checkpoint",
)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the help says, whatever its lines."""
    with pytest.raises(SystemExit) as ended:
        parser(dict.fromkeys(COMMANDS, lambda _: 0)).parse_args([*arguments, "--help"])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_the_exit_codes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    help_ = said(capsys)
    for told in (
        "0 done",
        "1 the run cannot go on, or verify found something wrong",
        "2 bad input, a run folder that cannot be used, or another driver",
        "75 a firing of schedule was skipped",
        "130 interrupted by Ctrl-C",
        "143 ended by SIGTERM",
        "inspect list a run's tables, show one, or ask SQL",
    ):
        assert told in help_


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("run", "CONFIG YAML file"),
        ("run", "key=value override of one field, as stage.field=value"),
        ("schedule", "CONFIG YAML file"),
        ("inspect", "default: list all tables"),
        ("inspect", "a SELECT over the round's tables"),
        ("report", "default: report.html in the run folder; here, if that is remote"),
        ("forget", "sample_ids, one a line"),
        ("forget", "sha256 of images as downloaded, one a line"),
    ],
)
def test_arguments_say_what_they_take(
    command: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in said(capsys, command)


def test_a_command_names_what_does_it() -> None:
    handlers = {name: lambda _, code=code: code for code, name in enumerate(COMMANDS)}
    options = parser(handlers).parse_args(["verify", "runs/x", "--debug"])
    assert options.handler(options) == COMMANDS.index("verify")
    with pytest.raises(UserError, match=r"invalid choice: 'dance'.* see `capfilt --help`"):
        parser(handlers).parse_args(["dance"])
