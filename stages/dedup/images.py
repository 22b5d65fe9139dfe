"""What is compared: ids and hashes in memory, embeddings in a scratch file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.base import read_table, record_batches
from stages.errors import RunError
from stages.schemas import DOWNLOAD, EMBEDDINGS

Rows = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Matrix = npt.NDArray[np.float32]

_BATCH = 8192
"""Rows of a Parquet file that are in memory at once."""


@dataclass(frozen=True)
class Vectors:
    """(rows, width) float16 in a file. Only the rows that are asked for are ever in memory."""

    file: Path
    rows: int
    width: int

    def read(self, rows: Rows) -> Matrix:
        """The given rows in float32, scaled to length 1: half precision leaves them up to 0.1%
        off. Every row must hold a usable embedding."""
        wide = self._open("r")[rows].astype(np.float32)
        scaled: Matrix = wide / np.linalg.norm(wide, axis=1, keepdims=True)
        return scaled

    def write(self, rows: Rows, values: npt.NDArray[np.float16]) -> None:
        self._open("r+")[rows] = values

    def _open(self, mode: str) -> npt.NDArray[np.float16]:
        if not self.file.exists():
            with self.file.open("wb") as file:
                file.truncate(self.rows * self.width * 2)
        if not self.rows * self.width:  # there is no mapping of nothing
            return np.zeros((self.rows, self.width), np.float16)
        return np.memmap(self.file, np.float16, mode, shape=(self.rows, self.width))  # type: ignore[call-overload, no-any-return]


@dataclass(frozen=True)
class Images:
    """One entry an image, ascending by sample_id."""

    sample_ids: pa.Array
    sha256: pa.Array
    pixels: pa.Array
    """sha256 of the decoded pixels; null where unknown."""
    phash: npt.NDArray[np.uint8]
    """(n, 32): 256 bits; zeros where ``hashed`` is false."""
    hashed: Mask
    vectors: Vectors
    embedded: Mask
    """Which rows of ``vectors`` hold a usable embedding."""
    model: str | None
    """Hash of the embedder; None without embeddings."""

    def __len__(self) -> int:
        return len(self.sample_ids)


def load_images(
    download: Sequence[Path],
    embeddings: Sequence[Path],
    scratch: Path,
    source: Literal["web", "human"] = "web",
) -> Images:
    """The downloaded images of a round from one kind of source, their embeddings in a file below
    ``scratch``.

    Of a sample that two shards hold, the image of the first counts, as in `stages.select`; files
    come in the order of shards.

    Raises:
        RunError: embeddings of different lengths or models, which cannot be compared.
    """
    names = ["sample_id", "source", "status", "sha256", "pixel_sha256", "phash"]
    table = read_table(download, DOWNLOAD, names)
    wanted = pc.and_(pc.equal(table["source"], source), pc.equal(table["status"], "success"))
    hashes = ("sha256", "pixel_sha256", "phash")
    first = pc.ScalarAggregateOptions(skip_nulls=False)
    samples = table.filter(wanted).group_by("sample_id", use_threads=False)
    table = samples.aggregate([(name, "first", first) for name in hashes])
    table = table.sort_by("sample_id").combine_chunks()
    sample_ids, sha256, pixels, phash = (
        table[name].combine_chunks() for name in ("sample_id", *(f"{h}_first" for h in hashes))
    )
    vectors, embedded, model = load_embeddings(embeddings, sample_ids, scratch / f"{source}.f16")
    hashed = np.asarray(phash.is_valid())
    return Images(sample_ids, sha256, pixels, hash_bytes(phash), hashed, vectors, embedded, model)


def hash_bytes(hashes: pa.Array) -> npt.NDArray[np.uint8]:
    """256-bit hashes in hex as (n, 32) bytes; null becomes zeros."""
    hexadecimal = "".join(hashes.fill_null("0" * 64).to_pylist())
    return np.frombuffer(bytes.fromhex(hexadecimal), dtype=np.uint8).reshape(len(hashes), 32)


def load_embeddings(
    files: Sequence[Path], sample_ids: pa.Array, scratch: Path
) -> tuple[Vectors, Mask, str | None]:
    """The vectors of ``sample_ids``, which of them are usable (not failed, zero or NaN), and the
    embedder's hash. Files are read a batch at a time.

    Raises:
        RunError: vectors of different lengths or models, which cannot be compared.
    """
    embedded, seen = (np.zeros(len(sample_ids), dtype=np.bool_) for _ in range(2))
    vectors, models = Vectors(scratch, len(sample_ids), 0), set[str | None]()
    for file in files:
        for batch in _batches(file):
            table = batch.filter(pc.is_in(batch["sample_id"], value_set=sample_ids))
            rows = pc.index_in(table["sample_id"], value_set=sample_ids).to_numpy()
            # Of a sample in two shards the first counts, whatever became of its embedding.
            first = ~seen[rows]
            seen[rows] = True
            wanted = pc.and_(pa.array(first), pc.equal(table["status"], "success"))
            table, rows = table.filter(wanted), rows[np.asarray(wanted)]
            if not len(table):
                continue
            models.update(table["model"].unique().to_pylist())
            block = as_matrix(table["embedding"].combine_chunks(), f"dedup: {file}")
            if vectors.width == 0:
                vectors = Vectors(scratch, len(sample_ids), block.shape[1])
            if len(models) > 1 or block.shape[1] != vectors.width:
                raise RunError(
                    f"dedup: {file}: embeddings of another model or length (models "
                    f"{sorted(map(str, models))}, lengths {vectors.width} and {block.shape[1]}) "
                    "cannot be compared; embed every shard with one model"
                )
            good = usable(block)
            vectors.write(rows[good].astype(np.int64), block[good])
            embedded[rows[good]] = True
    return vectors, embedded, next(iter(models), None)


def _batches(file: Path) -> Iterator[pa.Table]:
    names = ["sample_id", "embedding", "status", "model"]
    kinds = pa.schema([EMBEDDINGS.field(name) for name in names])
    with pq.ParquetFile(file) as parquet:
        for batch in record_batches(parquet, _BATCH, names):
            yield pa.Table.from_batches([batch]).select(names).cast(kinds)


def usable(block: npt.NDArray[np.float16]) -> Mask:
    """Which rows are finite and not zero."""
    norms = np.linalg.norm(block.astype(np.float32), axis=1)
    good: Mask = np.isfinite(norms) & (norms > 0)
    return good


def as_matrix(column: pa.Array, where: str) -> npt.NDArray[np.float16]:
    """A list column as (n, d). Raises `RunError` where its lists differ in length or are empty."""
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) != 1 or not lengths[0]:
        raise RunError(f"{where}: embeddings of different lengths {lengths} in one file")
    flat: npt.NDArray[np.float16] = column.flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float16, copy=False).reshape(len(column), lengths[0])
