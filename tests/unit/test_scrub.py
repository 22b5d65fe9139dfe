"""Samples taken out of the files of a small finished run."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.cli import main
from pipeline.forget import forget
from pipeline.lease import current, held
from pipeline.records import Record
from pipeline.runfolder import read_rounds, tables
from pipeline.scrub import Scrubbed, scrub
from pipeline.sources import known_shards
from pipeline.store import Store
from pipeline.verify import verify
from stages.errors import LeaseHeldError
from stages.ids import sample_id
from stages.schemas import PAIRS, TEXTS, TRAINING_INDEX
from stages.scrub import scrub_shared_texts, scrub_table
from tests.run_folder import make_run, publish_download
from tests.s3 import s3_bucket
from tests.tables import filled

CAT = sample_id("cat")
BOAT = sample_id("boat")
TOLD: list[str] = []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as its last round left it; tests take a copy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    make_run(str(folder))
    return folder


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Store:
    return Store(str(shutil.copytree(finished, tmp_path / "run")))


def everything(store: Store) -> dict[str, bytes]:
    """Every file of the run but leases; Parquet as the text of its rows."""
    found = {}
    for path in store.files():
        data = store.read_bytes(path)
        if path.endswith(".parquet"):
            with store.fs.open(store.path(path), "rb") as file:
                data = str(pq.read_table(file).to_pylist()).encode()
        found[path] = data
    return {path: data for path, data in found.items() if not path.startswith("leases/")}


def holding(store: Store, *needles: bytes) -> set[str]:
    """Files in which one of the needles stands, tombstones aside."""
    return {
        path
        for path, data in everything(store).items()
        if not path.startswith("tombstones/") and any(needle in data for needle in needles)
    }


def image_of(store: Store, sample: str) -> bytes:
    """The bytes of a sample's image, out of the tar that has it."""
    for name in sorted(store.record_names()):
        for payload in store.read_record(name).payloads:
            if payload.path.startswith("images/"):
                with tarfile.open(store.local_copy(payload.path)) as tar:
                    for member in tar:
                        file = tar.extractfile(member)
                        if member.name.startswith(sample) and file is not None:
                            return file.read()
    raise AssertionError(f"no image of {sample}")


def records(store: Store) -> dict[str, Record]:
    return {name: store.read_record(name) for name in store.record_names()}


def needles(store: Store) -> tuple[bytes, ...]:
    """What must not be found once the cat and the boat are scrubbed."""
    return (
        image_of(store, CAT),
        image_of(store, BOAT),
        b"http://web.test/cat",
        b"a cat",
        b"a photo of cat",
        b"a boat on a lake",
    )


def test_nothing_of_the_samples_is_left_and_nothing_else_is_lost(store: Store) -> None:
    sought, before = needles(store), records(store)
    assert holding(store, *sought)
    forget(store, "id", [CAT, BOAT])
    done = scrub(store, TOLD.append)
    assert done.rewritten > 10
    assert done.deleted == done.rewritten
    assert holding(store, *sought) == set()
    assert verify(store).problems == []
    after = records(store)
    lease = current(store)
    assert lease is not None
    assert set(after) == {*before, *(name for name in after if "/stage=forget/" in name)}
    for name, record in before.items():
        now = after[name]
        assert (now.fingerprint, now.started, now.shard) == (
            record.fingerprint,
            record.started,
            record.shard,
        )
        for old, new in zip(record.payloads, now.payloads, strict=True):
            assert (old == new) or (new.first_sha256 == old.sha256 != new.sha256)
        assert ("scrubbed" in now.details) == (now.payloads != record.payloads)
        assert now.token == (record.token if now.payloads == record.payloads else lease.token)
    # The others' images and texts are all there.
    tree = image_of(store, sample_id("tree"))
    held_by = {path.partition("/")[0] for path in holding(store, tree)}
    assert held_by == {"images", "round=00", "round=01"}


def test_an_image_that_came_after_its_hash_was_forgotten_is_taken_out(store: Store) -> None:
    forget(store, "hash", ["f" * 64])
    publish_download(store, "000003", "f" * 64, "late")
    sought = image_of(store, sample_id("late")), b"a picture of late"
    assert holding(store, *sought)
    scrub(store, TOLD.append)
    assert holding(store, *sought) == set()


def test_the_ledger_of_finished_rounds_says_removed(store: Store) -> None:
    forget(store, "id", [CAT, BOAT])
    scrub(store, TOLD.append)
    for round_ in read_rounds(store):
        (ledger,) = (
            store.read_table(one.payload)
            for one in tables(store.read_record(round_.records["ledger"][0]))
            if one.table == "ledger"
        )
        removed = [row for row in ledger.to_pylist() if row["state"] == "removed"]
        assert {(row["account"], row["source"], row["count"]) for row in removed} == {
            ("rows", "web", 2),  # the cat and its repeated row
            ("rows", "human", 1),
        }


def test_doing_it_twice_changes_nothing(store: Store) -> None:
    forget(store, "id", [CAT])
    seen_by = forget(store, "id", [CAT]).seen_by
    scrub(store, TOLD.append)
    before = everything(store)
    assert scrub(store, TOLD.append) == Scrubbed(0, 0)
    assert everything(store) == before
    assert forget(store, "id", [CAT]).seen_by == seen_by != ()


def test_sources_keep_the_names_of_their_shards(store: Store) -> None:
    """Or the next run would download all of a scrubbed shard again."""
    forget(store, "id", [CAT, BOAT])
    scrub(store, TOLD.append)
    changed = 0
    for record in records(store).values():
        if record.stage == "sources":
            (payload,) = record.payloads
            (ingested,) = (
                other
                for other in records(store).values()
                if other.stage == "ingest" and other.payloads == (payload,)
            )
            changed += payload.first_sha256 is not None
            kind = {"kind": "web"}
            linked = ingested.model_copy(update={"details": ingested.details | kind})
            ((_, name),) = known_shards([linked]).values()
            assert (
                name.rpartition("-")[2] == f"{(payload.first_sha256 or payload.sha256)[:16]}.json"
            )
    assert changed == 3


class Killed(BaseException):
    """As SIGKILL would end the process between two writes."""


class Dying(Store):
    """A store whose process dies at the n-th write or removal."""

    left = 0

    def _one_more(self) -> None:
        type(self).left -= 1
        if type(self).left < 0:
            raise Killed

    def write_bytes(self, relative: str, data: bytes) -> None:
        if not relative.startswith("leases/"):
            self._one_more()
        super().write_bytes(relative, data)

    def remove(self, relative: str) -> None:
        self._one_more()
        super().remove(relative)

    def fenced(self, token: int) -> Store:
        return Dying(self.url, token)


def test_a_kill_anywhere_is_healed_by_a_second_call(
    store: Store, finished: Path, tmp_path: Path
) -> None:
    sought = needles(store)
    forget(store, "id", [CAT, BOAT])
    done = scrub(store, TOLD.append)
    files = len(everything(store))
    writes = done.rewritten + done.deleted
    for left in (1, writes // 4, writes // 2, writes - 3):
        url = str(shutil.copytree(finished, tmp_path / f"killed{left}"))
        forget(Store(url), "id", [CAT, BOAT])
        Dying.left = left
        with pytest.raises(Killed):
            scrub(Dying(url), TOLD.append)
        killed = Store(url)
        scrub(killed, TOLD.append)
        assert verify(killed).problems == [], left
        assert holding(killed, *sought) == set()
        assert len(everything(killed)) == files


def test_what_killed_attempts_left_goes_too(store: Store) -> None:
    image = image_of(store, CAT)
    store.write_bytes("images/shard=000000/attempt.tar", b"tar with " + image)
    store.write_bytes("report.html", b"page with " + image)
    store.write_bytes("scratch/checkpoints/med/state.pt", b"state")
    forget(store, "id", [CAT])
    scrub(store, TOLD.append)
    assert holding(store, image) == set()
    assert store.exists("scratch/checkpoints/med/state.pt")
    assert verify(store).scratch_files == 1


def test_no_run_may_be_under_way(store: Store) -> None:
    before = everything(store)
    with held(store, TOLD.append), pytest.raises(LeaseHeldError):
        scrub(store, TOLD.append)
    assert everything(store) == before


def test_carried_texts_leave_with_their_carrier_and_their_origin() -> None:
    """The survivor `b` carries a text of `a`; the survivor `c` carries one of `d`."""
    pairs = filled(
        PAIRS,
        [
            {"pair_id": "1", "sample_id": "a", "state": "merged", "carried_by": "b"},
            {"pair_id": "2", "sample_id": "b", "state": "kept"},
            {"pair_id": "3", "sample_id": "c", "state": "kept"},
            {"pair_id": "4", "sample_id": "d", "state": "merged", "carried_by": "c"},
            {"pair_id": "5", "sample_id": "d", "state": "duplicate", "carried_by": "c"},
        ],
        source="web",
        text="t",
    )
    left = scrub_table("pairs", pairs, frozenset({"a", "c"})).to_pylist()
    assert [(row["pair_id"], row["state"], row["carried_by"]) for row in left] == [
        ("2", "kept", None),
        ("4", "removed", None),
        ("5", "duplicate", "c"),
    ]
    index = filled(
        TRAINING_INDEX,
        [
            {"pair_id": "1", "sample_id": "b", "origin": "a"},
            {"pair_id": "2", "sample_id": "b", "origin": "b"},
            {"pair_id": "3", "sample_id": "c", "origin": "c"},
            {"pair_id": "4", "sample_id": "c", "origin": "d"},
        ],
    )
    kept = scrub_table("index", index, frozenset({"a", "c"}))
    assert kept["pair_id"].to_pylist() == ["2"]
    texts = filled(TEXTS, [{"text": "t"}, {"text": "other"}], source="web")
    assert scrub_shared_texts(texts, pairs, frozenset({"a"}))["text"].to_pylist() == ["other"]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_bucket(patch) as url:
        yield url


def test_on_an_object_store(s3: str) -> None:
    store = make_run(f"{s3}/run")
    sought = needles(store)
    assert any(store.cache.rglob("*.tar"))
    forget(store, "id", [CAT, BOAT])
    scrub(store, TOLD.append)
    assert holding(store, *sought) == set()
    assert verify(store).problems == []
    cached = b"".join(file.read_bytes() for file in store.cache.rglob("*.tar"))
    assert sought[0] not in cached


def test_the_command(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ids.txt").write_text(CAT)
    command = ["forget", store.url, "--ids", str(tmp_path / "ids.txt"), "--scrub"]
    assert main(command) == 0
    assert "files written anew" in capsys.readouterr().out
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "all were forgotten before" in out
    assert "0 files written anew, 0 deleted" in out
    assert "had seen them: round=00/models/" in out
    assert json.loads(store.read_bytes("run.json"))["config"]
