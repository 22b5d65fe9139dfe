"""WebDataset tars as a source: an image and its texts are members of one name."""

from __future__ import annotations

import hashlib
import itertools
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stages import media
from stages.errors import SourceError
from stages.readers import LONGEST_FIELD, TEXT_NAMES, Record, SourceFile, beside, texts_of


def read_webdataset(file: SourceFile) -> Iterator[Record]:
    """Members with the same name up to the first dot are one sample, in sequence. Columns that are
    configured are those of its ``.json``, and ``text_column`` takes the text from there.

    Raises:
        SourceError: no sample has one of these columns.
    """
    config = file.config
    texts = (config.text_column,) if isinstance(config.text_column, str) else config.text_column
    hash_ = filter(None, [config.hash_column])
    missing = list(dict.fromkeys([*(texts or ()), *hash_, *config.keep_columns]))
    numbers, told = itertools.count(), False
    for _, members in itertools.groupby(_members(file.path), key=lambda member: member[0]):
        place = sha256 = None
        written: dict[str, str] = {}
        for _, name, extension, content in members:
            if extension not in media.IMAGE_EXTENSIONS:
                written[extension] = content
            elif place is None:
                place, sha256 = media.member_name(file.path, name), content
        fields = _json_fields(written.get("json", ""))
        if fields:
            told, missing = True, [name for name in missing if name not in fields]
        kept = beside(fields, config.hash_column, config.keep_columns)
        for text in _sample_texts(written, fields, texts):
            yield Record(next(numbers), None, text, place, sha256, *kept)
    if missing and told:
        names = ", ".join(missing)
        raise SourceError(f"{file.path}: no column {names} in the .json of any sample; name others")


def _members(path: str) -> Iterator[tuple[str, str, str, str]]:
    """(key of the sample, member name, extension, content) of the files that matter; of an image
    its sha256, since it may be of any size.

    Raises:
        ValueError: a text is too long.
    """
    wanted = media.IMAGE_EXTENSIONS | {"txt", "caption", "json"}
    for tar, member in media.tar_members(path):
        folder, _, name = member.name.rpartition("/")
        key, _, extension = name.partition(".")
        if extension.lower() in wanted:
            kind = extension.lower()
            yield f"{folder}/{key}", member.name, kind, _content(tar, member, kind)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, extension: str) -> str:
    if extension in media.IMAGE_EXTENSIONS:
        file: Any = tar.extractfile(member)
        return hashlib.file_digest(file, "sha256").hexdigest()
    if member.size > LONGEST_FIELD:
        raise ValueError(f"{member.name[:200]} has more than {LONGEST_FIELD:,} bytes")
    return media.member_bytes(tar, member).decode("utf-8", "replace")


def _json_fields(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _sample_texts(
    written: Mapping[str, str], fields: Mapping[str, Any], columns: Sequence[str] | None
) -> list[str]:
    """The texts of a WebDataset sample; one at least."""
    if columns is None:
        if (text := written.get("txt", written.get("caption"))) is not None:
            return [text]
        lower = {name.lower(): value for name, value in fields.items()}
        found = next((lower[name] for name in TEXT_NAMES if lower.get(name) is not None), None)
        return ["" if text is None else str(text) for text in texts_of(found)]
    texts = [text for name in columns for text in texts_of(fields.get(name))]
    return [str(text) for text in texts if text not in (None, "")] or [""]
