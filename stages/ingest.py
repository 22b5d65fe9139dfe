"""Ingest: source files of any layout to URL shards, cut once.

A file is known by its content, so new files in a watched folder become new shards and old ones
are never cut again. Rows are streamed: what lies in memory is a few batches; the index of texts
already seen, which tells repeats, lies on disk.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from stages import ids
from stages.annotations import ANNOTATIONS, read_annotations, read_json
from stages.base import Config, Context, DatasetStage, operational
from stages.errors import SourceError, from_remote_store
from stages.readers import (
    BATCH_ROWS,
    TABLES,
    Origin,
    Record,
    SourceConfig,
    SourceFile,
    readable,
)
from stages.schemas import SOURCES
from stages.seen import SeenPairs, mark_repeats
from stages.tars import read_webdataset
from stages.texts import Language, clean_text, identify_language, score_text

READERS = {
    **TABLES,
    "webdataset": read_webdataset,
    "annotations": read_annotations,
    "json": read_json,
}

_EXTENSIONS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".tar": "webdataset",
    ".json": "json",
}
_TABLE_FORMATS = frozenset({"parquet", "csv", "tsv", "jsonl"})
_CHUNK = 1 << 20


class IngestConfig(Config):
    """How sources are cut."""

    # Both apply to new files only: what was cut stays as it is.
    shard_size: int = operational(1000, ge=1)
    """Rows of a shard, at most. A worker of download takes 0.3 GiB and about three times the
    shard's kept images: 0.4 GiB for 1,000 of 45 kB, 1.6 GiB for 10,000; up to 0.4 GiB more while it
    decodes a picture of 25 megapixels. For less than 1 GiB keep shards below 4,000 such images."""
    language: bool = operational(True)
    """Identify the language of web texts, for ``select.texts.languages``. It takes about as long as
    all else that is done to a text."""


class IngestStage(DatasetStage):
    """Writes ``shard=<six digits or more>.parquet`` (SOURCES) for the rows of ``files``.

    Inputs: ``seen``, the shards cut earlier; a row that repeats one of theirs is marked. Who cuts
    file after file gives them once, to a ``SeenPairs`` of its own. A shard never holds both web and
    human rows, and the outcome does not depend on the order of ``files``.
    """

    name = "ingest"
    version = 3

    def __init__(
        self,
        config: IngestConfig,
        files: Sequence[SourceFile],
        first_shard: int = 0,
        seen: SeenPairs | None = None,
    ) -> None:
        self.config = config
        self.seen = seen
        self.files = sorted(files, key=lambda file: (file.origin != "web", file.identity))
        self.first_shard = first_shard

    def run(self, inputs: Mapping[str, Sequence[Path]], output_dir: Path, ctx: Context) -> None:
        """Raises SourceError: a file cannot be read or is given twice."""
        check_distinct(self.files)
        with ExitStack() as stack:
            seen = self.seen or stack.enter_context(SeenPairs())
            seen.read(inputs.get("seen", ()))
            self._cut(seen, output_dir, ctx)

    def _cut(self, seen: SeenPairs, output_dir: Path, ctx: Context) -> None:
        import pyarrow.parquet as pq

        shard = self.first_shard
        for _, group in itertools.groupby(self.files, key=lambda file: file.origin):
            tables = self._tables(list(group), ctx)
            for table in cut(tables, self.config.shard_size, seen):
                pq.write_table(table, output_dir / f"shard={shard:06d}.parquet")
                shard += 1

    def _tables(self, files: Sequence[SourceFile], ctx: Context) -> Iterator[pa.Table]:
        for number, file in enumerate(files):
            ctx.progress(f"reading {PurePosixPath(file.path).name}", number, len(files))
            yield from read_rows(file, self.config.language)


def list_files(
    source: SourceConfig, origin: Origin = "web", awaited: bool = False
) -> list[SourceFile]:
    """The files of a source, sorted by name. Reads each local file once, for its hash.

    Args:
        origin: ``human`` for annotated sets; a source of kind ``human`` always is.
        awaited: files may still come, so a folder or a pattern with none is no error.

    Raises:
        SourceError: nothing there, or nothing of a known format.
    """
    fs, base, chosen = _listed(source, origin, awaited)
    return [
        _file(fs, name, format_, origin, source, f"{_relative(name, base)}:{_content(fs, name)}")
        for name, format_ in chosen
    ]


def check_source(source: SourceConfig, origin: Origin = "web", awaited: bool = False) -> bool:
    """Read one row of a source and no more: neither its other files nor their hashes. Returns
    whether there is any; False only where it is ``awaited``, see `list_files`.

    Raises:
        SourceError: nothing there, no row in it, a column missing, or an unreadable file.
    """
    fs, _, chosen = _listed(source, origin, awaited)
    if not chosen:
        return False
    for name, format_ in chosen:
        file = _file(fs, name, format_, origin, source, identity="")
        with readable(file.path, format_):
            if next(READERS[format_](file), None) is not None:
                return True
    if awaited:
        return False
    raise SourceError(f"{source.path}: holds no rows; give a source that does, or leave it out")


def _listed(
    source: SourceConfig, origin: Origin, awaited: bool
) -> tuple[Any, str, list[tuple[str, str]]]:
    """(filesystem, what names are relative to, (path, format) of each file)."""
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(source.path)
        base, found = _find(fs, path)
        # A store has no empty folders; on a disk, one that is missing was misspelt.
        may_be_empty = awaited and ("file" not in _protocols(fs) or fs.isdir(base))
    except (OSError, ValueError, ImportError) as error:
        raise SourceError(f"{source.path}: cannot be listed: {error}") from error
    except Exception as error:
        if not from_remote_store(error):
            raise
        raise SourceError(f"{source.path}: cannot be reached: {error}") from error
    if may_be_empty and not any(map(_is_visible, found)):
        return fs, base, []
    if not found:
        raise SourceError(f"{source.path}: no such file, folder or match")
    return fs, base, _choose(source, _origin(source, origin), found, single=found == [base])


def _origin(source: SourceConfig, origin: Origin) -> Origin:
    return "human" if source.kind == "human" else origin


def _file(
    fs: Any, name: str, format_: str, origin: Origin, source: SourceConfig, identity: str
) -> SourceFile:
    path = name if "file" in _protocols(fs) else fs.unstrip_protocol(name)
    return SourceFile(path, identity, format_, _origin(source, origin), source)


def read_rows(file: SourceFile, language: bool = False) -> Iterator[pa.Table]:
    """SOURCES tables of at most 2,000 rows, ``repeat_of`` empty, in the file's order; with
    ``language``, that of web texts is identified.

    Raises:
        SourceError: the file cannot be read, or a column is missing.
    """
    with readable(file.path, file.format):
        records = READERS[file.format](file)
        while batch := list(itertools.islice(records, BATCH_ROWS)):
            rows = [_source_row(file, record, language) for record in batch]
            yield pa.Table.from_pylist(rows, schema=SOURCES)


def cut(tables: Iterable[pa.Table], shard_size: int, seen: SeenPairs) -> Iterator[pa.Table]:
    """Tables as of `parted`, ``repeat_of`` filled; ``seen`` learns the rows."""
    yield from parted((mark_repeats(table, seen, SOURCES) for table in tables), shard_size)


def parted(tables: Iterable[pa.Table], shard_size: int) -> Iterator[pa.Table]:
    """Tables of at most ``shard_size`` rows. Rows of one image that follow each other stay in one
    shard where that leaves it half full at least."""
    pending: list[pa.Table] = []
    rows = 0
    for table in tables:
        pending.append(table)
        rows += table.num_rows
        if rows <= shard_size:
            continue
        whole = pa.concat_tables(pending)
        start = 0
        while rows - start > shard_size:
            end = _boundary(whole["sample_id"], start, shard_size)
            yield whole.slice(start, end - start).combine_chunks()
            start = end
        pending, rows = [whole.slice(start)], rows - start
    if rows:
        yield pa.concat_tables(pending).combine_chunks()


def check_distinct(files: Iterable[SourceFile]) -> None:
    """Raises: SourceError: two files have the same name and content, so that their rows would have
    the same ids."""
    known: dict[str, SourceFile] = {}
    for file in files:
        other = known.setdefault(file.identity, file)
        if other is not file:
            raise SourceError(f"{file.path}: same name and content as {other.path}; give it once")


def _find(fs: Any, path: str) -> tuple[str, list[str]]:
    """(what names are relative to, paths of the files)."""
    if any(sign in path for sign in "*?[") and not fs.exists(path):
        parts = path.split("/")
        fixed = list(itertools.takewhile(lambda part: not set("*?[") & set(part), parts))
        base, depth = "/".join(fixed), None if "**" in parts else len(parts) - len(fixed)
        return base, sorted(name for name in _matching(fs, path, base, depth) if fs.isfile(name))
    if fs.isdir(path):
        return path, find_files(fs, path)
    return path, [path] if fs.exists(path) else []


def find_files(fs: Any, path: str) -> list[str]:
    """Every file below a folder, sorted; of a file itself, and of nothing where there is none. On a
    disk, links to folders are followed: fsspec takes them for files."""
    if "file" in _protocols(fs) and fs.isdir(path):
        return sorted(_below(path))
    return sorted(fs.find(path))


def _matching(fs: Any, pattern: str, base: str, depth: int | None) -> Iterable[str]:
    """What is called so, below ``base``, at most ``depth`` folders deep."""
    from fsspec.utils import glob_translate

    if "file" not in _protocols(fs):
        return map(str, fs.glob(pattern))
    return filter(re.compile(glob_translate(pattern)).match, _below(base or "/", depth))


def _below(folder: str, depth: int | None = None, within: tuple[str, ...] = ()) -> Iterator[str]:
    """All but folders, at most ``depth`` levels deep. ``within``: the real paths of the folders
    above, so that a link to one of them ends nowhere."""
    real = os.path.realpath(folder)
    if depth == 0 or real in within:
        return
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, PermissionError):
        return  # as fsspec does: the root of a disk has a lost+found, which only root may read
    for entry in entries:
        if _is_folder(entry):
            yield from _below(entry.path, depth and depth - 1, (*within, real))
        else:
            yield entry.path


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into what may not be read
        return False


def _choose(
    source: SourceConfig, origin: Origin, names: Sequence[str], single: bool
) -> list[tuple[str, str]]:
    """(path, format) of the files that are the source.

    In a folder, the first of these that there are: a JSONL of annotations, tars, tables, text
    lists, and for human sets JSON. So the statistics beside img2dataset's tars are not rows.
    """
    visible = filter(_is_visible, names)
    formats = {name: format_ for name in visible if (format_ := _format(source, name))}
    groups: list[set[str]] = [{"annotations"}, {"webdataset"}, set(_TABLE_FORMATS), {"text"}]
    if source.kind == "table":
        groups = [set(_TABLE_FORMATS), {"text"}]
    elif source.kind == "webdataset":
        groups = [{"webdataset"}]
    elif single or origin == "human":
        groups.append({"json"})
    for group in groups:
        if chosen := [(name, kind) for name, kind in formats.items() if kind in group]:
            return chosen
    known = ", ".join(sorted(_EXTENSIONS))
    what = "" if source.kind == "auto" else f" of kind {source.kind}"
    raise SourceError(f"{source.path}: no source file{what} there; known are {known} (.gz as well)")


def _is_visible(path: str) -> bool:
    return not PurePosixPath(path).name.startswith((".", "_"))


def _format(source: SourceConfig, path: str) -> str | None:
    name = PurePosixPath(path).name.lower()
    format_ = _EXTENSIONS.get(PurePosixPath(name.removesuffix(".gz")).suffix)
    annotated = name == ANNOTATIONS and source.kind != "table"
    if annotated or (format_ == "jsonl" and source.kind == "human"):
        return "annotations"
    return format_


def _relative(name: str, base: str) -> str:
    return name.removeprefix(base).strip("/") or PurePosixPath(name).name


def _content(fs: Any, path: str) -> str:
    """What a local file holds, or what its store says that it holds."""
    if "file" in _protocols(fs):
        state = hashlib.sha256()
        with fs.open(path, "rb") as stream:
            while block := stream.read(_CHUNK):
                state.update(block)
        return state.hexdigest()
    info = fs.info(path)
    # Google's etag changes with the metadata.
    tag = next((info[key] for key in ("md5Hash", "md5", "ETag", "etag") if info.get(key)), "")
    return f"{str(tag).strip(chr(34))}:{info.get('size')}"


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _source_row(file: SourceFile, record: Record, language: bool) -> dict[str, Any]:
    row = ids.row_id(file.identity, record.number)
    url = None if record.url is None else _valid(record.url)
    if url is not None:
        image = url
    elif record.sha256 is not None:
        image = ids.media_url(record.sha256)
    else:
        image = f"row:{row}" if record.media is None else f"file:{record.media}"
    original = _valid(record.text)
    text = clean_text(original)
    asked = language and file.origin == "web"
    spoken = identify_language(text) if asked else Language(None, None)
    return {
        "row_id": row,
        "sample_id": ids.sample_id(image),
        "source": file.origin,
        "url": url,
        "media": record.media,
        "text": text,
        "original_text": original,
        **score_text(text)._asdict(),
        **spoken._asdict(),
        "image_hash": None if record.image_hash is None else _valid(record.image_hash),
        "extra": None if record.extra is None else _valid(record.extra),
        "retry_of": None,
        "repeat_of": None,
    }


def _valid(text: str) -> str:
    """JSON can hold half a character (a lone surrogate), Arrow cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _boundary(samples: pa.ChunkedArray, start: int, size: int) -> int:
    """Where the shard that begins at ``start`` ends: at most ``size`` rows on."""
    window = samples.slice(start, size + 1).to_pylist()
    end = size
    while end > size // 2 and window[end] == window[end - 1]:
        end -= 1
    return start + (end if end > size // 2 else size)
