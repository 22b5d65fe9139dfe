"""What the command line takes: every command with its arguments, and its ``--help``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from stages.errors import UserError

_DESCRIPTION = """\
BLIP's CapFilt: make a noisy set of web image-text pairs clean, round after round.
"""

_EXIT_CODES = """\
exit codes:
  0    done
  1    the run cannot go on, or verify found something wrong
  2    bad input, a run folder that cannot be used, or another driver at work in it
  75   a firing of schedule was skipped, since another driver is at work
  130  interrupted by Ctrl-C; the same command goes on from there
  143  ended by SIGTERM; the same command goes on from there
"""

_RUN = """\
Bring a run to the state that CONFIG asks for. Running again goes on where the last one ended.
"""

_SCHEDULE = """\
One firing of a schedule: take new source files; if no round has taken them yet and they are enough
(schedule.min_new_rows), go round once. A round that an earlier firing left unfinished is finished
instead. For cron, a systemd timer or a CronJob; with --every it stays and fires by the clock.

Exit code 0: went round, or nothing to do; 75: skipped, another driver is at work in the run.
"""

_FORGET = """\
Take samples out of a run. No driver that starts after this uses them: unfinished rounds select anew
without them, and later rounds keep to it. Models that have seen them are named. What finished
rounds have written stays, unless --scrub takes the samples out of every image file, table and
training shard.
"""

_RUN_FOLDER = "run folder: a path or an s3:// or gs:// URL"

Handler = Callable[[argparse.Namespace], int]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake."""
        raise UserError(f"{message}; see `{self.prog} --help`")


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from pipeline.version import code_version

        print(code_version())
        parser.exit()


def parser(handlers: Mapping[str, Handler]) -> argparse.ArgumentParser:
    """The parser of the whole command line; what it returns names the ``handler`` of the command.
    It raises `UserError` for what it cannot take."""
    common = _Parser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks"
    )
    form = argparse.RawDescriptionHelpFormatter
    whole = _Parser(
        prog="capfilt",
        description=_DESCRIPTION,
        epilog=_EXIT_CODES,
        parents=[common],
        formatter_class=form,
    )
    whole.add_argument(
        "--version", action=_Version, help="print the code's version, as records have it"
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, more, fill) in _COMMANDS.items():
        made = commands.add_parser(
            name,
            help=text,
            description=more or f"{text[0].upper()}{text[1:]}.",
            parents=[common],
            formatter_class=form,
        )
        made.set_defaults(handler=handlers[name])
        fill(made)
    return whole


def _run_options(parser: argparse.ArgumentParser) -> None:
    _config_options(parser)
    parser.add_argument("--rounds", type=int, metavar="N", help="the same as rounds.count=N")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, do nothing")
    parser.add_argument(
        "--retry-failed", action="store_true", help="fetch again what failed and may work now"
    )


def _schedule_options(parser: argparse.ArgumentParser) -> None:
    _config_options(parser)
    parser.add_argument(
        "--every", metavar="TIME", help="stay, and fire again and again: 30m, 6h, 1d (UTC)"
    )


def _config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="override of one field, as stage.field=value: select.threshold=0.4",
    )


def _run_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=_RUN_FOLDER)


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    _run_folder(parser)
    parser.add_argument(
        "stage",
        metavar="STAGE",
        nargs="?",
        help="a stage or one of its tables; default: list all tables",
    )
    parser.add_argument("--round", type=int, metavar="N", help="default: the last that has it")
    parser.add_argument("--rows", type=int, metavar="N", help="how many rows to show")
    parser.add_argument("--sql", metavar="SELECT", help="a SELECT over the round's tables")


def _report_options(parser: argparse.ArgumentParser) -> None:
    _run_folder(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="default: report.html in the run folder; here, if that is remote",
    )


def _trace_options(parser: argparse.ArgumentParser) -> None:
    _run_folder(parser)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", default="trace.json", help="default: %(default)s"
    )


def _forget_options(parser: argparse.ArgumentParser) -> None:
    _run_folder(parser)
    given = parser.add_mutually_exclusive_group(required=True)
    for name, text in (
        ("urls", "URLs of images, one a line"),
        ("ids", "sample_ids, one a line"),
        ("hashes", "sha256 of images as downloaded, one a line"),
    ):
        given.add_argument(f"--{name}", type=Path, metavar="FILE", help=text)
    parser.add_argument("--scrub", action="store_true", help="also write files anew that hold them")


def _import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE.pth", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder for captioner/ …")
    parser.add_argument("--image-size", type=int, metavar="N", help="default: as in the file")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", default="bert-base-uncased", help="or a hub id"
    )
    for tower in ("vision", "text"):
        parser.add_argument(f"--{tower}-heads", type=int, metavar="N", help="default: width / 64")


_COMMANDS: Mapping[str, tuple[str, str, Callable[[argparse.ArgumentParser], None]]] = {
    "run": ("run a config, or go on with it", _RUN, _run_options),
    "schedule": ("go round if there is enough new data", _SCHEDULE, _schedule_options),
    "status": ("how far a run is, and its figures", "", _run_folder),
    "verify": ("check the ledger, every record and every file of a run", "", _run_folder),
    "inspect": ("list a run's tables, show one, or ask SQL", "", _inspect_options),
    "report": ("write the report of a run as one HTML page", "", _report_options),
    "trace": (
        "write the life of every shard as a Chrome trace, for Perfetto",
        "",
        _trace_options,
    ),
    "forget": ("take samples out of a run", _FORGET, _forget_options),
    "import-checkpoint": ("turn a released BLIP .pth into folders", "", _import_options),
}
"""Command → what ``--help`` says of it, in a line and at length, and what adds its arguments."""
