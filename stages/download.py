"""Download: URLs, and images in files, to resized images with a status and a reason for each row.

Parts of img2dataset: the check of opt-out headers (see `stages.fetch`) and `Resizer`, which
resizes and encodes. The loop around them is ours, because img2dataset's gives rows in the order
of arrival, loses rows when a writer fails and still reports success, and resumes by shard number.
Here rows in = rows out, in order, whatever a server or a file does. Images are decoded by
`stages.models.images.decode` and handed to `Resizer` as plain pixels: its own decoder ignores EXIF
orientation, spoils 16-bit samples, and takes truncated files for whole ones.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from stages import media
from stages.base import Resources, ShardStage, operational
from stages.fetch import FetchConfig, Fetched, Fetcher
from stages.schemas import DOWNLOAD, SOURCES, check

if TYPE_CHECKING:
    from PIL import Image

STATUSES = (
    "success",
    "duplicate_row",  # an earlier row has the same image and text
    "invalid_url",  # not http(s), or no address at all
    "blocked_address",  # inside the network
    "dns",
    "refused",  # no connection
    "timeout",
    "tls",
    "http_4xx",
    "http_5xx",
    "redirect",  # too many, or to somewhere that is not followed
    "broken_response",  # not HTTP, reset, or cut short
    "opted_out",  # a header disallows the use
    "too_large",  # bytes or pixels
    "unreadable",  # a file or tar member that is not there
    "not_an_image",  # not one of the formats that are read
    "decode",  # an image by its first bytes, but damaged
    "too_small",
    "aspect",  # too long and narrow
    "failed",  # the worker or something unforeseen
    "quarantined",  # the row crashed its worker
)

_PHASH_SIZE = 16  # 16 x 16 = 256 bits


class DownloadConfig(FetchConfig):
    """What is fetched, and how images are kept."""

    image_size: int = Field(384, ge=1)
    """Pixels; of the shorter side with ``keep_ratio``."""
    resize_mode: Literal["no", "keep_ratio", "center_crop", "border", "keep_ratio_largest"] = (
        "keep_ratio"
    )
    """As in img2dataset. Images are never enlarged."""
    encode_format: Literal["jpg", "png", "webp"] = "jpg"
    encode_quality: int | None = Field(None, ge=0, le=100)
    """JPEG and WebP: 0 to 100, None is 95. PNG: compression level, 0 to 9, None is 6."""
    min_image_size: int = Field(1, ge=1)
    """Pixels of the shorter side, as downloaded, below which an image is ``too_small``."""
    max_aspect_ratio: float = Field(20.0, ge=1)
    """Longer side over shorter side."""
    max_pixels: int = Field(50_000_000, ge=1)
    """Checked before a pixel is decoded."""
    resources: Resources = operational(
        Resources(cpus=1.0, gpus=0.0, min_replicas=1, max_replicas=64)
    )

    @model_validator(mode="after")
    def _png_levels(self) -> DownloadConfig:
        if self.encode_format == "png" and (self.encode_quality or 0) > 9:
            raise ValueError(
                f"encode_quality: {self.encode_quality} is not allowed: "
                "with encode_format png it is the compression level, 0 to 9"
            )
        return self

    @property
    def quality(self) -> int:
        if self.encode_quality is not None:
            return self.encode_quality
        return 6 if self.encode_format == "png" else 95


@dataclass(frozen=True)
class Outcome:
    """What became of one sample: the columns of DOWNLOAD that depend on the image."""

    status: str
    detail: str | None = None
    sha256: str | None = None
    phash: str | None = None
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    image: bytes | None = None


class DownloadStage(ShardStage):
    """SOURCES → DOWNLOAD: one row out for each row in, in order.

    Each sample of the shard is fetched once; the first of its rows that is no repeat holds the
    image, later ones have null there and the same status.
    """

    name = "download"
    version = 1
    input_schema = SOURCES
    output_schema = DOWNLOAD

    def __init__(self, config: DownloadConfig) -> None:
        self.config = config

    @property
    def resources(self) -> Resources:
        return self.config.resources

    def setup(self) -> None:
        self._fetcher = Fetcher(self.config)
        self._keep = ImageKeeper(self.config)

    def process(self, table: pa.Table) -> pa.Table:
        rows = check(table, SOURCES, "download input").to_pylist()
        first: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row["repeat_of"] is None:
                first.setdefault(row["sample_id"], row)
        outcomes = dict(self._outcomes(list(first.values())))
        return _table(rows, outcomes)

    def failed(self, table: pa.Table, status: str, detail: str) -> pa.Table:
        rows = [{**row, "repeat_of": None} for row in table.to_pylist()]
        return _table(rows, {row["sample_id"]: Outcome(status, detail) for row in rows})

    def _outcomes(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Outcome]]:
        """(sample_id, outcome) of each row, in the order of arrival."""
        of_media: dict[str, list[str]] = {}
        of_url: dict[str, str] = {}
        for row in rows:
            if row["url"] is not None:
                of_url[row["sample_id"]] = row["url"]
            elif row["media"] is not None:
                of_media.setdefault(row["media"], []).append(row["sample_id"])
            else:
                yield row["sample_id"], Outcome("invalid_url", "neither a URL nor an image file")
        for name, data in media.read_many(of_media, self.config.max_bytes):
            if isinstance(data, OSError):
                outcome = Outcome("unreadable", str(data)[:300])
            else:
                outcome = self._keep(data)
            yield from ((sample, outcome) for sample in of_media[name])
        for sample, fetched in self._fetch_all(of_url):
            if fetched.status == "success":
                yield sample, self._keep(fetched.body, fetched.content_type)
            else:
                yield sample, Outcome(fetched.status, fetched.detail)

    def _fetch_all(self, urls: Mapping[str, str]) -> Iterator[tuple[str, Fetched]]:
        """Fetches in threads. Images are decoded by the caller, one at a time: what lies in
        memory is one decoded image and at most two bodies a thread."""
        waiting: dict[Future[Fetched], str] = {}
        with ThreadPoolExecutor(self.config.threads, thread_name_prefix="fetch") as pool:
            for sample, url in urls.items():
                waiting[pool.submit(self._fetcher.fetch, url)] = sample
                if len(waiting) >= 2 * self.config.threads:
                    yield from _finished(waiting)
            while waiting:
                yield from _finished(waiting)


class ImageKeeper:
    """Encoded image bytes in, `Outcome` out: checked, decoded, hashed, resized, encoded again.

    The same bytes give the same outcome. Metadata is dropped, EXIF orientation applied first.
    """

    def __init__(self, config: DownloadConfig) -> None:
        self._config = config
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or its import asks the network
        from img2dataset import resizer

        # It would send the whole process's stdout and stderr to /dev/null during every resize, to
        # hide what OpenCV's decoders print; they are given plain pixels and print nothing.
        resizer.SuppressStdoutStderr = nullcontext
        self._resizer: Callable[[io.BytesIO], tuple[Any, ...]] = resizer.Resizer(
            image_size=config.image_size,
            resize_mode=config.resize_mode,
            resize_only_if_bigger=True,
            encode_quality=config.quality,
            encode_format=config.encode_format,
        )

    def __call__(self, data: bytes, content_type: str = "") -> Outcome:
        if len(data) > self._config.max_bytes:
            return Outcome("too_large", f"more than {self._config.max_bytes} bytes")
        sha256 = hashlib.sha256(data).hexdigest()
        try:
            with warnings.catch_warnings():  # what Pillow thinks of a file ends up in `detail`
                warnings.simplefilter("ignore")
                outcome = self._refused(data, content_type) or self._kept(data)
        except Exception as error:  # noqa: BLE001 - one row's decode: decoders raise anything
            outcome = Outcome(
                "decode", f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            )
        return replace(outcome, sha256=sha256)

    def _refused(self, data: bytes, content_type: str) -> Outcome | None:
        """Why an image is not even decoded, from its header alone."""
        from PIL import Image, UnidentifiedImageError

        from stages.models.images import FORMATS

        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
        except UnidentifiedImageError:
            kind = f" (content type {content_type[:60]})" if content_type else ""
            what = "an empty body" if not data else f"not one of {', '.join(FORMATS)}"
            return Outcome("not_an_image", what + kind)
        except Image.DecompressionBombError as error:
            return Outcome("too_large", str(error)[:300])
        size = f"{width}x{height} pixels"
        if width * height > self._config.max_pixels:
            return Outcome("too_large", f"{size}, at most {self._config.max_pixels} in all")
        if min(width, height) < self._config.min_image_size:
            return Outcome("too_small", f"{size}, at least {self._config.min_image_size} a side")
        if max(width, height) > self._config.max_aspect_ratio * min(width, height):
            return Outcome("aspect", f"{size}, at most {self._config.max_aspect_ratio:g} to 1")
        return None

    def _kept(self, data: bytes) -> Outcome:
        from stages.models.images import decode

        picture = decode(data, self._config.max_pixels)
        original_width, original_height = picture.size
        phash = perceptual_hash(picture)
        pixels = io.BytesIO()
        picture.save(pixels, "BMP")
        del picture
        image, width, height, _, _, problem = self._resizer(pixels)
        if problem is not None or not image:
            return Outcome("decode", f"resizing: {problem}"[:300])
        size = (width, height, original_width, original_height)
        return Outcome("success", None, None, phash, *size, image)


def perceptual_hash(picture: Image.Image) -> str:
    """256-bit DCT hash, 64 hex digits: `imagehash.phash` with ``hash_size=16``.

    The hash looks at 64 x 64 grey pixels. They are made here, by box filter and then Lanczos,
    several times faster than `imagehash` would by Lanczos alone; a bit or two may differ.
    """
    import imagehash
    from PIL import Image

    side = 4 * _PHASH_SIZE  # imagehash's highfreq_factor
    grey = picture.convert("L").resize((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return str(imagehash.phash(grey, hash_size=_PHASH_SIZE))


def _finished(waiting: dict[Future[Fetched], str]) -> list[tuple[str, Fetched]]:
    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
    return [(waiting.pop(future), future.result()) for future in done]


def _table(rows: Sequence[Mapping[str, Any]], outcomes: Mapping[str, Outcome]) -> pa.Table:
    """DOWNLOAD rows; the first row of a sample takes its image."""
    seen: set[str] = set()
    out = []
    for row in rows:
        sample = row["sample_id"]
        if row["repeat_of"] is not None:
            outcome = Outcome("duplicate_row", f"same image and text as row {row['repeat_of']}")
        else:
            outcome = outcomes[sample]
            if sample in seen:
                outcome = replace(outcome, image=None)
            seen.add(sample)
        kept = {name: row[name] for name in ("row_id", "sample_id", "source", "url", "text")}
        out.append({**kept, **vars(outcome)})
    return pa.Table.from_pylist(out, schema=DOWNLOAD)
