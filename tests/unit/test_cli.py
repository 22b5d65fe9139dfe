"""The program as a person runs it: exit codes, one line an error, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.cli import main
from pipeline.lease import held
from pipeline.runfolder import read_rounds
from pipeline.store import Store
from stages.ids import sample_id
from stages.scenes.config import WorldConfig
from stages.scenes.world import build_world
from tests.run_folder import make_run

ROOT = Path(__file__).parents[2]
CONFIG = {
    "run": "run",
    "sources": [{"path": "web.parquet"}],
    "human": [{"path": "human", "kind": "human"}],
    "pretrain": {"tokenizer": "tokenizer"},
}


def capfilt(
    *arguments: str, cwd: Path | None = None, module: bool = False
) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("capfilt")
    program = [sys.executable, "-m", "pipeline"] if module or not script.exists() else [str(script)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*program, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


def refused(done: subprocess.CompletedProcess[str], code: int = 2) -> str:
    """The one line with which a command ended."""
    assert done.returncode == code, done
    assert done.stderr.startswith("capfilt: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_run(str(tmp_path_factory.mktemp("cli") / "run")).url


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def test_help_is_there_at_once() -> None:
    started = time.monotonic()
    done = capfilt("--help")
    assert time.monotonic() - started < 3
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("run", "schedule", "status", "verify", "report"))
    for command in ("run", "schedule", "status", "verify", "inspect", "report"):
        said = capfilt(command, "--help")
        assert said.returncode == 0 and said.stdout.startswith(f"usage: capfilt {command}")


@pytest.mark.parametrize(
    "module", ["pipeline.status", "pipeline.inspect", "pipeline.trace", "pipeline.cli"]
)
def test_looking_needs_neither_ray_nor_torch(module: str) -> None:
    script = f"import sys, {module}; print({{'ray', 'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("module", [False, True])
def test_the_module_is_the_same_program(run: str, module: bool) -> None:
    done = capfilt("status", run, module=module)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 of 3 rounds done" in done.stdout and "next: round 2" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "required: COMMAND"),
        (("dance",), "invalid choice: 'dance'"),
        (("status",), "required: RUN"),
        (("status", "a", "b"), "unknown argument 'b'"),
        (("status", "--fast", "a"), "unknown argument '--fast'"),
        (("run",), "required: CONFIG"),
        (("run", "x.yaml", "--fast"), "unknown argument '--fast'"),
        (("run", "x.yaml", "--rounds", "two"), "invalid int value: 'two'"),
        (("run", "none.yaml"), "none.yaml: cannot be read"),
        (("inspect", "run", "--rows", "0"), "--rows 0: must be at least 1"),
        (("schedule",), "required: CONFIG"),
        (("schedule", "none.yaml"), "none.yaml: cannot be read"),
        (("schedule", "none.yaml", "--every", "often"), "--every 'often': give 90s, 30m, 6h or 1d"),
        (("schedule", "none.yaml", "--every", "0h"), "--every '0h'"),
    ],
)
def test_bad_arguments_are_one_line(arguments: tuple[str, ...], part: str, tmp_path: Path) -> None:
    assert part in refused(capfilt(*arguments, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["status", "verify", "inspect", "report", "trace"])
def test_a_folder_without_a_run(command: str, tmp_path: Path) -> None:
    said = refused(capfilt(command, str(tmp_path / "none")))
    assert f"{tmp_path}/none" in said and "no run here" in said
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_key_writes_nothing(config: Path) -> None:
    said = refused(capfilt("run", str(config), "select.treshold=0.4", cwd=config.parent))
    assert "override 'select.treshold=0.4': select.treshold: 0.4: unknown key" in said
    assert "did you mean 'threshold'?" in said
    assert [path.name for path in config.parent.iterdir()] == ["run.yaml"]


def test_overrides_may_stand_anywhere(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        assert main(["run", *arguments]) == 2
        return capsys.readouterr().err

    given = ("seed=1", "--rounds", "-3", "select.treshold=2", "--dry-run", "select.keep=all")
    assert "select.treshold: 2: unknown key" in said(str(config), *given)
    assert "rounds.count: -3 is not allowed" in said(str(config), "--rounds", "-3")
    assert "select.keep: 'all' is not allowed" in said("--rounds", "1", str(config), given[-1])
    assert "select.keep: 'all' is not allowed" in said(str(config), given[-1], "--rounds", "1")


def test_a_source_that_is_not_there(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(config.parent)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for command in (["run"], ["run", "--dry-run"], ["schedule"]):
        assert main([*command, str(config), "seed=1"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"capfilt: {config}: sources.0.path: web.parquet: no such file")
    given = "sources=[{path: none.csv}]"
    assert main(["run", str(config), given]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"capfilt: override '{given}': sources.0.path: none.csv: no such file")
    assert said.count("\n") == 1
    assert [path.name for path in config.parent.iterdir()] == ["run.yaml"]


def test_what_is_no_matter_of_the_config_is_not_laid_to_it(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    assert main(["run", str(config), "seed=1", f"run={config.parent}/run"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("capfilt: RAY_ADDRESS: cannot use the Ray cluster at ray://127.0.0.1")


def test_another_world_than_the_run_began_with(tmp_path: Path) -> None:
    world = {"web_rows": 160, "human_images": 8, "dev_images": 8, "test_images": 8}
    build_world(WorldConfig(**world), tmp_path / "run" / "world")
    values = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    values |= {"run": str(tmp_path / "run"), "world": world | {"seed": 1}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    assert f"{tmp_path}/run/world: holds another world" in refused(capfilt("run", str(path)))
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_dry_run_creates_nothing(tmp_path: Path) -> None:
    command = ("run", str(ROOT / "configs" / "tiny.yaml"), f"run={tmp_path}/run", "--dry-run")
    done = capfilt(*command, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "0 shards are cut; 2 source files are new" in done.stdout
    assert "round 1: all of it, once its sources are cut" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_second_driver_is_refused_and_a_firing_skipped(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "run"))
    config = str(ROOT / "configs" / "tiny.yaml")
    with held(store, print):
        said = refused(capfilt("run", config, f"run={store.root}"))
        assert f"held by process {os.getpid()} on " in said and ", since 20" in said
        said = refused(capfilt("schedule", config, f"run={store.root}"), code=75)
        assert said.startswith("capfilt: skipped: run folder ")
        assert [name for name in store.files() if not name.startswith("leases/")] == []


def test_debug_shows_where_it_happened() -> None:
    for arguments in (("--debug", "status", "none"), ("status", "none", "--debug")):
        done = capfilt(*arguments)
        assert done.returncode == 2
        assert "Traceback" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("capfilt: run folder 'none'")


def test_a_bug_is_one_line(tmp_path: Path) -> None:
    """A run.json that no run writes: not foreseen, so an exception of Python's own."""
    (tmp_path / "run.json").write_text('{"config": 5}')
    said = refused(capfilt("status", str(tmp_path)), code=1)
    assert "AttributeError" in said and "--debug" in said


def test_verify_says_ok_or_what_is_wrong(tmp_path: Path) -> None:
    store = make_run(str(tmp_path / "run"))
    store.put_named("scratch", ".x", b"123")
    done = capfilt("verify", store.url)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith("OK: ")
    assert "balanced rounds: 0, 1" in done.stdout and "1 unpublished files, 3 B" in done.stdout
    record = store.read_record(read_rounds(store)[1].records["caption"][0])
    Path(store.path(record.payloads[0].path)).unlink()
    done = capfilt("verify", store.url)
    assert done.returncode == 1 and done.stderr == ""
    assert f"{record.payloads[0].path}: is missing" in done.stdout.splitlines()
    assert "problems in" in done.stdout.splitlines()[-1]


def test_inspect(run: str) -> None:
    assert "training_log" in capfilt("inspect", run).stdout
    done = capfilt("inspect", run, "caption", "--round", "1", "--rows", "2")
    assert done.returncode == 0 and "… 2 more rows" in done.stdout
    done = capfilt("inspect", run, "--sql", "SELECT count(*) AS n FROM pairs")
    assert done.returncode == 0 and done.stdout.split()[-1] == "10"
    assert "there are sources" in refused(capfilt("inspect", run, "nothing"))
    assert "does not exist" in refused(capfilt("inspect", run, "--sql", "SELECT * FROM x"))


@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_a_reader_that_has_seen_enough(run: str, unbuffered: str) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    command = f"{sys.executable} -m pipeline inspect {run} pairs | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("round 1, pairs")


def unheard(*arguments: str, unbuffered: str) -> subprocess.CompletedProcess[str]:
    """A command whose output nobody reads, from the first line on."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    return done


@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_what_nobody_reads_is_done_all_the_same(tmp_path: Path, unbuffered: str) -> None:
    for shown in (("--help",), ("status", "--help")):
        done = unheard(*shown, unbuffered=unbuffered)
        assert (done.returncode, done.stderr) == (0, "")
    store = make_run(str(tmp_path / "run"))
    for command in ("status", "verify", "inspect"):
        done = unheard(command, store.url, unbuffered=unbuffered)
        assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "ids.txt").write_text(sample_id("cat"))
    ids = ("--ids", str(tmp_path / "ids.txt"))
    done = unheard("forget", store.url, *ids, "--scrub", unbuffered=unbuffered)
    assert (done.returncode, done.stderr) == (0, "")
    records = store.read_records(store.record_names())
    assert any("scrubbed" in record.details for record in records)
    store.remove(read_rounds(store)[1].records["caption"][0])
    done = unheard("verify", store.url, unbuffered=unbuffered)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_connection_that_breaks_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError("to a store")

    monkeypatch.setattr("pipeline.config.load", broken)
    assert main(["run", "my.yaml"]) == 1
    assert "BrokenPipeError: to a store" in capsys.readouterr().err


def test_the_trace_of_a_run(run: str, tmp_path: Path) -> None:
    done = capfilt("trace", run, "--output", "shards.json", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == "shards.json\n", done
    assert json.loads((tmp_path / "shards.json").read_text())["traceEvents"]


def test_errors_are_json_lines_where_the_log_is(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "status", str(tmp_path / "none")],
        env=os.environ | {"PYTHONPATH": str(ROOT), "CAPFILT_LOG_FORMAT": "json"},
        capture_output=True,
        text=True,
        check=False,
    )
    said = json.loads(done.stderr)
    assert done.returncode == 2 and said["level"] == "error" and "no run here" in said["message"]
    assert said["run"] == str(tmp_path / "none")


@pytest.mark.parametrize("command", ["run", "schedule"])
def test_the_error_that_ends_a_run_names_it(
    tmp_path: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CAPFILT_LOG_FORMAT", "json")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = [str(ROOT / "configs/tiny.yaml"), f"run={tmp_path}", "engine.grows_to={CPU: 8}"]
    assert main([command, *config]) == 2
    said = json.loads(capsys.readouterr().err)
    assert said["run"] == str(tmp_path) and "engine.grows_to" in said["message"]


def test_web_text_in_an_error_cannot_touch_the_terminal(tmp_path: Path) -> None:
    said = refused(capfilt("status", str(tmp_path / "\x1b[2Jx")))
    assert "\x1b" not in said


@pytest.mark.parametrize("debug", [False, True])
def test_what_was_interrupted_in_the_making_does_not_speak_after_the_last_line(debug: bool) -> None:
    program = """
import sys
from pipeline import cli

class Half:
    def __del__(self):
        self.executor.shutdown()

def run(*_):
    half = Half()
    raise KeyboardInterrupt

cli._run = run
sys.exit(cli.main(sys.argv[1:]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *(["--debug"] if debug else [])],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130 and "capfilt: interrupted" in done.stderr
    assert ("AttributeError" in done.stderr) is debug
    assert (done.stderr.count("\n") == 1) is not debug


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    """Interrupted while it works; what is published by then is whole, and it goes on from there."""
    store = Store(str(tmp_path / "run"))
    command = [sys.executable, "-m", "pipeline", "run", str(ROOT / "configs" / "tiny.yaml")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with (tmp_path / "err").open("w") as errors:
        process = subprocess.Popen(
            [*command, f"run={store.root}"],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        assert "round 0: raw pairs" in first
        deadline = time.monotonic() + 60
        while not any("stage=sources" in name for name in store.record_names()):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # A terminal sends it to the program and to all that it started.
        os.killpg(process.pid, signal.SIGINT)
        process.stdout.read()
        assert process.wait(timeout=60) == 130
    last = (tmp_path / "err").read_text().splitlines()[-1]
    assert last.startswith("capfilt: interrupted; run the same command again")
    assert "Traceback" not in (tmp_path / "err").read_text()
    assert json.loads(Path(store.path("run.json")).read_text())["config"]["seed"] == 0
    done = capfilt("verify", store.url)
    assert done.returncode == 0, done.stdout
