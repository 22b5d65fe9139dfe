"""Images in files and in tars."""

import math
import time
from pathlib import Path

import pytest

from stages import media
from tests.s3 import use_endpoint
from tests.unit.test_readers import tar


def test_names_of_files_and_members() -> None:
    assert media.split_name("/data/a#b.jpg") == ("/data/a#b.jpg", None)
    assert media.split_name("s3://x/a.tar#d/1#2.jpg") == ("s3://x/a.tar", "d/1#2.jpg")
    name = media.member_name("a.tar.gz", "0.jpg")
    assert media.split_name(name) == ("a.tar.gz", "0.jpg")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_members_and_files_are_read_once_each(tmp_path: Path, suffix: str) -> None:
    archive = str(tar(tmp_path / f"a.{suffix}", {"0.jpg": b"zero", "1.jpg": b"one" * 99}))
    (tmp_path / "x.png").write_bytes(b"file")
    names = [f"{archive}#1.jpg", str(tmp_path / "x.png"), f"{archive}#0.jpg", f"{archive}#1.jpg"]
    found = dict(media.read_many(names, max_bytes=10))
    assert found[f"{archive}#0.jpg"] == b"zero"
    assert found[str(tmp_path / "x.png")] == b"file"
    assert found[f"{archive}#1.jpg"] == (b"one" * 99)[:11]  # one byte more shows it is too large
    assert len(list(media.read_many(names))) == 3


def test_what_cannot_be_read_says_why_and_spoils_nothing_else(tmp_path: Path) -> None:
    good = str(tar(tmp_path / "good.tar", {"0.jpg": b"zero"}))
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    names = [f"{good}#gone.jpg", f"{good}#0.jpg", f"{tmp_path}/bad.tar#0.jpg", f"{tmp_path}/no.jpg"]
    found = dict(media.read_many(names))
    assert found[f"{good}#0.jpg"] == b"zero"
    for name in (names[0], *names[2:]):
        assert isinstance(found[name], OSError), name
    assert "gone.jpg" in str(found[names[0]])


def test_a_store_that_does_not_answer_is_a_problem_of_its_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What botocore raises then derives from Exception alone."""
    (tmp_path / "a.png").write_bytes(b"image")
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    gone = ["s3://bucket/a.png", "s3://bucket/a.tar#0.jpg"]
    found = dict(media.read_many([gone[0], str(tmp_path / "a.png"), gone[1]]))
    assert found[str(tmp_path / "a.png")] == b"image"
    for name in gone:
        assert type(found[name]) is OSError, name
        assert "127.0.0.1:9" in str(found[name])


def test_what_is_no_problem_of_a_file_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no-such-protocol"):
        list(media.read_many(["no-such-protocol://a.png"]))


def test_after_the_deadline_nothing_more_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = str(tar(tmp_path / "a.tar", {f"{n}.jpg": b"image" for n in range(4)}))
    other = str(tar(tmp_path / "b.tar", {"0.jpg": b"image"}))
    members = [f"{archive}#{n}.jpg" for n in range(4)]
    found = media.read_many([*members, f"{other}#0.jpg"], deadline=time.monotonic() + 3600)
    assert [next(found), next(found)] == [(name, b"image") for name in members[:2]]
    monkeypatch.setattr(time, "monotonic", lambda: math.inf)
    late = dict(found)
    assert late.keys() == {*members[2:], f"{other}#0.jpg"}
    assert all(isinstance(problem, TimeoutError) for problem in late.values())
