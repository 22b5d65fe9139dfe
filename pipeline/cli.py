"""The command line: delegates what `pipeline.options` has parsed, and turns every error into one
line and an exit code, which ``capfilt --help`` explains."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.options import Handler, parser
from stages.errors import CapfiltError, LeaseHeldError, UserError

# What needs Ray or torch is imported by the command that does, so that the others start at once.
if TYPE_CHECKING:
    from pipeline.store import Store

_SKIPPED = 75  # EX_TEMPFAIL of sysexits.h
_SHOWING = ("status", "inspect", "report", "trace")
"""Commands that are done where nobody reads on: what they still had to do was to show it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program with ``arguments`` (None: those of the process). Returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _ended(given, "--debug" in given)
    finally:  # --help ends by an exception
        if sys.stdout is not None:  # as it is where the shell closed it
            from pipeline.terminal import unread

            # At exit a pipe that nobody reads would cost a message of Python's and the exit code.
            with unread(sys.stdout):
                sys.stdout.flush()


def _ended(given: Sequence[str], debug: bool) -> int:
    """The exit code of the command, however it ends."""
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
    except Exception as error:  # noqa: BLE001 - the outermost handler
        hint = "" if debug else "; run again with --debug for the traceback"
        return _fail(f"{type(error).__name__}: {error}{hint}", 1, debug, where)


def _fail(line: str, code: int, debug: bool, where: Mapping[str, str]) -> int:
    """Tell the error that ends the program; a JSON line also says ``where``: in which run."""
    from pipeline.terminal import clean, json_line, json_wanted, say, unread

    if debug:
        with unread(sys.stderr):
            traceback.print_exc()
    told = json_line(line, "error", **where) if json_wanted() else f"capfilt: {clean(line)}"
    say(told, sys.stderr)
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
    handler: Handler = options.handler
    if options.command not in _SHOWING:
        return handler(options)

    from pipeline.terminal import unread

    with unread(sys.stdout):
        return handler(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    return parser(
        {
            "run": _do_run,
            "schedule": _do_schedule,
            "status": _do_status,
            "verify": _do_verify,
            "inspect": _do_inspect,
            "report": _do_report,
            "trace": _do_trace,
            "forget": _do_forget,
            "import-checkpoint": _do_import,
        }
    )


def _say(line: str) -> None:
    """Tell something on the way: a reader that has seen enough must not end the work."""
    from pipeline.terminal import say

    say(line, sys.stdout)


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
    from pipeline.terminal import console, json_wanted, unread

    if not json_wanted():
        from pipeline.status import print_figures, read_figures
        from pipeline.store import Store

        figures = read_figures(Store(run))
        with unread(sys.stdout):
            print_figures(figures, console(sys.stdout))


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
        _say(clean(problem))
    if found.scratch_files:
        scratch = f"{found.scratch_files} unpublished files, {size(found.scratch_bytes)}"
        _say(f"note: {scratch}: left by unfinished work, harmless")
    if found.problems:
        _say(f"{len(found.problems)} problems in {found.records} records, {found.files} files")
        return 1
    rounds = ", ".join(map(str, found.balanced)) or "none yet"
    _say(
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
    _say(
        f"{found.asked} asked for, {found.samples} samples of this run"
        f"{'' if found.new else '; all were forgotten before'}"
    )
    for place in found.seen_by:
        _say(f"had seen them: {place}")
    if options.scrub:
        from pipeline.scrub import scrub

        scrubbed = scrub(store, _say)
        _say(f"{scrubbed.rewritten} files written anew, {scrubbed.deleted} deleted")
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
        _say(str(folder))
    for note in made.notes:
        _say(f"note: {note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
