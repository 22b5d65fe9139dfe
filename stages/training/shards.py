"""What training tars hold: where each image lies, and its texts. No image is read here."""

from __future__ import annotations

import json
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.ids import digest

Ints = npt.NDArray[np.int64]

_IMAGE_SUFFIXES = ("png", "jpg", "jpeg", "webp")
_Place = tuple[int, int]


class Shards:
    """The samples of WebDataset tars, as columns: images by index, pairs by the image they name.

    Tars are read with webdataset's rule for samples: members of one key stand together. What is
    broken is left out and counted in ``skipped``: ``tar`` (ends early, or no tar at all),
    ``sample`` (no image or no texts), ``text`` (not a text).

    Raises:
        OSError: a tar cannot be read.
    """

    def __init__(self, tars: Sequence[Path]) -> None:
        self.tars = list(tars)
        self.skipped: Counter[str] = Counter()
        self.texts: list[str] = []
        human, image_of_text = bytearray(), array("q")
        tar_of, offset, size, image_id = array("q"), array("q"), array("q"), array("q")
        for number, tar in enumerate(self.tars):
            for (start, length), described in self._samples(tar):
                texts = list(self._texts(described))
                if not texts:
                    continue
                for text, source in texts:
                    self.texts.append(text)
                    human.append(source == "human")
                    image_of_text.append(len(tar_of))
                tar_of.append(number)
                offset.append(start)
                size.append(length)
                image_id.append(stable_image_id(described["sample_id"]))
        # None of these is a copy: beside all texts there is little room.
        self.image_of_text = np.frombuffer(image_of_text, dtype=np.int64)
        self.is_human = np.frombuffer(human, dtype=np.bool_)
        """(texts,): whether a person wrote the text for this image."""
        self.image_ids = np.frombuffer(image_id, dtype=np.int64)
        """(images,): the same in every set that holds the sample; see `stable_image_id`."""
        self._tar_of = np.frombuffer(tar_of, dtype=np.int64)
        self._offset = np.frombuffer(offset, dtype=np.int64)
        self._size = np.frombuffer(size, dtype=np.int64)

    @property
    def images(self) -> int:
        return len(self.image_ids)

    def read(self, image: int) -> bytes:
        """The encoded image, shorter than it was where the tar has been cut since."""
        with self.tars[int(self._tar_of[image])].open("rb") as stream:
            stream.seek(int(self._offset[image]))
            return stream.read(int(self._size[image]))

    def _samples(self, tar: Path) -> Iterator[tuple[_Place, dict[str, Any]]]:
        from webdataset.tariterators import group_by_keys

        for sample in group_by_keys(self._members(tar), handler=self._skip_member):
            place = next((sample[s] for s in _IMAGE_SUFFIXES if s in sample), None)
            described = _parsed(sample.get("json", b""))
            if place is None or described is None:
                self.skipped["sample"] += 1
            else:
                yield place, described

    def _members(self, tar: Path) -> Iterator[dict[str, Any]]:
        """A tar's files in webdataset's form; of an image not its bytes but (offset, size)."""
        end = tar.stat().st_size
        try:
            with tarfile.open(tar, "r:") as archive:
                for member in archive:
                    if not member.isreg():
                        continue
                    if member.offset_data + member.size > end:
                        raise tarfile.ReadError("unexpected end of data")
                    data: object = (member.offset_data, member.size)
                    if member.name.endswith(".json"):
                        data = archive.extractfile(member).read()  # type: ignore[union-attr]
                    yield {"fname": member.name, "data": data, "__url__": str(tar)}
        except tarfile.TarError:
            # Not OSError: where a disk fails, this worker alone would miss what others train on.
            self.skipped["tar"] += 1

    def _skip_member(self, _: Exception) -> bool:
        self.skipped["sample"] += 1
        return True

    def _texts(self, described: dict[str, Any]) -> Iterator[tuple[str, object]]:
        for entry in described["texts"]:
            if isinstance(entry, dict) and isinstance(entry.get("text"), str):
                yield entry["text"], entry.get("source")
            else:
                self.skipped["text"] += 1


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        described = json.loads(data)
    except (ValueError, RecursionError):
        return None
    fits = (
        isinstance(described, dict)
        and isinstance(described.get("sample_id"), str)
        and isinstance(described.get("texts"), list)
    )
    return described if fits else None


def stable_image_id(sample_id: str) -> int:
    """63 bits of the sample's id: equal images share it across training sets and rounds, so that
    a queue filled by one stage still says what it holds to the next."""
    return int(digest("image", sample_id)[:16], 16) >> 1
