"""Bytes, headers, URLs and texts that mean harm: a status each, within time and memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stages.connect import FetchError, is_public, parse_url
from stages.crawl import Crawler
from stages.download import STATUSES, DownloadConfig
from stages.fetch import FetchConfig
from stages.keeper import ImageKeeper
from tests.bench.download import photo
from tests.servers import WebServer, picture

FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
needs_data = pytest.mark.skipif(
    "CAPFILT_TEST_DATA" not in os.environ, reason="CAPFILT_TEST_DATA is unset"
)


@pytest.fixture(scope="module")
def keeper() -> ImageKeeper:
    return ImageKeeper(DownloadConfig(max_aspect_ratio=10_000))


# ---- images ----------------------------------------------------------------------------------


@needs_data
def test_every_hostile_file_ends_as_its_manifest_says(keeper: ImageKeeper) -> None:
    """Kept is what Pillow can load whole, in a format and a colour space that are read. Of several
    frames only the first counts."""
    from stages.models.images import FORMATS

    folder = Path(os.environ["CAPFILT_TEST_DATA"]) / "hostile"
    for line in (folder / "manifest.jsonl").read_text().splitlines():
        entry = json.loads(line)
        pillow, file = entry["pillow"], entry["file"]
        found = keeper((folder / file).read_bytes())
        assert found.status in {"success", "not_an_image", "decode", "too_large"}, file
        known = pillow.get("format") in {*FORMATS, "MPO"} and pillow.get("mode") != "LAB"
        if pillow.get("frames", 1) == 1 or pillow["ok"]:
            assert (found.status == "success") == (pillow["ok"] and known), (file, found.detail)
        if found.image is None:
            assert found.detail, file
            continue
        with Image.open(io.BytesIO(found.image)) as image:
            assert (image.format, image.size) == ("JPEG", (found.width, found.height))
            assert not {"exif", "icc_profile", "xmp", "comment"} & set(image.info)


def png(width: int, height: int, data: bytes) -> bytes:
    """A PNG of 8-bit RGB whose pixels are whatever ``data`` holds."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + b"\x08\x02\x00\x00\x00"
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def text_bomb() -> bytes:
    """A PNG with a compressed comment of 50 MB."""
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "a" * 50_000_000, zip=True)
    return encoded(Image.new("RGB", (8, 8)), "PNG", pnginfo=info)


def many_scans() -> bytes:
    """A progressive JPEG of 16 megapixels whose last scan, of 53 bytes, comes 10,000 times."""
    data = encoded(Image.new("L", (4000, 4000)), "JPEG", progressive=True)
    table = data.rfind(b"\xff\xc4")
    return data[:-2] + data[table:-2] * 10_000 + data[-2:]


BOMBS: dict[str, tuple[Callable[[], bytes], set[str]]] = {
    "more pixels than declared": (lambda: png(8, 8, bytes(100_000_000)), {"success", "decode"}),
    "fewer pixels than declared": (lambda: png(4000, 4000, bytes(100)), {"decode"}),
    "huge canvas": (lambda: png(60_000, 60_000, bytes(100)), {"too_large"}),
    "no pixels": (lambda: png(0, 0, b""), {"decode", "not_an_image", "too_small"}),
    "compressed comment": (text_bomb, {"decode", "not_an_image", "success"}),
    "many frames": (
        lambda: encoded(
            Image.new("P", (2000, 2000)),
            "GIF",
            save_all=True,
            append_images=[Image.new("P", (2000, 2000), n) for n in range(1, 60)],
        ),
        {"success"},
    ),
    "many scans": (many_scans, {"decode"}),
    "grey TIFF": (
        lambda: encoded(Image.new("L", (40_000, 40_000)), "TIFF", compression="tiff_deflate"),
        {"too_large"},
    ),
    "deep TIFF": (
        lambda: encoded(Image.new("F", (4000, 4000)), "TIFF", compression="tiff_deflate"),
        {"too_large"},
    ),
    "SVG that includes a file": (
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>',
        {"not_an_image"},
    ),
    "gzipped SVG": (lambda: gzip.compress(b"<svg/>"), {"not_an_image"}),
    "PDF": (lambda: b"%PDF-1.7\n%\xe2\xe3", {"not_an_image"}),
    "XML entities": (
        lambda: b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "&c;&c;">]><a>&b;</a>',
        {"not_an_image"},
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(keeper: ImageKeeper, name: str) -> None:
    make, statuses = BOMBS[name]
    assert keeper(make()).status in statuses


@pytest.mark.parametrize("inside", ["PNG", "BMP"])
def test_an_icon_is_not_decoded_before_it_is_known_to_be_small(
    keeper: ImageKeeper, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.BytesIO()
    options = {"sizes": [(64, 64)], "bitmap_format": inside.lower()}
    Image.new("RGBA", (64, 64)).save(out, "ICO", **options)
    assert keeper(out.getvalue()).status == "success"
    small = ImageKeeper(DownloadConfig(max_pixels=64 * 64 - 1))
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was opened"))
    # A bitmap's header tells of twice the height: its mask follows.
    assert small(out.getvalue()).status == "too_large"


@pytest.mark.parametrize("length", range(0, 40, 3))
def test_icons_that_end_early(keeper: ImageKeeper, length: int) -> None:
    data = (b"\0\0\1\0\xff\xff" + b"\xff" * 60)[:length]
    assert keeper(data).status in {"not_an_image", "decode", "too_large"}


def test_a_worker_stays_below_a_gibibyte(tmp_path: Path) -> None:
    """The largest pictures that are allowed, in the modes that take most memory to decode, from
    several threads at once, in a shard of as many ordinary ones as is usual; until its tar is
    written."""
    side = 4990
    packed = {"compression": "tiff_deflate"}
    for mode in ("RGBA", "LA"):
        (tmp_path / mode).write_bytes(encoded(Image.new(mode, (side, side)), "PNG"))
    (tmp_path / "CMYK").write_bytes(encoded(Image.new("CMYK", (side, side)), "TIFF", **packed))
    (tmp_path / "I;16").write_bytes(encoded(Image.new("I;16", (2490, 2490)), "PNG"))
    for seed in range(8):
        (tmp_path / f"photo-{seed}").write_bytes(photo(seed))
    code = """
import sys
from pathlib import Path
import pyarrow as pa
from pipeline.images import write_tar
from stages.download import DownloadConfig, DownloadStage
from stages.ingest import IngestConfig
from stages.schemas import SOURCES
folder, size = Path(sys.argv[1]), IngestConfig().shard_size
photos = sorted(file.name for file in folder.glob("photo-*"))
large = sorted({file.name for file in folder.iterdir()} - set(photos))
names = (2 * large + size * photos)[:size]
rows = [f"{folder}/{'./' * n}{name}" for n, name in enumerate(names)]  # each another image
shard = [
    dict.fromkeys(SOURCES.names)
    | {"row_id": str(n), "sample_id": str(n), "source": "web", "text": "t", "media": media}
    for n, media in enumerate(rows)
]
stage = DownloadStage(DownloadConfig(decode_threads=4))
stage.setup()
out = stage.process(pa.Table.from_pylist(shard, schema=SOURCES))
assert set(out["status"].to_pylist()) == {"success"}, out["detail"].unique()
tar = write_tar(out)
assert len(tar) > 40_000 * len(rows), len(tar)
line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(int(line.split()[1]) // 1024)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1024, f"{done.stdout.strip()} MiB"


@given(st.binary(max_size=200), st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]))
@FUZZ
def test_spoiled_images_get_a_status(keeper: ImageKeeper, noise: bytes, format: str) -> None:
    data = bytearray(picture(40, 30, format=format))
    for index, byte in enumerate(noise):
        data[(index * 7919 + byte * 31) % len(data)] ^= byte
    outcome = keeper(bytes(data), "image/jpeg")
    assert outcome.status in STATUSES
    assert (outcome.image is not None) == (outcome.status == "success")


# ---- the wire --------------------------------------------------------------------------------


class RawServer:
    """Answers every connection with the same bytes, whatever was asked."""

    def __init__(self) -> None:
        self.answer = b""
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.recv(65536)
                    connection.sendall(self.answer)
                except OSError:
                    continue

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(scope="module")
def raw() -> Iterator[tuple[RawServer, Crawler]]:
    server = RawServer()
    options = {"timeout": 2.0, "total_timeout": 4.0, "retries": 0, "host_failures": 10**9}
    crawler = Crawler(FetchConfig(connect_to={"raw.test": server.address}, **options))
    yield server, crawler
    crawler.close()
    server.close()


_NAMES = st.sampled_from(
    [
        *("Content-Length", "Transfer-Encoding", "Content-Encoding", "Content-Type", "Location"),
        *("Retry-After", "X-Robots-Tag", "TDM-Reservation", "Set-Cookie", "X\x00Y"),
    ]
)
_VALUES = st.one_of(
    st.sampled_from(["-1", "99999999999999999999", "chunked", "gzip", "br", "identity", "noai"])
    | st.sampled_from(["file:///etc/passwd", "//[", "http://127.0.0.1/", "http://raw.test\x00/"]),
    st.text(max_size=60),
)


@given(
    st.sampled_from([b"HTTP/1.1 ", b"HTTP/1.0 ", b"HTTP/9 ", b"ICY ", b""]),
    st.one_of(st.integers(-1, 1000).map(str), st.text(max_size=5)),
    st.lists(st.tuples(_NAMES, _VALUES), max_size=5),
    st.binary(max_size=300),
)
@FUZZ
def test_any_answer_gets_a_status(
    raw: tuple[RawServer, Crawler],
    version: bytes,
    code: str,
    headers: list[tuple[str, str]],
    body: bytes,
) -> None:
    server, crawler = raw
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    server.answer = version + f"{code} x\r\n{lines}\r\n".encode("utf-8", "replace") + body
    ((_, fetched),) = crawler.fetch_all({"it": "http://raw.test/a.jpg"})
    assert fetched.status in STATUSES
    assert fetched.status != "failed", fetched.detail
    assert (fetched.detail is None) == (fetched.status == "success")


_URLS = st.one_of(
    st.text(max_size=80),
    st.builds(
        "{}://{}{}{}".format,
        st.sampled_from(["http", "https", "HTTP", "file", "ftp", "gopher", "data", ""]),
        st.text(max_size=40),
        st.sampled_from(["", ":80", ":0", ":99999", ":-1", ":٣", "@", "@a.test", "\\@a.test"]),
        st.text(max_size=40),
    ),
)


@given(_URLS)
@settings(max_examples=500, deadline=None)
def test_any_url_is_taken_apart_or_refused(url: str) -> None:
    try:
        target = parse_url(url)
    except FetchError as error:
        assert error.status == "invalid_url"
        return
    assert target.scheme in {"http", "https"}
    assert target.host.isascii()
    assert target.path.isascii()
    assert not {"\r", "\n", " ", "\0"} & set(target.host + target.path)
    assert 0 <= target.port < 65536


@given(st.ip_addresses())
def test_private_addresses_are_refused_in_every_range(address: object) -> None:
    import ipaddress

    ip = ipaddress.ip_address(str(address))
    if ip.is_private or ip.is_loopback or ip.is_link_local or ip.is_multicast:
        assert not is_public(str(ip))


@pytest.mark.parametrize("tenth", range(10))
def test_bodies_cut_at_every_tenth_are_no_image(tenth: int) -> None:
    body = picture(200, 150)
    part = body[: len(body) * tenth // 10]
    with WebServer() as web:
        web.serve("/honest.jpg", part)
        web.serve("/named.png", part, content_type="image/png")
        crawler = Crawler(FetchConfig(connect_to=web.connect_to))
        urls = {path: web.url(path) for path in ("/honest.jpg", "/named.png")}
        found = dict(crawler.fetch_all(urls))
        crawler.close()
    keep = ImageKeeper(DownloadConfig())
    for fetched in found.values():
        assert keep(fetched.body, fetched.content_type).status in {"decode", "not_an_image"}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_the_name_and_the_content_type_count_for_nothing(format: str) -> None:
    outcome = ImageKeeper(DownloadConfig())(picture(format=format), "text/html")
    assert outcome.status == "success"


# ---- colours ---------------------------------------------------------------------------------


def swapped_profile() -> bytes:
    """An ICC profile in which red and blue have changed places."""
    from PIL import ImageCms

    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    table = {bytes(data[i : i + 4]): i for i in range(132, 132 + 12 * data[131], 12)}
    red, blue = table[b"rXYZ"], table[b"bXYZ"]
    data[red : red + 4], data[blue : blue + 4] = data[blue : blue + 4], data[red : red + 4]
    name = data.find("sRGB".encode("utf-16-be"))
    if name >= 0:
        data[name : name + 8] = "odd ".encode("utf-16-be")
    return bytes(data)


def test_colours_become_srgb() -> None:
    keep = ImageKeeper(DownloadConfig(encode_format="png", encode_quality=1))
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    plain = keep(encoded(red, "PNG"))
    turned = keep(encoded(red, "PNG", icc_profile=swapped_profile()))
    broken = keep(encoded(red, "PNG", icc_profile=b"not a profile"))
    shown = [Image.open(io.BytesIO(o.image or b"")) for o in (plain, turned, broken)]
    colours = [np.asarray(image.convert("RGB"))[8, 8].tolist() for image in shown]
    assert colours[0] == [255, 0, 0] == colours[2]
    assert colours[1][2] > 240
    assert colours[1][0] < 15
    assert all("icc_profile" not in image.info for image in shown)


def test_large_jpegs_are_decoded_small_and_measured_whole() -> None:
    image = Image.new("RGB", (3001, 2001), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    keep = ImageKeeper(DownloadConfig(image_size=100))
    flat, turned = keep(encoded(image, "JPEG")), keep(encoded(image, "JPEG", exif=exif))
    assert (flat.original_width, flat.original_height) == (3001, 2001)
    assert (turned.original_width, turned.original_height) == (2001, 3001)
    assert (flat.width, flat.height) == (150, 100)
    assert (turned.width, turned.height) == (100, 150)
