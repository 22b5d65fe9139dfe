"""Real tars, whole, odd and broken."""

import errno
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from stages.ids import sample_id
from stages.training.shards import Shards, stable_image_id
from tests.toy_pairs import png, sample, toy_tar, write_tar


def test_every_text_is_a_pair_of_its_image(tmp_path: Path) -> None:
    web = write_tar(
        tmp_path / "web-000000.tar",
        [sample("a", png("red"), ["red", "a red square"]), sample("b", png("blue"), ["blue"])],
    )
    human = write_tar(
        tmp_path / "human-000000.tar", [sample("c", png("white"), ["white"], "human")]
    )
    shards = Shards([web, human])
    assert shards.texts == ["red", "a red square", "blue", "white"]
    assert shards.image_of_text.tolist() == [0, 0, 1, 2]
    assert shards.is_human.tolist() == [False, False, False, True]
    assert [shards.read(i) for i in range(3)] == [png("red"), png("blue"), png("white")]
    assert shards.image_ids.tolist() == [stable_image_id(sample_id(n)) for n in "abc"]
    assert not shards.skipped


def test_image_ids_fit_an_int64_and_are_never_negative() -> None:
    ids = [stable_image_id(str(number)) for number in range(1000)]
    assert len(set(ids)) == 1000
    assert min(ids) >= 0 and max(ids) < 2**63


def test_all_images_of_assemble_are_known(tmp_path: Path) -> None:
    groups = []
    for number, suffix in enumerate(("png", "jpg", "webp", "JPG")):
        (image, described) = sample(f"{number}", png("red"), ["red"]).items()
        groups.append(
            {f"{image[0].rpartition('.')[0]}.{suffix}": image[1], described[0]: described[1]}
        )
    assert Shards([write_tar(tmp_path / "a.tar", groups)]).images == 4


def test_what_is_broken_is_skipped_and_counted(tmp_path: Path) -> None:
    good = sample("good", png("red"), ["red"])
    bad_texts = {
        "x.png": png("red"),
        "x.json": json.dumps({"sample_id": "x", "texts": [{"text": 3}, "loose", {}]}).encode(),
    }
    members: list[dict[str, bytes]] = [
        good,
        {"no-image.json": b"{}"},
        {"no-json.png": png("red")},
        {"broken.png": png("red"), "broken.json": b"{"},
        {"deep.png": png("red"), "deep.json": b"[" * 100_000},
        {"list.png": png("red"), "list.json": b"[]"},
        bad_texts,
        {"README": b"no suffix"},
        sample("last", png("blue"), ["blue"]),
    ]
    shards = Shards([write_tar(tmp_path / "a.tar", members)])
    assert shards.texts == ["red", "blue"]
    assert shards.read(1) == png("blue")
    assert dict(shards.skipped) == {"sample": 5, "text": 3}


def test_a_name_that_stands_twice_costs_one_member(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as archive:
        for name, data in [*sample("a", png("red"), ["red"]).items()] * 2:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    shards = Shards([tar])
    assert shards.texts == ["red"]
    assert shards.skipped["sample"] == 2


def test_a_tar_that_ends_early_gives_what_is_whole(tmp_path: Path) -> None:
    whole = toy_tar(tmp_path / "whole.tar", images=6)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:5000])
    none = tmp_path / "none.tar"
    none.write_bytes(b"this is no tar" * 100)
    empty = tmp_path / "empty.tar"
    empty.touch()
    shards = Shards([cut, none, empty, whole])
    assert shards.skipped["tar"] >= 2
    assert 6 < shards.images < 12
    assert all(shards.read(i).startswith(b"\x89PNG") for i in range(shards.images))


def test_a_disk_that_fails_is_no_damaged_tar(tmp_path: Path) -> None:
    """One worker alone would train on fewer pairs than the others."""
    tar = toy_tar(tmp_path / "web.tar", images=6)

    class Failing(io.BufferedReader):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() >= 4096:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(size)

    def opened(name: str, mode: str) -> Failing:
        return Failing(io.FileIO(name))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tarfile, "bltn_open", opened)
        with pytest.raises(OSError, match="Input/output error"):
            Shards([tar])
    assert Shards([tar]).images == 6
