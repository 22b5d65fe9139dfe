"""Source formats: each file, whatever its layout, as a stream of `Record`.

| format | what it is |
| --- | --- |
| parquet, csv, tsv, jsonl | tables with a URL and a text column: LAION, COYO, DataComp, CC3M, … |
| text | one URL a line, perhaps a tab and a caption |
| webdataset | tars of images beside .txt, .caption or .json files |
| annotations, json | human sets: see `stages.annotations` |
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import pyarrow as pa
from pydantic import Field, field_validator

from stages.base import PAGE_BUFFER, Config, record_batches
from stages.errors import SourceError, from_remote_store

Kind = Literal["auto", "table", "webdataset", "human"]
Origin = Literal["web", "human"]

URL_NAMES = ("url", "image_url", "img_url", "image_link", "photo_url", "uri")
TEXT_NAMES = ("text", "caption", "alt_text", "alt", "captions", "title", "description")

_LOOK_AHEAD = 100  # rows of a JSONL or text file that decide what it holds
BATCH_ROWS = 2_000  # a row takes some kB of Python objects while it is made
LONGEST_FIELD = 16 * 1024 * 1024
"""Characters of a field, line or text file at most: a longer one is no caption but the wrong file,
and would fill the memory."""


class SourceConfig(Config):
    """Where rows come from."""

    path: str = Field(min_length=1)
    """A file, a folder, or a glob; local or any fsspec URL."""
    kind: Kind = "auto"
    """``auto`` goes by the file's extension; ``human`` means an annotated set."""
    url_column: str | None = None
    """Column that holds the URL. None: recognised by name, whatever its case."""
    text_column: str | tuple[str, ...] | None = None
    """One column, or several: alt, title, caption. Each text that is not empty is a row."""
    hash_column: str | None = None
    """Column with the md5, sha1, sha256 or sha512 of the image, in hex; other bytes are refused."""
    keep_columns: tuple[str, ...] = ()
    """Further columns to keep, as JSON in the column ``extra``: licence, similarity, NSFW score.
    Numbers that are not finite are null there, and bytes are hex."""
    split: tuple[str, ...] = ()
    """Karpathy-style JSON: only images of these splits. Empty: all."""
    image_root: str | None = None
    """Human sets: folder that image file names are relative to. None: the folder of the
    annotations; COCO images that say where they lie on the web are then fetched there."""

    @field_validator("split", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


@dataclass(frozen=True)
class SourceFile:
    """One file of a source. ``identity`` names its content: name in the source and hash, never a
    time, so that a copied or touched file is the same file."""

    path: str
    """Absolute, or an fsspec URL."""
    identity: str
    format: str
    origin: Origin
    """Whose texts these are: ``source`` of every row."""
    config: SourceConfig


class Record(NamedTuple):
    """One row of a source."""

    number: int
    """Place in the file, counted before any filter."""
    url: str | None
    text: str
    media: str | None = None
    sha256: str | None = None
    """Of the image's bytes, where ``media`` could be read."""
    image_hash: str | None = None
    """That the image must have, says the source."""
    extra: str | None = None
    """The columns to keep, as JSON."""


class Columns(NamedTuple):
    url: str
    texts: tuple[str, ...]
    hash: str | None = None
    extra: tuple[str, ...] = ()

    @property
    def all(self) -> list[str]:
        named = (self.url, *self.texts, *self.extra, *filter(None, [self.hash]))
        return list(dict.fromkeys(named))

    def records(self, number: int, row: Mapping[str, Any]) -> Iterator[Record]:
        """One record for each text of a row; one at least."""
        several = len(self.texts)
        found = [(i, text) for i, name in enumerate(self.texts) for text in texts_of(row.get(name))]
        filled = [(i, text) for i, text in found if text not in (None, "")] or found[:1]
        for i, text in filled if several > 1 else found:
            yield self._record(number * several + i, row, text)

    def _record(self, number: int, row: Mapping[str, Any], text: object) -> Record:
        image_hash, extra = beside(row, self.hash, self.extra)
        record = _row(number, row.get(self.url), text)
        return record._replace(image_hash=image_hash, extra=extra)


def beside(
    row: Mapping[str, Any], hash_: str | None, extra: Sequence[str]
) -> tuple[str | None, str | None]:
    """``image_hash`` and ``extra`` of a record."""
    given = str(row.get(hash_) or "").strip().lower() if hash_ else ""
    kept = {name: row.get(name) for name in extra}
    return given or None, _as_json(kept) if kept else None


def _as_json(kept: Mapping[str, Any]) -> str:
    dump = partial(json.dumps, default=_as_text, ensure_ascii=False)
    try:
        return dump(kept, allow_nan=False)
    except ValueError:  # NaN or infinity, however deep
        return dump(json.loads(dump(kept), parse_constant=lambda _: None))


def _as_text(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def read_parquet(file: SourceFile) -> Iterator[Record]:
    import fsspec
    import pyarrow.parquet as pq

    with fsspec.open(file.path, "rb") as stream:
        table = pq.ParquetFile(stream, buffer_size=PAGE_BUFFER)
        columns = find_columns(file, table.schema_arrow.names)
        for name in (columns.url, *columns.texts):
            _check_type(file, name, table.schema_arrow.field(name).type)
        numbers = itertools.count()
        for batch in record_batches(table, BATCH_ROWS, columns.all):
            for row in _rows(batch):
                yield from columns.records(next(numbers), row)


def _rows(batch: pa.RecordBatch) -> Iterable[Mapping[str, Any]]:
    """Arrow lets strings pass that are no UTF-8: what is wrong in them is replaced."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    except UnicodeDecodeError:
        columns = [map(_value, column) for column in batch.columns]
        rows_ = zip(*columns, strict=True)
        return (dict(zip(batch.schema.names, row, strict=True)) for row in rows_)


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        plain = scalar.value if pa.types.is_dictionary(scalar.type) else scalar
        buffer = plain.as_buffer() if hasattr(plain, "as_buffer") else b""  # of a list: nothing
        return bytes(buffer).decode("utf-8", "replace")


def read_csv(file: SourceFile) -> Iterator[Record]:
    """CSV, or TSV where that is the file's format; with a header or, as CC3M and CC12M, without:
    then the first column that looks like a URL is one, and the other the text."""
    tabs = file.format == "tsv"
    with _open_text(file.path) as stream:
        first = next((line for line in stream if line.strip()), "")
        names = next(csv.reader([first], delimiter="\t" if tabs else ","), [])
        headless = file.config.url_column is None and any(map(is_url, names))
        # Lists without a header were written without quoting: a quote is part of the text there.
        quoting: Literal[0, 3] = csv.QUOTE_NONE if tabs and headless else csv.QUOTE_MINIMAL
        if headless:
            place = next(i for i, name in enumerate(names) if is_url(name))
            columns = Columns(str(place), (str(0 if place else 1),))
            names = list(map(str, range(len(names))))
        elif names:
            columns = find_columns(file, names)
        csv.field_size_limit(LONGEST_FIELD)
        lines = itertools.chain([first], stream) if headless else stream
        rows = csv.reader(lines, delimiter="\t" if tabs else ",", quoting=quoting)
        for number, row in enumerate(row for row in rows if row):
            yield from columns.records(number, dict(zip(names, row, strict=False)))


def read_jsonl(file: SourceFile) -> Iterator[Record]:
    rows = json_lines(file.path)
    ahead = list(itertools.islice(rows, _LOOK_AHEAD))
    if not ahead:
        return
    columns = find_columns(file, list(dict.fromkeys(name for row in ahead for name in row)))
    numbers = itertools.count()
    for row in itertools.chain(ahead, rows):
        for record in columns.records(0, row):
            yield record._replace(number=next(numbers))


def read_text(file: SourceFile) -> Iterator[Record]:
    with _open_text(file.path) as stream:
        lines = (line.rstrip("\r\n") for line in stream)
        filled = (line.split("\t") for line in lines if line.strip())
        ahead = list(itertools.islice(filled, _LOOK_AHEAD))
        if ahead and not any(is_url(cell) for cells in ahead for cell in cells):
            raise SourceError(f"{file.path}: no URL in its first lines; expected one URL a line")
        for number, cells in enumerate(itertools.chain(ahead, filled)):
            url, *rest = cells
            if rest and not is_url(url) and is_url(rest[0]):
                url, rest[0] = rest[0], url
            yield _row(number, url, rest[0] if rest else "")


def find_columns(file: SourceFile, names: Sequence[str]) -> Columns:
    """The columns that hold URL and text: those configured, else the first known name.

    Raises:
        SourceError: one is missing; says which there are.
    """
    config = file.config
    texts = (config.text_column,) if isinstance(config.text_column, str) else config.text_column
    wanted: list[tuple[str, str | None, Sequence[str]]] = [
        ("url", config.url_column, URL_NAMES),
        *(("text", name, TEXT_NAMES) for name in texts or (None,)),
        *(("hash", name, ()) for name in [config.hash_column] if name),
        *(("keep", name, ()) for name in config.keep_columns),
    ]
    found: dict[str, list[str]] = {}
    lower = {name.strip().lower(): name for name in reversed(names)}
    for what, configured, known in wanted:
        if configured is not None:
            name = configured if configured in names else None
        else:
            name = next((lower[candidate] for candidate in known if candidate in lower), None)
        if name is None:
            sought = configured or f"for the {what} (looked for {', '.join(known)})"
            there = ", ".join(name[:40] for name in names[:20]) or "none"
            raise SourceError(
                f"{file.path}: no column {sought}; there are: {there}; set "
                f"{what}_column{'s' if what == 'keep' else ''}"
            )
        found.setdefault(what, []).append(name)
    hash_ = found.get("hash", [None])[0]
    return Columns(found["url"][0], tuple(found["text"]), hash_, tuple(found.get("keep", ())))


def json_lines(path: str) -> Iterator[Mapping[str, Any]]:
    """The objects of a JSONL file. A line that is none gives an empty one: a row, not an error,
    unless it is the first."""
    with _open_text(path) as stream:
        lines = (line for line in stream if line.strip())
        for number, line in enumerate(lines):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                if number == 0:
                    raise
                row = None
            if not isinstance(row, dict) and number == 0:
                raise ValueError("its lines must be JSON objects")
            yield row if isinstance(row, dict) else {}


@contextmanager
def readable(path: str, format: str) -> Iterator[None]:
    """Turns what parsers raise into `SourceError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise SourceError(f"{path}: no such file") from error
    except (OSError, EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
        raise SourceError(f"{path}: cannot be read as {format}: {_line(error)}") from error
    except (pa.ArrowException, csv.Error, ValueError, RecursionError) as error:
        raise SourceError(f"{path}: not a valid {format} file: {_line(error)}") from error
    except (KeyError, TypeError, AttributeError) as error:
        detail = f"{type(error).__name__} {_line(error)}"
        raise SourceError(f"{path}: not a known layout of {format}: {detail}") from error
    except Exception as error:
        if not from_remote_store(error):
            raise
        raise SourceError(f"{path}: cannot be reached: {_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def _open_text(path: str) -> Iterator[Iterator[str]]:
    """The lines of a text file, compressed or not."""
    import fsspec

    with fsspec.open(
        path, "rt", encoding="utf-8-sig", errors="replace", newline="", compression="infer"
    ) as stream:
        yield _lines(stream)


def _lines(stream: Any) -> Iterator[str]:
    """Raises ValueError: a line is too long; no more of it is read."""
    for number in itertools.count(1):
        line = stream.readline(LONGEST_FIELD + 1)
        if len(line) > LONGEST_FIELD:
            raise ValueError(f"line {number} has more than {LONGEST_FIELD:,} characters")
        if not line:
            return
        yield line


def _row(number: int, url: object, text: object) -> Record:
    address = str(url).strip() if url is not None else ""
    return Record(number, address or None, "" if text is None else str(text))


def is_url(cell: str) -> bool:
    return cell.strip().lower().startswith(("http://", "https://"))


def _check_type(file: SourceFile, name: str, kind: pa.DataType) -> None:
    strings = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (any(test(value) for test in strings) or pa.types.is_null(value)):
        raise SourceError(f"{file.path}: column {name} holds {kind}, not text; name another column")


def texts_of(value: object) -> list[object]:
    """One row for each text; a row without text stays a row."""
    return (value or [""]) if isinstance(value, list) else [value]


TABLES: Mapping[str, Callable[[SourceFile], Iterator[Record]]] = {
    "parquet": read_parquet,
    "csv": read_csv,
    "tsv": read_csv,
    "jsonl": read_jsonl,
    "text": read_text,
}
