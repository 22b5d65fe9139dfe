"""Human-annotated sets: COCO captions, Karpathy-style and BLIP-style JSON, a folder with a JSONL.

One `Record` for each caption; captions of one image follow each other.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stages import media
from stages.errors import SourceError
from stages.readers import Origin, Record, SourceFile, is_url, json_lines

ANNOTATIONS = "annotations.jsonl"

_IMAGE_KEYS = ("image", "file", "file_name", "filename", "filepath")
_TEXT_KEYS = ("captions", "caption", "texts", "text", "sentences", "raw")
_STORES = ("file", "s3", "gs")
_LAYOUTS = (
    "COCO (images, annotations), Karpathy (images with sentences), "
    "a list of {image, caption}, or SBU (image_urls, captions)"
)


class Annotated(NamedTuple):
    """One image with its captions. ``image`` is a URL or a file; ``chosen`` is whether its split
    is wanted."""

    image: str | None
    captions: list[str]
    chosen: bool = True


def read_annotations(file: SourceFile) -> Iterator[Record]:
    """A JSONL beside its images: ``{"image": "000001.png", "captions": ["…", "…"]}``; ``file``,
    ``caption`` and ``text`` are understood too."""
    yield from _records(file, (_annotated(row) for row in json_lines(file.path)))


def read_json(file: SourceFile) -> Iterator[Record]:
    """One JSON document, loaded as a whole.

    Raises:
        SourceError: none of the layouts, or no image has a wanted split.
    """
    import fsspec

    with fsspec.open(file.path, "rt", encoding="utf-8-sig", compression="infer") as stream:
        document = json.load(stream)
    yield from _records(file, _layout(file, document))


def _layout(file: SourceFile, document: Any) -> Iterator[Annotated]:
    if isinstance(document, list):
        return (_annotated(row if isinstance(row, dict) else {}) for row in document)
    if isinstance(document, dict):
        if "annotations" in document and "images" in document:
            return _coco(file, document)
        if "images" in document:
            return _karpathy(file, document["images"])
        if "image_urls" in document and "captions" in document:
            pairs = zip(document["image_urls"], document["captions"], strict=True)
            return (Annotated(_name(url), [_text(text)]) for url, text in pairs)
    raise SourceError(f"{file.path}: not a known layout of annotations; known are {_LAYOUTS}")


def _coco(file: SourceFile, document: Mapping[str, Any]) -> Iterator[Annotated]:
    captions: dict[Any, list[str]] = {}
    for annotation in document["annotations"]:
        if "caption" not in annotation:
            raise SourceError(
                f"{file.path}: its annotations have no captions; use COCO's captions_*.json"
            )
        captions.setdefault(annotation["image_id"], []).append(_text(annotation["caption"]))
    for image in document["images"]:
        # Where no folder is given, an image that says where it lies on the web is fetched there.
        url = image.get("coco_url") or image.get("flickr_url") or image.get("url")
        name = image.get("file_name")
        place = (url or name) if file.config.image_root is None else (name or url)
        yield Annotated(_name(place), captions.get(image["id"], []))


def _karpathy(file: SourceFile, images: Iterable[Mapping[str, Any]]) -> Iterator[Annotated]:
    images = list(images)
    wanted = file.config.split
    splits = sorted({str(image.get("split")) for image in images})
    if wanted and not set(wanted) & set(splits):
        there = ", ".join(splits)
        raise SourceError(f"{file.path}: no image of split {', '.join(wanted)}; there are: {there}")
    for image in images:
        name = image.get("filename") or image.get("file_name")
        if name and image.get("filepath"):
            name = f"{image['filepath']}/{name}"
        texts = [_text(sentence.get("raw")) for sentence in image.get("sentences", [])]
        chosen = not wanted or image.get("split") in wanted
        yield Annotated(_name(name or image.get("url")), texts, chosen)


def _annotated(row: Mapping[str, Any]) -> Annotated:
    image = next((row[key] for key in (*_IMAGE_KEYS, "url") if row.get(key)), None)
    texts: Any = next((row[key] for key in _TEXT_KEYS if row.get(key) is not None), [])
    if not isinstance(texts, list):
        texts = [texts]
    plain = [_text(text.get("raw") if isinstance(text, dict) else text) for text in texts]
    return Annotated(_name(image), plain)


def _name(image: object) -> str | None:
    return None if image is None else str(image)


def _text(caption: object) -> str:
    return "" if caption is None else str(caption)


def _records(file: SourceFile, images: Iterable[Annotated]) -> Iterator[Record]:
    """An image without captions still is one row, with an empty text: nothing vanishes.

    Raises:
        SourceError: none of the image files can be read.
    """
    number = missing = present = 0
    root = _root(file)
    for image, captions, chosen in images:
        texts = captions or [""]
        numbers = range(number, number + len(texts))
        number += len(texts)
        if not chosen:
            continue
        url, place, sha256 = _locate(image, root, file.origin)
        if place is not None:
            missing, present = missing + (sha256 is None), present + (sha256 is not None)
        for index, text in zip(numbers, texts, strict=True):
            yield Record(index, url, text, place, sha256)
    if missing and not present:
        raise SourceError(
            f"{file.path}: none of its images is in {root}; set image_root to their folder"
        )


def _root(file: SourceFile) -> str:
    """The folder of the images, by its full path: workers run elsewhere."""
    root = file.config.image_root
    if root is None:
        return file.path.rpartition("/")[0]
    return root if "://" in root else str(Path(root).expanduser().absolute())


def _locate(
    image: str | None, root: str, origin: Origin
) -> tuple[str | None, str | None, str | None]:
    """(url, media, sha256 of the image file) of what an annotation calls its image."""
    if image is None:
        return None, None, None
    place = None if is_url(image) else _place(image, root, origin)
    if place is None:
        return image.strip() or None, None, None
    try:
        return None, place, media.sha256(place)
    except (OSError, ValueError):
        return None, place, None


def _place(image: str, root: str, origin: Origin) -> str | None:
    """The file that an annotation means; None if it means none.

    People who annotate may name any file of a disk or a bucket. A list from the web names what
    lies below ``root``, so that its texts open nothing else, on this machine or another.
    """
    protocol = root.partition("://")[0] if "://" in root else None
    elsewhere = "://" in image and image.partition("://")[0] not in {protocol, *_STORES}
    if elsewhere or "::" in image or "\0" in image:
        return None
    whole = "://" in image or (protocol is None and image.startswith("/"))
    place = image if whole else f"{root.rstrip('/')}/{image}"
    below = posixpath.normpath(place).startswith(f"{posixpath.normpath(root).rstrip('/')}/")
    return place if below or origin == "human" else None
