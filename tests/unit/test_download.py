"""A shard in, as many rows out: whatever the web sends."""

import hashlib
import io
import os
import socket
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pydantic import ValidationError

from stages import ids
from stages.base import fingerprinted
from stages.download import STATUSES, DownloadConfig, DownloadStage
from stages.keeper import ImageKeeper, perceptual_hash
from stages.schemas import DOWNLOAD, SOURCES, check
from tests.servers import HTML, SVG, WebServer, gzip_bomb, known_locally, picture
from tests.unit.test_readers import tar


@pytest.fixture(scope="module")
def web() -> Iterator[WebServer]:
    with WebServer() as server:
        yield server


def stage(web: WebServer, **options: Any) -> DownloadStage:
    quick = {"timeout": 0.5, "total_timeout": 1.0, "retries": 0, "threads": 8, "image_size": 32}
    made = DownloadStage(DownloadConfig(**{**quick, "connect_to": web.connect_to, **options}))
    made.setup()
    return made


def sources(*rows: dict[str, Any]) -> pa.Table:
    """SOURCES with ids filled in; row ids are the row numbers."""
    filled = []
    for number, row in enumerate(rows):
        key = row.get("url") or row.get("media") or f"row {number}"
        whole = dict.fromkeys(SOURCES.names) | {"source": "web", "text": "t"}
        known = {"row_id": str(number), "sample_id": ids.sample_id(key)}
        filled.append({**whole, **known, **row})
    return pa.Table.from_pylist(filled, schema=SOURCES)


def run(made: DownloadStage, table: pa.Table) -> list[dict[str, Any]]:
    out = check(made.process(table), DOWNLOAD, "download output")
    assert out["row_id"].to_pylist() == table["row_id"].to_pylist()
    assert set(out["status"].to_pylist()) <= set(STATUSES)
    rows: list[dict[str, Any]] = out.to_pylist()
    return rows


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def pixels(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_every_fault_in_one_shard_in_order(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", known_locally)
    expected = {
        web.serve("/a.jpg", picture(100, 50)): "success",
        web.url("/404"): "http_4xx",
        web.url("/500"): "http_5xx",
        web.url("/hang"): "timeout",
        web.url("/drip"): "timeout",
        web.url("/html"): "not_an_image",
        web.url("/htmlimage"): "not_an_image",
        web.url("/svg"): "not_an_image",
        web.url("/empty"): "not_an_image",
        web.url("/noai"): "opted_out",
        web.url("/cut"): "broken_response",
        web.url("/gzipbomb"): "too_large",
        web.url("/to?file:///etc/passwd"): "redirect",
        web.url("/to?http://169.254.169.254/"): "blocked_address",
        "http://127.0.0.1/a.jpg": "blocked_address",
        "http://no-such-name.invalid/a.jpg": "dns",
        "not a url": "invalid_url",
        web.serve("/corrupt.jpg", picture()[:300]): "decode",
        web.serve("/long.png", picture(700, 10, format="PNG")): "aspect",
        web.serve("/tiny.png", picture(4, 4, format="PNG")): "too_small",
        web.serve("/b.jpg", picture(50, 100)): "success",
    }
    made = stage(web, min_image_size=8, timeout=1.0)
    gzip_bomb()  # made here, or a busy machine takes longer than the time-out
    start = time.monotonic()
    rows = run(made, sources(*({"url": url} for url in expected)))
    assert {row["url"]: row["status"] for row in rows} == expected
    assert time.monotonic() - start < 15
    for row in rows:
        good = row["status"] == "success"
        assert (row["image"] is not None) == good == (row["detail"] is None)


def test_an_image_and_its_columns(web: WebServer) -> None:
    data = picture(100, 50)
    (row,) = run(stage(web), sources({"url": web.serve("/p.jpg", data), "text": "a cat"}))
    assert (row["width"], row["height"]) == (64, 32)
    assert (row["original_width"], row["original_height"]) == (100, 50)
    assert row["sha256"] == hashlib.sha256(data).hexdigest()
    assert row["phash"] == perceptual_hash(Image.open(io.BytesIO(data)).convert("RGB"))
    assert len(row["phash"]) == 64
    assert (row["source"], row["text"]) == ("web", "a cat")
    kept = Image.open(io.BytesIO(row["image"]))
    assert (kept.format, kept.size) == ("JPEG", (64, 32))


def test_threads_that_decode_change_nothing(web: WebServer) -> None:
    files = [picture(40 + n, 30 + n, seed=n) for n in range(24)] + [b"", picture()[:300]]
    urls = [web.serve(f"/threads-{n}.jpg", data) for n, data in enumerate(files)]
    table = sources(*({"url": url} for url in urls))
    one, many = (run(stage(web, decode_threads=count), table) for count in (1, 5))
    for rows in (one, many):
        statuses = [row["status"] for row in rows]
        assert statuses == ["success"] * 24 + ["not_an_image", "decode"], rows
    assert one == many
    assert len({row["pixel_sha256"] for row in one}) == 25  # None where there are no pixels


def test_large_bodies_are_given_back_whatever_becomes_of_them(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = picture(1200, 900, format="BMP")
    assert len(large) > 2 << 20
    bodies = [large, b"\xff\xd8\xff" + bytes(2 << 20), large[: 2 << 20]]
    urls = [web.serve(f"/back-{n}.bmp", body) for n, body in enumerate(bodies)]
    other = web.serve("/back-other.bmp", large)
    rows = [{"url": url} for url in urls] + [{"url": other, "image_hash": "0" * 32}]
    made = stage(web, timeout=5.0, total_timeout=10.0)
    whole = made._crawler._fetcher._memory._left
    statuses = [row["status"] for row in run(made, sources(*rows))]
    assert statuses == ["success", "not_an_image", "decode", "hash_mismatch"]
    assert made._crawler._fetcher._memory._left == whole

    def broken(*_: object) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(made, "_keep", broken)
    with pytest.raises(RuntimeError, match="unforeseen"):
        made.process(sources(*rows))
    deadline = time.monotonic() + 10
    while made._crawler._fetcher._memory._left < whole and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made._crawler._fetcher._memory._left == whole


def test_one_fetch_and_one_image_for_each_sample(web: WebServer) -> None:
    url = web.serve("/shared.jpg", picture(seed=3))
    before = web.hits["/shared.jpg"]
    rows = run(
        stage(web),
        sources(
            {"url": url, "text": "one", "repeat_of": "of an earlier shard"},
            {"url": url, "text": "two"},
            {"url": url, "text": "two", "repeat_of": "1"},
            {"url": url, "text": "three"},
        ),
    )
    assert web.hits["/shared.jpg"] - before == 1
    statuses = [row["status"] for row in rows]
    assert statuses == ["duplicate_row", "success", "duplicate_row", "success"]
    assert [row["image"] is not None for row in rows] == [False, True, False, False]
    assert rows[1]["sha256"] == rows[3]["sha256"]
    assert rows[0]["sha256"] is None
    assert rows[3]["width"] == rows[1]["width"]


def test_the_same_bytes_give_the_same_rows(web: WebServer) -> None:
    urls = [web.serve(f"/same{i}.jpg", picture(seed=i)) for i in range(20)]
    table = sources(*({"url": url} for url in urls), {"url": web.url("/404")})
    assert stage(web).process(table).equals(stage(web, threads=1).process(table))


def test_images_in_files_and_tars(web: WebServer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(seed=1, format="PNG"))
    (tmp_path / "huge.png").write_bytes(b"x" * 100_001)
    archive = tar(tmp_path / "b.tar", {"0.jpg": picture(seed=2), "1.jpg": b"broken"})
    rows = run(
        stage(web, max_bytes=100_000),
        sources(
            {"media": f"{archive}#1.jpg"},
            {"media": str(tmp_path / "a.png"), "source": "human", "text": "one"},
            {"media": str(tmp_path / "a.png"), "source": "human", "text": "two"},
            {"media": str(tmp_path / "gone.png")},
            {"media": f"{archive}#gone.jpg"},
            {"media": str(tmp_path / "huge.png")},
            {"media": f"{archive}#0.jpg"},
            {},
        ),
    )
    assert [row["status"] for row in rows] == [
        "not_an_image",
        "success",
        "success",
        "unreadable",
        "unreadable",
        "too_large",
        "success",
        "no_url",
    ]
    assert rows[2]["image"] is None
    assert rows[1]["url"] is None


def test_files_that_are_not_begun_in_time_are_timeouts(web: WebServer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(seed=1, format="PNG"))
    archive = tar(tmp_path / "b.tar", {"0.jpg": picture(seed=2)})
    table = sources(
        {"media": f"{archive}#0.jpg"},
        {"media": str(tmp_path / "a.png"), "source": "human", "text": "one"},
        {"url": web.serve("/late.jpg", picture(seed=3))},
    )
    rows = run(stage(web, shard_timeout=1e-6), table)
    assert [row["status"] for row in rows] == ["timeout"] * 3
    assert web.hits["/late.jpg"] == 0
    assert {row["status"] for row in run(stage(web), table)} == {"success"}


def test_bytes_must_have_the_hash_that_the_source_says(web: WebServer, tmp_path: Path) -> None:
    data = picture(seed=9)
    url = web.serve("/hashed.jpg", data)
    (tmp_path / "a.jpg").write_bytes(data)
    known = [hashlib.new(name, data).hexdigest() for name in ("md5", "sha1", "sha256", "sha512")]
    for expected in known:
        (row,) = run(stage(web), sources({"url": url, "image_hash": expected}))
        assert row["status"] == "success"
    for wrong in (known[0][::-1], known[2][::-1], "nothing like it"):
        (row,) = run(stage(web), sources({"url": url, "image_hash": wrong}))
        assert (row["status"], row["image"]) == ("hash_mismatch", None)
        assert row["sha256"] == known[2]


def test_failed_rows_need_no_set_up(web: WebServer) -> None:
    table = sources({"url": web.url("/a.jpg")}, {"url": web.url("/b.jpg"), "repeat_of": "0"})
    out = DownloadStage(DownloadConfig()).failed(table, "quarantined", "crashed its worker")
    check(out, DOWNLOAD, "failed")
    assert out["status"].to_pylist() == ["quarantined"] * 2
    assert out["detail"].to_pylist() == ["crashed its worker"] * 2
    assert out["row_id"].to_pylist() == ["0", "1"]
    assert out["image"].null_count == 2


def test_an_empty_shard_gives_an_empty_table(web: WebServer) -> None:
    assert run(stage(web), sources()) == []


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_dropped(orientation: int) -> None:
    upright = Image.new("RGB", (60, 40), "blue")
    upright.paste("red", (0, 0, 30, 20))  # the upper left quarter
    turned = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if turned is None else upright.transpose(turned)
    exif = Image.Exif()
    exif[0x0112] = orientation
    outcome = ImageKeeper(DownloadConfig(image_size=20))(encoded(stored, "JPEG", exif=exif))
    assert (outcome.width, outcome.height) == (30, 20)
    assert (outcome.original_width, outcome.original_height) == (60, 40)
    assert outcome.image is not None
    kept = pixels(outcome.image)
    assert kept[4, 4, 0] > 200
    assert kept[15, 25, 0] < 60
    assert not Image.open(io.BytesIO(outcome.image)).getexif()


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        ("no", (100, 50)),
        ("keep_ratio", (40, 20)),
        ("center_crop", (20, 20)),
        ("border", (20, 20)),
        ("keep_ratio_largest", (20, 10)),
    ],
)
@pytest.mark.parametrize(("format", "quality"), [("jpg", 90), ("png", 6), ("webp", 90)])
def test_resize_modes_and_encodings(
    mode: Any, size: tuple[int, int], format: Any, quality: int
) -> None:
    config = DownloadConfig(
        image_size=20, resize_mode=mode, encode_format=format, encode_quality=quality
    )
    outcome = ImageKeeper(config)(picture(100, 50))
    assert outcome.image is not None
    assert Image.open(io.BytesIO(outcome.image)).size == size == (outcome.width, outcome.height)


def test_small_images_are_never_enlarged() -> None:
    outcome = ImageKeeper(DownloadConfig(image_size=500))(picture(100, 50))
    assert (outcome.width, outcome.height) == (100, 50)


def test_odd_pixels_become_rgb() -> None:
    config = DownloadConfig(image_size=500, encode_format="png", encode_quality=1)
    keeper = ImageKeeper(config)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    deep = Image.fromarray(np.full((8, 8), 128 * 256, dtype=np.uint16))
    cases = {
        "transparent": (encoded(clear, "PNG"), (255, 255, 255)),
        "16 bit": (encoded(deep, "PNG"), (128, 128, 128)),
        "grey": (encoded(Image.new("L", (8, 8), 77), "PNG"), (77, 77, 77)),
        "palette": (encoded(Image.new("RGB", (8, 8), "lime").quantize(), "GIF"), (0, 255, 0)),
    }
    for name, (data, colour) in cases.items():
        outcome = keeper(data)
        assert outcome.image is not None, name
        assert tuple(pixels(outcome.image)[4, 4]) == colour, name


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("tenth", range(10))
def test_truncated_images_are_never_kept(format: str, tenth: int) -> None:
    data = picture(200, 150, format=format)
    outcome = ImageKeeper(DownloadConfig())(data[: len(data) * tenth // 10])
    assert outcome.status in {"decode", "not_an_image"}
    assert outcome.image is None


def test_pixels_are_counted_before_they_are_decoded() -> None:
    bomb = encoded(Image.new("1", (8_000, 8_000)), "PNG")
    assert len(bomb) < 200_000
    start = time.monotonic()
    outcome = ImageKeeper(DownloadConfig())(bomb)
    assert outcome.status == "too_large"
    assert time.monotonic() - start < 1
    limit = DownloadConfig(max_pixels=99)
    assert ImageKeeper(limit)(picture(10, 10)).status == "too_large"
    assert ImageKeeper(limit)(picture(11, 9)).status == "success"
    header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (2**31 - 1).to_bytes(4, "big") * 2
    header += b"\x08\x02\x00\x00\x00"
    header += zlib.crc32(header[12:]).to_bytes(4, "big") + b"\x00\x00\x00\x09IDAT" + bytes(13)
    assert ImageKeeper(DownloadConfig())(header).status == "too_large"


@pytest.mark.parametrize("data", [b"", HTML, SVG, b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x00" * 1000])
def test_other_formats_are_not_images(data: bytes) -> None:
    outcome = ImageKeeper(DownloadConfig())(data, "image/jpeg")
    assert outcome.status == "not_an_image"
    assert "image/jpeg" in (outcome.detail or "")
    assert outcome.sha256 == hashlib.sha256(data).hexdigest()


def test_resizing_leaves_the_output_of_the_process_alone(capfd: pytest.CaptureFixture[str]) -> None:
    keeper = ImageKeeper(DownloadConfig(image_size=20))
    inner = keeper._resizer

    def loud(stream: io.BytesIO) -> tuple[Any, ...]:
        os.write(2, b"before ")
        result = inner(stream)
        os.write(2, b"after")
        return result

    keeper._resizer = loud
    assert keeper(picture()).status == "success"
    assert capfd.readouterr().err == "before after"


def test_png_quality_is_a_level() -> None:
    with pytest.raises(ValidationError, match="compression level, 0 to 9"):
        DownloadConfig(encode_format="png", encode_quality=95)
    assert DownloadConfig(encode_format="png").quality == 6
    assert DownloadConfig(encode_format="png", encode_quality=0).quality == 0


def test_only_what_changes_rows_is_fingerprinted() -> None:
    covered = fingerprinted(DownloadConfig(connect_to={"a": "127.0.0.1:1"}, threads=7))
    assert {"image_size", "max_bytes", "respect_opt_out", "disallowed_directives"} <= set(covered)
    operational = {"threads", "timeout", "retries", "user_agent", "connect_to", "resources"}
    assert not operational & set(covered)


@pytest.mark.skipif("CAPFILT_TEST_DATA" not in os.environ, reason="CAPFILT_TEST_DATA is unset")
def test_hostile_files_all_get_a_status(
    web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever writes a file, beside itself or as a temporary one, writes it here.
    for name in ("work", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    folder = Path(os.environ["CAPFILT_TEST_DATA"]) / "hostile"
    files = sorted(path for path in folder.iterdir() if path.suffix != ".jsonl")
    urls = [web.serve(f"/hostile/{i}", path.read_bytes()) for i, path in enumerate(files)]
    made = stage(web, timeout=10, total_timeout=20, max_aspect_ratio=1000)
    counts = Counter(row["status"] for row in run(made, sources(*({"url": url} for url in urls))))
    assert sum(counts.values()) == len(files)
    assert set(counts) <= {"success", "not_an_image", "decode", "too_large"}
    assert counts["success"] > 0.7 * len(files)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "temporary", tmp_path / "work"]


@pytest.mark.skipif("CAPFILT_TEST_DATA" not in os.environ, reason="CAPFILT_TEST_DATA is unset")
def test_real_photos_keep_their_look(web: WebServer) -> None:
    folder = Path(os.environ["CAPFILT_TEST_DATA"]) / "photos"
    files = sorted(folder.glob("*.jpg"))[:40]
    urls = [web.serve(f"/photos/{i}", path.read_bytes()) for i, path in enumerate(files)]
    made = stage(web, image_size=128, timeout=10, total_timeout=20)
    for path, row in zip(files, run(made, sources(*({"url": url} for url in urls))), strict=True):
        assert row["status"] == "success", row["detail"]
        original = Image.open(path).convert("RGB").resize((row["width"], row["height"]), Image.BOX)
        assert np.abs(pixels(row["image"]) - np.asarray(original).astype(int)).mean() < 8
