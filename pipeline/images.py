"""The WebDataset tar of a shard's images, written beside its download Parquet."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping

import pyarrow as pa

from stages.schemas import DOWNLOAD

_EXTENSIONS = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"RIFF": "webp"}


def write_tar(download: pa.Table) -> bytes:
    """The images of a download table as tar: one ``<sample_id>.<ext>`` an image, in row order.

    The bytes depend on the images alone: no time, owner or mode leaks in.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        # One image at a time: a worker holds the shard's images often enough.
        for sample, found in zip(download["sample_id"], download["image"], strict=True):
            image = found.as_py()
            if image is None:
                continue
            member = tarfile.TarInfo(f"{sample.as_py()}.{extension(image)}")
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))
    return buffer.getvalue()


def extension(image: bytes) -> str:
    """File extension by the first bytes of an image that download wrote."""
    for magic, name in _EXTENSIONS.items():
        if image.startswith(magic):
            return name
    return "bin"


def with_images(download: pa.Table, tar: bytes) -> pa.Table:
    """A download table read back from Parquet, its ``image`` column filled from the tar.

    The first row of a sample holds its image, as download left it.
    """
    left: dict[str, bytes] = dict(_members(tar))
    images = [
        left.pop(sample, None) if status == "success" else None
        for sample, status in zip(
            download["sample_id"].to_pylist(), download["status"].to_pylist(), strict=True
        )
    ]
    column = pa.array(images, DOWNLOAD.field("image").type)
    return download.append_column(DOWNLOAD.field("image"), column)


def _members(tar: bytes) -> Mapping[str, bytes]:
    found = {}
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                found[member.name.partition(".")[0]] = file.read()
    return found
