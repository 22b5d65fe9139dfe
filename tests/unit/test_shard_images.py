"""The tar of a shard's images (`pipeline.images`), written and read back."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
import webdataset

from pipeline.images import extension, with_images, write_tar
from stages.schemas import DOWNLOAD
from tests.images import jpeg
from tests.tables import filled

PNG, WEBP = b"\x89PNG\r\n\x1a\n rest", b"RIFF....WEBP"


def download() -> pa.Table:
    return filled(
        DOWNLOAD,
        [
            {"row_id": "0", "sample_id": "a", "image": jpeg(0)},
            {"row_id": "1", "sample_id": "b", "status": "timeout"},
            {"row_id": "2", "sample_id": "a"},
            {"row_id": "3", "sample_id": "a", "status": "duplicate_row"},
            {"row_id": "4", "sample_id": "c", "image": PNG},
            {"row_id": "5", "sample_id": "d", "image": WEBP},
            {"row_id": "6", "sample_id": "e", "image": b"something else"},
        ],
        status="success",
    )


def test_a_download_comes_back_as_it_was() -> None:
    table = download()
    stored = table.drop_columns(["image"])
    assert with_images(stored, write_tar(table)).select(DOWNLOAD.names).equals(table)


def test_one_member_an_image_named_by_its_first_bytes() -> None:
    with tarfile.open(fileobj=io.BytesIO(write_tar(download()))) as tar:
        names = [member.name for member in tar]
        assert names == ["a.jpg", "c.png", "d.webp", "e.bin"]
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar} == {(0, 0, 0, "")}


def test_the_bytes_depend_on_the_images_alone() -> None:
    table = download()
    other = table.set_column(
        table.column_names.index("text"), DOWNLOAD.field("text"), pa.array(["x"] * len(table))
    )
    assert write_tar(other) == write_tar(table)
    assert write_tar(table.slice(0, 3)) != write_tar(table)


def test_webdataset_reads_it(tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(write_tar(download()))
    samples = list(webdataset.WebDataset(str(tmp_path / "shard.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == ["a", "c", "d", "e"]
    assert samples[0]["jpg"] == jpeg(0)


def test_a_shard_without_images_is_an_empty_tar() -> None:
    table = filled(DOWNLOAD, [{"sample_id": "b"}], status="dns")
    tar = write_tar(table)
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        assert archive.getnames() == []
    assert with_images(table.drop_columns(["image"]), tar)["image"].to_pylist() == [None]


@pytest.mark.parametrize(
    ("image", "name"), [(jpeg(1), "jpg"), (PNG, "png"), (WEBP, "webp"), (b"", "bin")]
)
def test_extension(image: bytes, name: str) -> None:
    assert extension(image) == name
