"""Images that show a picture of an evaluation set: whoever trains on them measures memory."""

from __future__ import annotations

import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages import media
from stages.base import Context, read_table
from stages.dedup.config import DedupConfig
from stages.dedup.hashes import indexed
from stages.dedup.images import Images, Mask, Matrix, Rows, as_matrix, hash_bytes, usable
from stages.dedup.ties import above
from stages.errors import ConfigError, RunError, SourceError
from stages.ingest import find_files
from stages.models.images import decode
from stages.schemas import CONTAMINATED, DOWNLOAD

if TYPE_CHECKING:
    from stages.keeper import ImageConfig

_BATCH = 64
_BLOCK = 2048
_NEEDED = "give a folder or tar of images, or Parquet with a column `embedding`"


@dataclass(frozen=True)
class Evaluation:
    """The pictures of evaluation sets, one entry each."""

    names: tuple[str, ...]
    """``<set>/<file>``, or ``<set>/<row>`` of an embedding file."""
    sha256: tuple[str | None, ...]
    pixels: tuple[str | None, ...]
    phash: npt.NDArray[np.uint8]
    """(n, 32); zeros where ``hashed`` is false."""
    hashed: Mask
    vectors: Matrix
    """(n, d) of length 1; zeros where ``embedded`` is false."""
    embedded: Mask


def read_evaluation(
    sets: Mapping[str, Path], embedder: Path | None, config: ImageConfig, width: int
) -> Evaluation:
    """The pictures of the named sets; ``width`` is the length of the run's embeddings, 0 for none.

    A file that is no image is passed over: whoever measures on it finds out.

    Raises:
        SourceError: a set has no picture in it.
        RunError: embeddings of another length than the run's.
    """
    from stages.keeper import ImageKeeper

    # However small or long a picture is, the training set may hold a larger copy of it.
    keeper = ImageKeeper(config.model_copy(update={"min_image_size": 1, "max_aspect_ratio": inf}))
    rows: list[tuple[str, str | None, str | None, str | None]] = []
    vectors: list[Matrix] = []
    for name, path in sets.items():
        before = len(rows)
        if path.suffix == ".parquet":
            block = _stored(path, width)
            rows += [(f"{name}/{number}", None, None, None) for number in range(len(block))]
            vectors.append(block)
        else:
            kept = []
            for file, data in _files(path):
                outcome = keeper(data)
                if outcome.status == "success" and outcome.image is not None:
                    rows.append(
                        (f"{name}/{file}", outcome.sha256, outcome.pixel_sha256, outcome.phash)
                    )
                    kept.append(outcome.image)
            vectors.append(_embedded(kept, embedder, width, path))
        if len(rows) == before:
            raise SourceError(f"dedup.evaluation: {path}: no picture in it; {_NEEDED}")
    names, sha256, pixels, phash = zip(*rows, strict=True) if rows else ((), (), (), ())
    hashes = pa.array(phash, pa.string())
    every = np.concatenate([np.zeros((0, width), np.float32), *vectors])
    return Evaluation(
        names,
        sha256,
        pixels,
        hash_bytes(hashes),
        np.asarray(hashes.is_valid()),
        every,
        np.asarray(every.any(axis=1)),
    )


def check_evaluation(path: Path) -> None:
    """Raises SourceError: not there, or nothing in it that `read_evaluation` reads."""
    if not path.exists():
        raise SourceError(f"{path}: not there; {_NEEDED}")
    try:
        if path.suffix == ".parquet":
            table = pq.read_metadata(path)
            found = table.num_rows > 0 and "embedding" in table.schema.to_arrow_schema().names
        elif path.is_dir():
            found = bool(image_files(path))
        else:
            found = any(media.is_image(member.name) for _, member in media.tar_members(str(path)))
    except (OSError, EOFError, tarfile.TarError, zlib.error, pa.ArrowInvalid) as error:
        raise SourceError(f"{path}: cannot be read: {error}; {_NEEDED}") from error
    if not found:
        raise SourceError(f"{path}: no picture in it; {_NEEDED}")


def image_files(folder: Path) -> list[Path]:
    """The files below that are named like images, sorted; links to folders are followed."""
    found = map(Path, find_files(fsspec.filesystem("file"), str(folder)))
    return [file for file in found if media.is_image(file.name) and file.is_file()]


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of each file of a folder or tar that is named like an image."""
    if path.is_dir():
        for file in image_files(path):
            yield file.relative_to(path).as_posix(), file.read_bytes()
        return
    try:
        for tar, member in media.tar_members(str(path)):
            if media.is_image(member.name):
                yield member.name, media.member_bytes(tar, member)
    except Exception as error:
        raise SourceError(
            f"dedup.evaluation: {path}: cannot be read: {error}; {_NEEDED}"
        ) from error


def _embedded(images: Sequence[bytes], embedder: Path | None, width: int, path: Path) -> Matrix:
    """(n, width) unit vectors by the run's embedder; zeros where there is none."""
    if embedder is None or not width:
        return np.zeros((len(images), width), dtype=np.float32)
    from stages.models.embedder import Embedder

    model = Embedder(embedder)
    parts = [
        model.embed_images([decode(image) for image in images[start : start + _BATCH]])
        for start in range(0, len(images), _BATCH)
    ]
    return _unit(np.concatenate([np.zeros((0, width), np.float16), *parts]), width, path)


def _stored(path: Path, width: int) -> Matrix:
    try:
        column = pq.read_table(path, columns=["embedding"])["embedding"].combine_chunks()
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise SourceError(
            f"dedup.evaluation: {path}: cannot be read: {error}; {_NEEDED}"
        ) from error
    if not len(given := column.drop_null()):
        return np.zeros((0, width), dtype=np.float32)
    vectors = _unit(as_matrix(given, f"dedup.evaluation: {path}"), width, path)
    every = np.zeros((len(column), width), dtype=np.float32)  # pictures are told by their row
    every[np.asarray(column.is_valid())] = vectors
    return every


def _unit(block: npt.NDArray[np.float16], width: int, path: Path) -> Matrix:
    if width and block.shape[1] != width:
        raise RunError(
            f"dedup.evaluation: {path}: embeddings of length {block.shape[1]}, the run's have "
            f"{width}; embed it with the run's embedder"
        )
    wide = np.zeros((len(block), width), dtype=np.float32)
    good = usable(block)
    if width:
        wide[good] = block[good]
        wide[good] /= np.linalg.norm(wide[good], axis=1, keepdims=True)
    return wide


def contaminated(
    download: Sequence[Path],
    kinds: Sequence[Images],
    evaluation: Evaluation,
    config: DedupConfig,
    ctx: Context,
) -> pa.Table:
    """A CONTAMINATED table: samples, of web or human images as ``kinds`` holds them, that show an
    evaluation picture, by the rule that ties duplicates."""
    found: dict[str, tuple[str, str, float | None]] = {}
    for sample, name in _equal(download, evaluation):
        found.setdefault(sample, (name, "exact", 1.0))
    for images in kinds:
        ids = images.sample_ids
        for row, item, cosine in _perceptual(images, evaluation, config, ctx):
            known = None if np.isnan(cosine) else cosine
            found.setdefault(ids[row].as_py(), (evaluation.names[item], "perceptual", known))
        for row, item, cosine in _semantic(images, evaluation, config, ctx):
            found.setdefault(ids[row].as_py(), (evaluation.names[item], "semantic", cosine))
    rows = [(sample, *found[sample]) for sample in sorted(found)]
    columns = zip(*rows, strict=True) if rows else ([], [], [], [])
    return pa.table(
        [
            pa.array(list(column), field.type)
            for column, field in zip(columns, CONTAMINATED, strict=True)
        ],
        schema=CONTAMINATED,
    )


def check_share(download: Sequence[Path], collisions: pa.Table, most: float) -> None:
    """Refuse to drop more than ``most`` of the web or of the human images as contaminated.

    Raises:
        ConfigError: training data was given as an evaluation set.
    """
    table = read_table(download, DOWNLOAD, ["sample_id", "source", "status"])
    table = table.filter(pc.equal(table["status"], "success"))
    for source in ("web", "human"):
        images = pc.unique(table.filter(pc.equal(table["source"], source))["sample_id"])
        hits = collisions.filter(pc.is_in(collisions["sample_id"], value_set=images))
        if len(hits) > most * len(images):
            sets = Counter(name.partition("/")[0] for name in hits["collides_with"].to_pylist())
            ((worst, count),) = sets.most_common(1)
            raise ConfigError(
                f"dedup.evaluation: {len(hits)} of {len(images)} {source} images show evaluation "
                f"pictures ({count} of them of {worst!r}), a larger share than "
                f"dedup.max_contaminated ({most:g}): is that set training data? Take it out, or "
                "raise dedup.max_contaminated (up to 1)"
            )


def _equal(download: Sequence[Path], evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    for column, theirs in (("sha256", evaluation.sha256), ("pixel_sha256", evaluation.pixels)):
        names = {h: n for h, n in zip(theirs[::-1], evaluation.names[::-1], strict=True) if h}
        if not names:
            continue
        for file in download:
            table = read_table([file], DOWNLOAD, ["sample_id", "status", column])
            hit = pc.is_in(table[column], value_set=pa.array(list(names), pa.string()))
            table = table.filter(pc.and_(hit, pc.equal(table["status"], "success")))
            for sample, value in zip(
                *(table[c].to_pylist() for c in ("sample_id", column)), strict=True
            ):
                yield sample, names[value]


def _perceptual(
    images: Images, evaluation: Evaluation, config: DedupConfig, ctx: Context
) -> Iterator[tuple[int, int, float]]:
    distance, cosine = config.perceptual_distance, config.perceptual_cosine
    agree = cosine is not None
    ours = np.flatnonzero(images.hashed & images.embedded if agree else images.hashed)
    theirs = np.flatnonzero(evaluation.hashed & evaluation.embedded if agree else evaluation.hashed)
    if distance is None or not len(ours) or not len(theirs):
        return
    index = indexed(evaluation.phash[theirs], distance)
    for start in range(0, len(ours), _BLOCK):
        ctx.progress("comparing with evaluation sets", start, len(ours))
        rows = ours[start : start + _BLOCK]
        ends, _, hits = index.range_search(np.ascontiguousarray(images.phash[rows]), distance + 1)
        left, right = np.repeat(rows, np.diff(ends.astype(np.int64))), theirs[hits]
        cosines = _cosines(images, evaluation, left, right)
        # Many may collide with one; the nearest is named.
        for k in np.lexsort((right, -cosines)):
            if cosine is None or cosines[k] >= cosine:
                yield int(left[k]), int(right[k]), float(cosines[k])


def _cosines(
    images: Images, evaluation: Evaluation, left: Rows, right: Rows
) -> npt.NDArray[np.float32]:
    """Cosine of each pair; NaN where either has no embedding."""
    found = np.full(len(left), np.nan, dtype=np.float32)
    both = images.embedded[left] & evaluation.embedded[right]
    if both.any():
        ours, theirs = images.vectors.read(left[both]), evaluation.vectors[right[both]]
        found[both] = np.einsum("ij,ij->i", ours, theirs)
    return found


def _semantic(
    images: Images, evaluation: Evaluation, config: DedupConfig, ctx: Context
) -> Iterator[tuple[int, int, float]]:
    ours, theirs = np.flatnonzero(images.embedded), np.flatnonzero(evaluation.embedded)
    if config.semantic_cosine is None or not len(theirs):
        return
    for start in range(0, len(ours), _BLOCK):
        ctx.progress("comparing with evaluation sets", start, len(ours))
        rows = ours[start : start + _BLOCK]
        unit = images.vectors.read(rows)
        for other in range(0, len(theirs), _BLOCK):
            items = theirs[other : other + _BLOCK]
            i, j, cosines = above(unit, evaluation.vectors[items], config.semantic_cosine)
            for k in np.argsort(-cosines, kind="stable"):
                yield int(rows[i[k]]), int(items[j[k]]), float(min(cosines[k], 1.0))
