"""The engine on a real local Ray: streaming, crashes, resumption, placement."""

import functools
import os
import signal

import pytest
import ray
from ray.exceptions import WorkerCrashedError

from pipeline.config import EngineConfig
from pipeline.dag import plan_shards
from pipeline.engine import data
from pipeline.engine.attempts import ATTEMPTS, gathered
from pipeline.engine.cluster import connected
from pipeline.engine.data import run_shards
from pipeline.engine.shard import load
from pipeline.store import Store
from stages.errors import CheckpointError, RunError, StoreError
from stages.removed import Removed
from tests.integration.fakes import (
    PNG,
    Fake,
    FakeTask,
    MeetingTask,
    Slow,
    Unsteady,
    make_shards,
    run,
    statuses,
)


def own_end(number: int, frame: object) -> None:
    """What the driver does at SIGTERM."""


@pytest.fixture(scope="module")
def board(request, tmp_path_factory):
    before = signal.signal(signal.SIGTERM, own_end)
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, before))
    with connected(EngineConfig(cpus=2), tmp_path_factory.mktemp("log") / "ray.log") as board:
        yield board


def test_the_driver_ends_in_its_own_way(board):
    """Ray's leaves without a word, and with another exit code."""
    assert signal.getsignal(signal.SIGTERM) is own_end


def test_more_operators_than_cpus_do_not_hang(tmp_path, board):
    store = Store(str(tmp_path))
    shards = make_shards(store, [[f"s{n}-{i}" for i in range(3)] for n in range(4)])
    tasks = [FakeTask(name, 1, Fake(cpus=1)) for name in ("download", "caption", "embed")]
    ray.get(board.take.remote())  # what other tests have told
    records = run(store, shards, board, tasks)
    published = store.record_names()
    told = [(stage, shard) for stage, shard, _ in ray.get(board.take.remote()).ended]
    assert sorted(told) == sorted((task.name, shard) for task in tasks for shard in shards)
    assert ray.get(board.take.remote()).ended == []
    assert all(name in published for shard in records.values() for name in shard.values())
    assert load(records["000003"]["download"], store)["image"].to_pylist() == [PNG] * 3


def test_a_deadly_and_a_broken_row_are_quarantined_and_the_run_goes_on(tmp_path, board):
    store = Store(str(tmp_path))
    samples = [["a", "deadly", "b", "c"], ["d", "e"], ["f", "broken"]]
    shards = make_shards(store, samples)
    tasks = [FakeTask("download", 1, Fake()), FakeTask("caption", 1, Fake())]
    ray.get(board.take.remote())  # what other tests have told
    records = run(store, shards, board, tasks)
    told = [(stage, shard) for stage, shard, _ in ray.get(board.take.remote()).ended]
    # A shard that was run alone is told as well, and once.
    assert sorted(told) == sorted((task.name, shard) for task in tasks for shard in shards)
    assert statuses(store, records) == {
        "a": "success",
        "deadly": "quarantined",
        "b": "success",
        "c": "success",
    }
    assert statuses(store, records, "000001") == {"d": "success", "e": "success"}
    assert statuses(store, records, "000002") == {"f": "success", "broken": "quarantined"}
    detail = load(records["000002"]["caption"], store)["detail"].to_pylist()[1]
    assert "cannot caption broken" in detail
    for shard in ("000000", "000001", "000002"):
        assert store.read_record(records[shard]["caption"]).details["batch_size"] == "1"


def test_only_what_has_no_record_is_done_again(tmp_path, board):
    store = Store(str(tmp_path / "run"))
    marks = tmp_path / "marks"
    marks.mkdir()
    shards = make_shards(store, [["a"], ["b"], ["c"]])
    several = Fake(cpus=0.5, replicas=2)
    tasks = [FakeTask("download", 1, several), FakeTask("caption", 1, Fake(marks=str(marks)))]
    records = run(store, shards, board, tasks)
    assert len(list(marks.iterdir())) == 3
    downloads = [store.read_record(each["download"]) for each in records.values()]
    # Both replicas ask the same.
    assert {record.details["asked"] for record in downloads} == {"1", "2", "3"}
    run(store, shards, board, tasks)
    assert len(list(marks.iterdir())) == 3
    store.remove(records["000001"]["caption"])
    run(store, shards, board, tasks)
    again = sorted(mark.name.partition("-")[0] for mark in marks.iterdir())
    assert again == ["a", "b", "b", "c"]


def test_actors_start_beside_each_other(tmp_path, board):
    store, marks = Store(str(tmp_path / "run")), tmp_path / "marks"
    marks.mkdir()
    shards = make_shards(store, [[f"s{n}"] for n in range(24)])
    told = Fake(marks=str(marks))
    run(store, shards, board, [MeetingTask("download", 1, told, weights=str(os.getpid()))])
    assert len(list(marks.glob("start-*"))) >= 3
    assert not (marks / "alone").exists()


def test_an_error_of_the_user_stops_the_run_as_itself(tmp_path, board):
    store = Store(str(tmp_path))
    shards = make_shards(store, [["a"]])
    tasks = [FakeTask("download", 1, Fake()), FakeTask("caption", 1, Fake(), weights="none")]
    with pytest.raises(CheckpointError, match="not a BLIP captioner"):
        run(store, shards, board, tasks)


def test_an_error_of_the_user_ends_a_long_pass_at_once(tmp_path, board):
    store, marks = Store(str(tmp_path / "run")), tmp_path / "marks"
    marks.mkdir()
    shards = make_shards(store, [[f"s{n}"] for n in range(200)])
    # Every download says so by a mark, of which one a shard would be 200.
    download = Slow("download", 1, Fake(cpus=0.5, marks=str(marks)))
    caption = FakeTask("caption", 1, Fake(cpus=0.5, marks=str(marks)), weights="none")
    tasks = [download, caption]
    with pytest.raises(CheckpointError, match="not a BLIP captioner"):
        run(store, shards, board, tasks)
    assert len(list(marks.iterdir())) < 100


def test_a_store_that_fails_for_a_while_is_asked_again(tmp_path, board, monkeypatch):
    monkeypatch.setattr(data, "_STORE_PAUSES", (0.0,))
    store = Store(str(tmp_path / "run"))
    shards = make_shards(store, [["a"], ["b"], ["c"]])
    tasks = [FakeTask("download", 1, Fake()), Unsteady("caption", 1, Fake(marks=str(tmp_path)))]
    records = run(store, shards, board, tasks)
    for shard, sample in zip(records, "abc", strict=True):
        assert statuses(store, records, shard) == {sample: "success"}
    assert (tmp_path / "failed").exists()


def test_more_shards_than_a_pass_takes_are_done_in_several(tmp_path, board, monkeypatch):
    monkeypatch.setattr(data, "_SHARDS_A_PASS", 2)
    store, passes = Store(str(tmp_path / "run")), []
    shards = make_shards(store, [["a"], ["broken"], ["b"], ["c", "deadly"], ["d"]])
    one_pass = data._one_pass
    monkeypatch.setattr(
        data, "_one_pass", lambda *given: passes.append(len(given[2])) or one_pass(*given)
    )
    tasks = [FakeTask("download", 1, Fake()), FakeTask("caption", 1, Fake())]
    records = run(store, shards, board, tasks)
    assert max(passes) == 2 and sum(passes) >= 5
    assert statuses(store, records, "000001") == {"broken": "quarantined"}
    assert statuses(store, records, "000003") == {"c": "success", "deadly": "quarantined"}
    assert statuses(store, records, "000004") == {"d": "success"}


@pytest.mark.parametrize("good", [0, 1, 3])
def test_a_store_that_the_driver_cannot_read_is_asked_again(tmp_path, board, monkeypatch, good):
    """As when it fails for all: the driver's own listing, after ``good`` of them, meets it too."""
    monkeypatch.setattr(data, "_STORE_PAUSES", (0.0, 0.0))
    store, listed = Store(str(tmp_path / "run")), []
    shards = make_shards(store, [["a"], ["b"]])
    tasks = [FakeTask("download", 1, Fake())]

    def plan():
        listed.append(len(listed))
        if good <= listed[-1] < good + 2:
            raise StoreError("the store is away")
        return plan_shards(tasks, shards, store.record_names(), {})

    run_shards(store, tasks, plan, board)
    assert sum("/stage=download/" in name for name in store.record_names()) == 2


def test_a_store_that_goes_on_failing_ends_the_run_as_itself(tmp_path, board, monkeypatch):
    monkeypatch.setattr(data, "_STORE_PAUSES", (0.0, 0.0))
    store = Store(str(tmp_path / "run"))
    shards = make_shards(store, [["a"], ["b"]])
    tasks = [Unsteady("download", 1, Fake(marks=str(tmp_path / "nowhere")))]
    with pytest.raises(StoreError, match="the store is away"):
        run(store, shards, board, tasks)


@pytest.mark.parametrize("deaths", [2, 3])
def test_a_task_that_dies_is_started_again_but_not_for_ever(tmp_path, board, deaths):
    @ray.remote(max_retries=0)
    def die(number: int) -> int:
        (tmp_path / f"{number}-{os.getpid()}").touch()
        if number == 1 and len(list(tmp_path.glob("1-*"))) <= deaths:
            os._exit(7)
        return number

    submits = [functools.partial(die.remote, number) for number in range(3)]
    if deaths < ATTEMPTS:
        assert gathered(submits) == [0, 1, 2]
    else:
        with pytest.raises(WorkerCrashedError):
            gathered(submits)
    assert len(list(tmp_path.glob("1-*"))) == ATTEMPTS
    assert len(list(tmp_path.glob("0-*"))) == len(list(tmp_path.glob("2-*"))) == 1


def test_a_lack_of_memory_is_not_blamed_on_the_rows(tmp_path, board):
    store = Store(str(tmp_path))
    shards = make_shards(store, [["a", "hungry"]])
    tasks = [FakeTask("download", 1, Fake()), FakeTask("caption", 1, Fake())]
    with pytest.raises(RunError, match="stage caption: MemoryError: no memory for hungry"):
        run(store, shards, board, tasks)
    assert [name for name in store.record_names() if "caption" in name] == []


def test_what_a_lost_worker_has_published_is_not_done_again(tmp_path, board):
    """Ray gives a worker again what another one had published when it, or its node, was lost."""
    store, marks = Store(str(tmp_path / "run")), tmp_path / "marks"
    marks.mkdir()
    shards = make_shards(store, [["a", "b"]])
    download = FakeTask("download", 1, Fake())
    caption = FakeTask("caption", 1, Fake(marks=str(marks)))
    run(store, shards, board, [download])
    (job,) = plan_shards([download, caption], shards, store.record_names(), {})
    ray.get(board.reset.remote())
    ray.get(board.forget.remote())
    row = data._pack(job, {})
    told = data.Pass(store, ("caption",), board, Removed())
    done = [data.StageWorker(caption, told)(row) for _ in range(2)]
    assert done[0] == done[1] and data._unpack(done[1]) is not None
    assert len(list(marks.iterdir())) == 1, "captioned again"
    assert ray.get(board.read.remote()).done == {"caption": 1}
    # A worker that was lost before it said so is counted for.
    ray.get(board.reset.remote())
    ray.get(board.forget.remote())
    ray.get(board.begin.remote("caption", job.shard))
    assert data.StageWorker(caption, told)(row) == done[0]
    assert len(list(marks.iterdir())) == 1
    notices = ray.get(board.read.remote())
    assert notices.done == {"caption": 1} and notices.counts == {"caption": {"success": 2}}
