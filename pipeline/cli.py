"""The command line: parses and delegates, and turns every error into one line.

Exit codes: 0 done; 1 the run cannot go on, or `verify` found something wrong; 2 bad input, or
another driver holds the run; 75 a scheduled firing was skipped for that; 130 interrupted, 143 by
SIGTERM.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from stages.errors import CapfiltError, LeaseHeldError, UserError

# What needs Ray or torch is imported by the command that does, so that the others start at once.
if TYPE_CHECKING:
    from pipeline.store import Store

_DESCRIPTION = """\
BLIP's CapFilt: make a noisy set of web image-text pairs clean, round after round.
"""

_RUN = """\
Bring a run to the state that CONFIG asks for. Running again goes on where the last one ended.

CONFIG is a YAML file; key=value overrides one of its fields, e.g. select.threshold=0.4.
"""

_SCHEDULE = """\
One firing of a schedule: take new source files; if no round has taken them yet and they are enough
(schedule.min_new_rows), go round once. A round that an earlier firing left unfinished is finished
instead. For cron, a systemd timer or a CronJob; with --every it stays and fires by the clock.

Exit code 0: went round, or nothing to do; 75: skipped, another driver is at work in the run.
"""

_RUN_FOLDER = "run folder: a path or an s3:// or gs:// URL"

_SKIPPED = 75  # EX_TEMPFAIL of sysexits.h

_FORGET = """\
Take samples out of a run. No driver that starts after this uses them: unfinished rounds select anew
without them, and later rounds keep to it. Models that have seen them are named. What finished
rounds have written stays, unless --scrub takes the samples out of every image file, table and
training shard.
"""


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program with ``arguments`` (None: those of the process). Returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    where: dict[str, str] = {}
    try:
        return _run(given, where)
    except UserError as error:
        return _fail(str(error), 2, debug, where)
    except CapfiltError as error:
        return _fail(str(error), 1, debug, where)
    except KeyboardInterrupt as error:
        from pipeline.lease import Terminated

        if not debug:
            # What was cut short in the making (a dataset of Ray's) fails again when collected.
            sys.unraisablehook = lambda _: None
        code = 143 if isinstance(error, Terminated) else 130
        return _fail(
            "interrupted; run the same command again to go on from here", code, debug, where
        )
    except BrokenPipeError:
        # The reader, `head` for one, has seen enough; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - the outermost handler
        hint = "" if debug else "; run again with --debug for the traceback"
        return _fail(f"{type(error).__name__}: {error}{hint}", 1, debug, where)


def _fail(line: str, code: int, debug: bool, where: Mapping[str, str]) -> int:
    """Tell the error that ends the program; a JSON line also says ``where``: in which run."""
    from pipeline.terminal import clean, json_line, json_wanted

    if debug:
        traceback.print_exc()
    told = json_line(line, "error", **where) if json_wanted() else f"capfilt: {clean(line)}"
    print(told, file=sys.stderr)
    return code


def _run(given: Sequence[str], where: dict[str, str]) -> int:
    options, rest = _parser().parse_known_args(given)
    configured = options.command in ("run", "schedule")
    overrides = [word for word in rest if configured and not word.startswith("-")]
    unknown = [word for word in rest if word not in overrides]
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}; see `capfilt {options.command} --help`")
    # argparse hands over the words before an option only; those behind it are overrides as well.
    options.overrides = [*getattr(options, "overrides", ()), *overrides]
    options.where = where
    handler: Callable[[argparse.Namespace], int] = options.handler
    return handler(options)


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks"
    )
    parser = _Parser(prog="capfilt", description=_DESCRIPTION, parents=[common])
    parser.add_argument("--version", action=_Version, help="of the code, as records have it")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, handler: Callable[[argparse.Namespace], int], text: str, more: str = ""
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=text,
            description=more or f"{text[0].upper()}{text[1:]}.",
            parents=[common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(handler=handler)
        return made

    _run_options(command("run", _do_run, "run a config, or go on with it", _RUN))
    firing = command("schedule", _do_schedule, "go round if there is enough new data", _SCHEDULE)
    _schedule_options(firing)
    for name, handler, text in (
        ("status", _do_status, "how far a run is, and its figures"),
        ("verify", _do_verify, "check the ledger, every record and every file of a run"),
        ("inspect", _do_inspect, "look into what a stage wrote"),
        ("report", _do_report, "write the report of a run as one HTML page"),
        ("trace", _do_trace, "write the life of every shard as a Chrome trace, for Perfetto"),
    ):
        command(name, handler, text).add_argument("run", metavar="RUN", help=_RUN_FOLDER)
    _inspect_options(commands.choices["inspect"])
    commands.choices["report"].add_argument("--output", type=Path, metavar="FILE")
    commands.choices["trace"].add_argument(
        "--output", type=Path, metavar="FILE", default="trace.json", help="default: %(default)s"
    )
    _forget_options(command("forget", _do_forget, "take samples out of a run", _FORGET))
    importing = command("import-checkpoint", _do_import, "turn a released BLIP .pth into folders")
    _import_options(importing)
    return parser


def _config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="key=value", nargs="*")


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


def _import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE.pth", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder for captioner/ …")
    parser.add_argument("--image-size", type=int, metavar="N", help="default: as in the file")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER", default="bert-base-uncased", help="or a hub id"
    )
    for tower in ("vision", "text"):
        parser.add_argument(f"--{tower}-heads", type=int, metavar="N", help="default: width / 64")


def _forget_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=_RUN_FOLDER)
    given = parser.add_mutually_exclusive_group(required=True)
    for name, text in (
        ("urls", "URLs of images, one a line"),
        ("ids", "sample_ids"),
        ("hashes", "sha256 of images as downloaded"),
    ):
        given.add_argument(f"--{name}", type=Path, metavar="FILE", help=text)
    parser.add_argument("--scrub", action="store_true", help="also write files anew that hold them")


def _inspect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", metavar="STAGE", nargs="?", help="a stage or one of its tables")
    parser.add_argument("--round", type=int, metavar="N", help="default: the last that has it")
    parser.add_argument("--rows", type=int, metavar="N", help="how many rows to show")
    parser.add_argument("--sql", metavar="SELECT", help="a question to the tables of the round")


def _do_run(options: argparse.Namespace) -> int:
    from pipeline.config import load

    overrides = list(options.overrides)
    if options.rounds is not None:
        overrides.append(f"rounds.count={options.rounds}")
    config = load(options.config, overrides)
    options.where["run"] = config.run

    from pipeline import rounds
    from pipeline.progress import Screen

    with Screen(run=config.run) as screen, _configured(options.config, overrides):
        rounds.run(config, screen, options.dry_run, options.retry_failed)
    if not options.dry_run:
        _print_figures(config.run)
    return 0


@contextmanager
def _configured(path: str, overrides: Sequence[str]) -> Iterator[None]:
    """Inside, an error that begins with a field of the config also says where that was set."""
    from pipeline.config import RunConfig, origin

    try:
        yield
    except UserError as error:
        told = str(error)
        if told.partition(":")[0].partition(".")[0] not in RunConfig.model_fields:
            raise
        raise type(error)(f"{origin(told, path, overrides)}: {told}") from error


def _print_figures(run: str) -> None:
    from pipeline.terminal import console, json_wanted

    if not json_wanted():
        from pipeline.status import print_figures, read_figures
        from pipeline.store import Store

        print_figures(read_figures(Store(run)), console(sys.stdout))


def _do_schedule(options: argparse.Namespace) -> int:
    if options.every is not None:
        return _do_repeat(options)
    from pipeline.config import load

    config = load(options.config, options.overrides)
    options.where["run"] = config.run

    from pipeline.progress import Screen
    from pipeline.schedule import fire

    try:
        with (
            Screen(run=config.run) as screen,
            _configured(options.config, options.overrides),
        ):
            went_round = fire(config, screen)
    except LeaseHeldError as error:
        return _fail(f"skipped: {error}", _SKIPPED, "debug" in options, options.where)
    if went_round:
        _print_figures(config.run)
    return 0


def _do_repeat(options: argparse.Namespace) -> int:
    from pipeline.timer import repeat, seconds

    try:
        every = seconds(options.every)
    except ValueError as error:
        raise UserError(f"--every {options.every!r}: give 90s, 30m, 6h or 1d") from error
    debug = ["--debug"] if "debug" in options else []
    return repeat(every, [options.config, *options.overrides, *debug])


def _open(options: argparse.Namespace) -> Store:
    from pipeline.runfolder import open_run

    options.where["run"] = options.run
    return open_run(options.run)


def _do_status(options: argparse.Namespace) -> int:
    from pipeline.status import print_status, read_status
    from pipeline.terminal import console

    print_status(read_status(_open(options)), console(sys.stdout))
    return 0


def _do_verify(options: argparse.Namespace) -> int:
    store = _open(options)

    from pipeline.terminal import clean, size
    from pipeline.verify import verify

    found = verify(store)
    for problem in found.problems:
        print(clean(problem))
    if found.scratch_files:
        scratch = f"{found.scratch_files} unpublished files, {size(found.scratch_bytes)}"
        print(f"note: {scratch}: left by unfinished work, harmless")
    if found.problems:
        print(f"{len(found.problems)} problems in {found.records} records, {found.files} files")
        return 1
    rounds = ", ".join(map(str, found.balanced)) or "none yet"
    print(
        f"OK: {found.records} records, {found.files} files, {size(found.bytes)}; "
        f"balanced rounds: {rounds}"
    )
    return 0


def _do_inspect(options: argparse.Namespace) -> int:
    if options.rows is not None and options.rows < 1:
        raise UserError(f"inspect: --rows {options.rows}: must be at least 1")
    store = _open(options)

    from pipeline.inspect import inspect
    from pipeline.terminal import console

    inspect(store, options.stage, options.round, options.sql, options.rows, console(sys.stdout))
    return 0


def _do_report(options: argparse.Namespace) -> int:
    store = _open(options)

    from pipeline.report.render import write_report

    print(write_report(store, options.output))
    return 0


def _do_trace(options: argparse.Namespace) -> int:
    store = _open(options)

    from pipeline.trace import write_trace

    print(write_trace(store, options.output))
    return 0


def _do_forget(options: argparse.Namespace) -> int:
    from pipeline.forget import Kind, forget, read_list

    store = _open(options)
    given: dict[Kind, Path | None] = {
        "url": options.urls,
        "id": options.ids,
        "hash": options.hashes,
    }
    kind, path = next((kind, path) for kind, path in given.items() if path is not None)
    found = forget(store, kind, read_list(path, kind))
    print(
        f"{found.asked} asked for, {found.samples} samples of this run"
        f"{'' if found.new else '; all were forgotten before'}"
    )
    for place in found.seen_by:
        print(f"had seen them: {place}")
    if options.scrub:
        from pipeline.scrub import scrub

        scrubbed = scrub(store, print)
        print(f"{scrubbed.rewritten} files written anew, {scrubbed.deleted} deleted")
    return 0


def _do_import(options: argparse.Namespace) -> int:
    from stages.models.original import import_checkpoint

    made = import_checkpoint(
        options.file,
        options.out,
        tokenizer=options.tokenizer,
        image_size=options.image_size,
        vision_heads=options.vision_heads,
        text_heads=options.text_heads,
    )
    for folder in made.folders.values():
        print(folder)
    for note in made.notes:
        print(f"note: {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
