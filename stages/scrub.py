"""Tables and tars without the samples that must not be used again.

A row that an account owes stays, with its ids alone; whatever else is about the samples goes.
"""

from __future__ import annotations

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.compute as pc

from stages.models.text import clean_caption
from stages.removed import DETAIL, STATUS, among, replaced
from stages.select import normal_form

_OWED = {
    "ingest": {},
    "sources": {},
    "download": {"status": STATUS, "detail": DETAIL},
}
"""Tables with a row for each row of a source → what such a row says once it is emptied."""
_IDS = frozenset({"row_id", "sample_id", "source", "retry_of", "repeat_of"})
_TEXTS = frozenset({"text", "original_text"})  # never null: an empty one stands for none
ID_COLUMNS = ("sample_id", "carried_by", "origin")
"""Columns that tell whether a table is about a sample."""


def scrub_table(name: str, table: pa.Table, samples: frozenset[str]) -> pa.Table:
    """What is left of a table (its name as in `pipeline.runfolder.tables`) without ``samples``.

    Rows of sources and downloads keep their ids and lose the rest; of ``rows``, the state becomes
    ``removed``. In all other tables the samples' rows are dropped, from the training index also
    texts that others carried for them. A text that was merged onto one of the samples ends as
    ``removed``. Doing it twice changes nothing more.
    """
    gone = among(table["sample_id"], samples)
    if name in _OWED:
        contents = {
            column: "" if column in _TEXTS else None
            for column in table.column_names
            if column not in _IDS
        }
        return replaced(table, gone, contents | _OWED[name])
    if name == "rows":
        return replaced(table, gone, {"state": STATUS})
    if name == "index":
        gone = pc.or_(gone, among(table["origin"], samples))
    left = table.filter(pc.invert(gone))
    if name == "pairs":
        carried = among(left["carried_by"], samples)
        carried = pc.and_(carried, pc.equal(left["state"], "merged"))
        detail = "the image that carried the text was removed (capfilt forget)"
        return replaced(left, carried, {"state": STATUS, "carried_by": None, "detail": detail})
    return left


def scrub_shared_texts(texts: pa.Table, pairs: pa.Table, samples: frozenset[str]) -> pa.Table:
    """TEXTS without those that one of ``samples`` had; ``pairs`` (PAIRS) is still whole."""
    gone = pairs.filter(among(pairs["sample_id"], samples))["text"].drop_null()
    normal = {normal_form(clean_caption(text)) for text in gone.to_pylist()}
    return texts.filter(pc.invert(among(texts["text"], frozenset(normal))))


def scrub_tar(tar: bytes, samples: frozenset[str]) -> bytes:
    """A tar of images, or a training shard, without the members ``<sample_id>.*`` of ``samples``
    and without the texts that others carry for them; members that stay keep their order.

    Raises:
        tarfile.TarError, ValueError, KeyError: it is neither.
    """
    out = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(tar)) as source,
        tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as target,
    ):
        for member in source:
            file = source.extractfile(member)
            if file is None or member.name.partition(".")[0] in samples:
                continue
            data = file.read()
            if member.name.endswith(".json"):
                data = _without_texts(data, samples)
            # A fresh TarInfo has no owner and the time 0: nothing of this moment is written.
            fresh = tarfile.TarInfo(member.name)
            fresh.size = len(data)
            target.addfile(fresh, io.BytesIO(data))
    return out.getvalue()


def _without_texts(described: bytes, samples: frozenset[str]) -> bytes:
    sample = json.loads(described)
    texts = [text for text in sample["texts"] if text["origin"] not in samples]
    if len(texts) == len(sample["texts"]):
        return described
    return json.dumps(sample | {"texts": texts}, ensure_ascii=False).encode()
