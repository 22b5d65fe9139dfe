"""The training set of a round: kept texts with their images, as WebDataset tars and an index."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from stages.base import Context, DatasetStage, WholeRoundConfig, read_table
from stages.errors import RunError
from stages.schemas import PAIRS, TRAINING_INDEX

KINDS = ("web", "human")
"""Two sets of tars: web images with their web and synthetic texts, and human-annotated pairs."""

_COLUMNS = ("pair_id", "sample_id", "source", "text", "itm_score", "state", "carried_by", "shard")

Row = dict[str, Any]


class AssembleConfig(WholeRoundConfig):
    """How the training set is cut."""

    samples_per_tar: int = Field(1000, ge=1)
    """Images a tar; the order of training follows from it."""


class AssembleStage(DatasetStage):
    """Inputs ``pairs`` (PAIRS, one file) and ``images``, one tar a shard, in the order of
    ``shards``, with a member ``<sample_id>.<ext>`` an image.

    Writes ``web-000000.tar`` …, ``human-000000.tar`` … and ``index.parquet`` (TRAINING_INDEX). A
    sample of a tar has the members ``<sample_id>.<ext>`` and ``<sample_id>.json``::

        {"sample_id": …, "texts": [{"text": …, "source": …, "pair_id": …, "origin": …}, …]}

    where ``origin`` is the sample that a merged text was found with. The bytes of a tar depend on
    the pairs and images alone. One shard is open at a time.

    Raises:
        RunError: the image of a kept or merged pair is not where its pair says.
    """

    name = "assemble"
    version = 1

    def __init__(self, config: AssembleConfig, shards: Sequence[str]) -> None:
        self.config = config
        self.shards = tuple(shards)

    def run(self, inputs: Mapping[str, Sequence[Path]], output_dir: Path, ctx: Context) -> None:
        pairs = carried_pairs(inputs["pairs"])
        _check_shards(pairs, self.shards)
        tars = {kind: _Tars(output_dir, kind, self.config.samples_per_tar) for kind in KINDS}
        with pq.ParquetWriter(output_dir / "index.parquet", TRAINING_INDEX) as index:
            for done, (shard, tar) in enumerate(zip(self.shards, inputs["images"], strict=True)):
                ctx.progress("assembling shards", done, len(self.shards))
                here = pairs.filter(pc.equal(pairs["carrier_shard"], shard))
                if len(here):
                    rows = list(_write_shard(here, shard, tar, tars))
                    index.write_table(pa.Table.from_pylist(rows, schema=TRAINING_INDEX))
        for writer in tars.values():
            writer.close()


def carried_pairs(files: Sequence[Path]) -> pa.Table:
    """Kept and merged pairs with ``carrier``, the sample whose image they are trained with, and
    ``carrier_shard``, where that image lies; ordered by carrier, its own texts first."""
    pairs = read_table(files, PAIRS, _COLUMNS)
    pairs = pairs.filter(pc.is_in(pairs["state"], value_set=pa.array(["kept", "merged"])))
    carrier = pc.coalesce(pairs["carried_by"], pairs["sample_id"])
    # A survivor always keeps a pair of its own, so each carrier is found among the kept.
    kept = pairs.filter(pc.equal(pairs["state"], "kept"))
    position = pc.index_in(carrier, value_set=kept["sample_id"].combine_chunks())
    pairs = pairs.append_column("carrier", carrier)
    pairs = pairs.append_column("carrier_shard", kept["shard"].take(position))
    return pairs.sort_by(
        [(name, "ascending") for name in ("carrier", "state", "sample_id", "source", "pair_id")]
    )


def _check_shards(pairs: pa.Table, shards: Sequence[str]) -> None:
    known = pc.is_in(pairs["carrier_shard"], value_set=pa.array(shards, pa.string()))
    for lost in pairs.filter(pc.invert(known)).slice(0, 1).to_pylist():
        raise RunError(
            f"assemble: pair {lost['pair_id']}: its image, of sample {lost['carrier']}, lies in "
            f"shard {lost['carrier_shard']}, none of the {len(shards)} given; run select again"
        )


def _write_shard(
    pairs: pa.Table, shard: str, tar: Path, tars: Mapping[str, _Tars]
) -> Iterator[Row]:
    """Write one shard's samples in the order of its images; yields their rows of the index."""
    waiting: dict[str, dict[str, list[Row]]] = {}
    for pair in pairs.to_pylist():
        kind = "human" if pair["source"] == "human" else "web"
        waiting.setdefault(pair["carrier"], {}).setdefault(kind, []).append(pair)
    for sample, extension, image in read_images(tar):
        for kind, texts in waiting.pop(sample, {}).items():
            name = tars[kind].write(sample, extension, image, texts)
            for pair in texts:
                origin = {"sample_id": sample, "origin": pair["sample_id"]}
                yield pair | origin | {"tar": name, "key": sample}
    if waiting:
        raise RunError(
            f"assemble: {tar}: no image of sample {min(waiting)} (and {len(waiting) - 1} others), "
            f"which has kept pairs in shard {shard}; run `capfilt verify`"
        )


def read_images(tar: Path) -> Iterator[tuple[str, str, bytes]]:
    """(sample_id, extension, bytes) of each image of a shard's tar, one at a time."""
    with tarfile.open(tar) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                sample, _, extension = member.name.partition(".")
                yield sample, extension, file.read()


class _Tars:
    """Tars ``<prefix>-000000.tar`` … of at most ``samples`` samples; none where none is written."""

    def __init__(self, folder: Path, prefix: str, samples: int) -> None:
        self._folder, self._prefix, self._samples = folder, prefix, samples
        self._written = 0
        self._tar: tarfile.TarFile | None = None

    def write(self, sample: str, extension: str, image: bytes, pairs: Sequence[Row]) -> str:
        """Add one sample; returns the name of its tar."""
        name = f"{self._prefix}-{self._written // self._samples:06d}.tar"
        if self._tar is None or self._written % self._samples == 0:
            self.close()
            path = self._folder / name
            self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        texts = [
            {name: pair[name] for name in ("text", "source", "pair_id")}
            | {"origin": pair["sample_id"]}
            for pair in pairs
        ]
        described = json.dumps({"sample_id": sample, "texts": texts}, ensure_ascii=False)
        for suffix, data in ((extension, image), ("json", described.encode())):
            # A fresh TarInfo has no owner and the time 0: nothing of this moment is written.
            member = tarfile.TarInfo(f"{sample}.{suffix}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))
        self._written += 1
        return name

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None
