import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BlipImageProcessorPil, CLIPImageProcessorPil

from stages.models.images import FORMATS, DecodeError, decode
from stages.models.preprocessing import Preprocessing

needs_data = pytest.mark.skipif(
    "CAPFILT_TEST_DATA" not in os.environ, reason="CAPFILT_TEST_DATA is not set"
)


def data_folder() -> Path:
    return Path(os.environ["CAPFILT_TEST_DATA"])


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corner_image(mode: str = "RGB") -> Image.Image:
    """Grey, with a red upper left quarter; wider than high."""
    image = Image.new("RGB", (32, 16), (128, 128, 128))
    image.paste((255, 0, 0), (0, 0, 16, 8))
    return image.convert(mode)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_rgb_comes_back_as_it_was() -> None:
    image = noise(20, 30)
    decoded = decode(encoded(image))
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), np.asarray(image))


UNDO = {
    1: lambda i: i,
    2: lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda i: i.transpose(Image.Transpose.ROTATE_180),
    4: lambda i: i.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda i: i.transpose(Image.Transpose.TRANSPOSE),
    6: lambda i: i.transpose(Image.Transpose.ROTATE_90),
    7: lambda i: i.transpose(Image.Transpose.TRANSVERSE),
    8: lambda i: i.transpose(Image.Transpose.ROTATE_270),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = UNDO[orientation](corner_image())
    options = {"lossless": True} if kind == "WEBP" else {}
    upright = np.asarray(decode(encoded(stored, kind, exif=exif, **options))).astype(int)
    assert upright.shape == (16, 32, 3)
    assert np.abs(upright[2, 2] - [255, 0, 0]).max() < 60  # JPEG is lossy
    assert np.abs(upright[-3, -3] - 128).max() < 60


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_opened_and_decoded_files_are_prepared_alike(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(UNDO[orientation](corner_image()), kind, exif=exif, **options)
    prepare = Preprocessing(size=32)
    upright = prepare.resized(decode(data))
    assert np.array_equal(prepare.resized(Image.open(io.BytesIO(data))), upright)
    # Lossy JPEG: the red corner alone shows whether it was turned, and turned once.
    assert np.abs(upright.astype(int) - prepare.resized(corner_image())).mean() < 5


def test_a_transparent_colour_is_white_in_opened_and_decoded_files() -> None:
    data = encoded(corner_image(), transparency=(255, 0, 0))
    opened = Image.open(io.BytesIO(data))
    assert opened.mode == "RGB"
    prepared = Preprocessing(size=32).resized(opened)
    assert prepared[2, 2].tolist() == [255, 255, 255]
    assert np.array_equal(prepared, Preprocessing(size=32).resized(decode(data)))


def test_broken_exif_is_ignored() -> None:
    good = encoded(corner_image(), "JPEG")
    segment = b"Exif\x00\x00MM\x00\x2a\x00\x00\x00\x08\xff\xff garbage"
    broken = good[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + good[2:]
    assert np.array_equal(np.asarray(decode(broken)), np.asarray(decode(good)))


def test_alpha_is_composited_on_white() -> None:
    image = Image.new("RGBA", (4, 1))
    for x, pixel in enumerate([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128), (0, 255, 0, 255)]):
        image.putpixel((x, 0), pixel)
    row = np.asarray(decode(encoded(image)))[0].tolist()
    assert row == [[255, 0, 0], [255, 255, 255], [127, 127, 127], [0, 255, 0]]


def test_transparent_palette_entry_becomes_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    row = np.asarray(decode(encoded(image, "GIF", transparency=0)))[0].tolist()
    assert row == [[255, 255, 255], [200, 100, 50]]


def test_grey_with_alpha() -> None:
    image = Image.new("LA", (1, 1), (0, 0))
    assert np.asarray(decode(encoded(image))).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_high_byte(kind: str) -> None:
    image = Image.fromarray(np.array([[0, 255, 256, 0x8000, 0xFFFF]], dtype=np.uint16))
    grey = np.asarray(decode(encoded(image, kind)))[0, :, 0].tolist()
    assert grey == [0, 0, 1, 128, 255]


def test_float_samples() -> None:
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32))
    assert np.asarray(decode(encoded(unit, "TIFF")))[0, :, 0].tolist() == [0, 127, 255, 0]
    byte = Image.fromarray(np.array([[0.0, 99.0, 300.0]], dtype=np.float32))
    assert np.asarray(decode(encoded(byte, "TIFF")))[0, :, 0].tolist() == [0, 99, 255]


def test_cmyk_and_bilevel() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = np.asarray(decode(encoded(cmyk, "JPEG", quality=95)))[4, 4]
    assert red[0] > 230 and red[1] < 30 and red[2] < 30
    assert np.asarray(decode(encoded(Image.new("1", (1, 1), 1)))).tolist() == [[[255] * 3]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:],
        **({"lossless": True} if kind == "WEBP" else {}),
    )  # fmt: skip
    assert np.asarray(decode(data))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("size", "cover", "expected"),
    [
        ((160, 96), 97, (160, 96)),
        ((160, 96), 49, (160, 96)),
        ((160, 96), 48, (80, 48)),
        ((160, 96), 24, (40, 24)),
        ((96, 161), 23, (24, 41)),
        ((2000, 1600), 16, (250, 200)),
    ],
)
def test_jpegs_are_decoded_at_the_smallest_scale_that_covers(
    size: tuple[int, int], cover: int, expected: tuple[int, int]
) -> None:
    data = encoded(noise(*size), "JPEG")
    assert decode(data, cover=cover).size == expected
    assert decode(data).size == size


@pytest.mark.parametrize("orientation", list(UNDO))
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_scaled_jpegs_show_the_same_picture(mode: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    whole = corner_image().resize((320, 160), Image.Resampling.BICUBIC).convert(mode)
    data = encoded(whole, "JPEG", exif=exif, quality=95)
    scaled, full = decode(data, cover=40), decode(data)
    assert scaled.mode == "RGB" and scaled.size == tuple(edge // 4 for edge in full.size)
    reduced = np.asarray(full.resize(scaled.size, Image.Resampling.BOX)).astype(float)
    assert np.abs(np.asarray(scaled) - reduced).mean() < 2


def test_other_formats_and_broken_jpegs_know_no_scale() -> None:
    image = noise(160, 96)
    assert decode(encoded(image), cover=16).size == (160, 96)
    with pytest.raises(DecodeError):
        decode(encoded(image, "JPEG")[:-2000], cover=16)


def test_too_many_pixels_are_refused_before_decoding() -> None:
    header = struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
    bomb += struct.pack(">I", zlib.crc32(chunk))
    bomb += struct.pack(">I", 4) + b"IDAT" + b"none" + struct.pack(">I", zlib.crc32(b"IDATnone"))
    with pytest.raises(DecodeError, match="9000x9000, at most 1000000 pixels"):
        decode(bomb, max_pixels=1_000_000)
    assert decode(encoded(noise(10, 10)), max_pixels=100).size == (10, 10)


def progressive(scans: int, more: bytes = b"") -> bytes:
    """A JPEG of so many scans with ``more`` before the last."""
    data = encoded(noise(24, 24).convert("L"), "JPEG", progressive=True)
    last = data.rfind(b"\xff\xc4")
    return data[:last] + more + data[last:-2] * (scans - data.count(b"\xff\xda") + 1) + data[-2:]


def test_a_jpeg_has_a_hundred_scans_at_most() -> None:
    assert decode(progressive(100)).size == (24, 24)
    with pytest.raises(DecodeError, match="more than 100 scans"):
        decode(progressive(101))


def test_what_a_decoder_skips_are_no_scans() -> None:
    """Thumbnails and notes in metadata, and what a phone appends to a picture."""
    scans = b"\xff\xda\x00\x02" * 101
    segment = b"\xff\xe1" + struct.pack(">H", 2 + len(scans)) + scans
    assert decode(progressive(10, segment) + b"\x00\x02" + scans).size == (24, 24)


def strips(count: int, sizes: bool, shared: bool) -> bytes:
    """A grey TIFF of ``count`` rows of 4 pixels, a strip each; ``shared``: all are one block."""
    block = b"\xfd\x07" + b"\x80" * 4094  # PackBits: four times 7, then nothing
    blocks = 1 if shared else count
    places = [8 + 4096 * (at % blocks) for at in range(count)]
    arrays = 8 + 4096 * blocks
    tags = [(256, 1, 4), (257, 1, count), (258, 1, 8), (259, 1, 32773), (262, 1, 1)]
    tags += [(273, count, arrays), (277, 1, 1), (278, 1, 1)]
    tags += [(279, count, arrays + 4 * count)] * sizes
    ends = struct.pack(f"<{count}I", *places) + struct.pack(f"<{count}I", *[4096] * count)
    entries = b"".join(struct.pack("<HHII", tag, 4, *rest) for tag, *rest in tags)
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", arrays + 8 * count) + block * blocks + ends + directory


def test_strips_of_a_tiff_share_no_bytes() -> None:
    assert np.asarray(decode(strips(40, sizes=True, shared=False))).tolist() == [[[7] * 3] * 4] * 40
    for sizes in (True, False):
        with pytest.raises(DecodeError, match="40 strips share bytes"):
            decode(strips(40, sizes, shared=True))


def test_scans_do_not_hide_behind_bytes_that_are_no_segment() -> None:
    """A decoder that finds such bytes within a scan looks on right behind them."""
    hidden = b"\xff\x02\xff\xff" + b"\xff\xd8\xff\xff"
    with pytest.raises(DecodeError, match="more than 100 scans"):
        decode(progressive(101, hidden))
    with pytest.raises(DecodeError, match="10000 markers"):
        decode(progressive(99, b"\xff\xda\x00\x02" * 2 + b"\xff\x02" * 10_000))


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>not found</html>", encoded(noise(64, 64), "JPEG")[:-600], b"%!PS-Adobe-3.0 EPSF"],
    ids=["empty", "html", "truncated", "postscript"],
)
def test_bad_bytes_are_one_line(data: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(data)
    assert str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


@needs_data
def test_hostile_files_give_an_image_or_a_decode_error() -> None:
    folder = data_folder() / "hostile"
    decoded = 0
    for line in (folder / "manifest.jsonl").read_text().splitlines():
        row = json.loads(line)
        known = row["pillow"]
        try:
            image = decode((folder / row["file"]).read_bytes())
        except DecodeError:
            readable = known["ok"] and known["format"] in FORMATS and known["mode"] != "LAB"
            assert not readable, row
            continue
        assert image.mode == "RGB"
        assert Preprocessing(size=32)([image]).isfinite().all()
        decoded += 1
    assert decoded > 400


@needs_data
def test_avif_orientations_all_show_the_same_picture() -> None:
    files = sorted((data_folder() / "hostile").glob("*rot*mir*.avif"))
    thumbs = [np.asarray(decode(f.read_bytes()).resize((16, 16)), dtype=float) for f in files]
    assert len(thumbs) >= 2
    assert all(np.abs(thumb - thumbs[0]).mean() < 3 for thumb in thumbs)


SIZES = [(64, 64), (200, 50), (50, 200), (1, 1), (7, 211), (300, 10), (31, 33), (640, 427)]


def test_blip_preprocessing_equals_transformers() -> None:
    images = [noise(w, h, i) for i, (w, h) in enumerate(SIZES)]
    theirs = BlipImageProcessorPil(size={"height": 48, "width": 48})(images, return_tensors="pt")
    assert torch.equal(Preprocessing(size=48)(images), theirs["pixel_values"])


@pytest.mark.parametrize(("edge", "size"), [(32, 32), (40, 32), (24, 32)])
def test_clip_preprocessing_equals_transformers(edge: int, size: int) -> None:
    images = [noise(w, h, i) for i, (w, h) in enumerate(SIZES)]
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": edge}, crop_size={"height": size, "width": size}
    )
    theirs = processor(images, return_tensors="pt")["pixel_values"]
    ours = Preprocessing(size=size, shortest_edge=edge)(images)
    assert torch.equal(ours, theirs)


@needs_data
def test_preprocessing_of_photos_equals_transformers() -> None:
    files = sorted((data_folder() / "photos").glob("*.jpg"))[:24]
    images = [decode(file.read_bytes()) for file in files]
    assert len(images) == 24
    blip = BlipImageProcessorPil(size={"height": 224, "width": 224})(images, return_tensors="pt")
    assert torch.equal(Preprocessing(size=224)(images), blip["pixel_values"])
    clip = CLIPImageProcessorPil()(images, return_tensors="pt")["pixel_values"]
    ours = Preprocessing(size=224, shortest_edge=224)(images)
    assert torch.equal(ours, clip)


def test_extreme_shapes_are_cut_before_they_are_resized() -> None:
    pixels = Preprocessing(size=224, shortest_edge=224)([noise(20_000, 10), noise(10, 20_000)])
    assert pixels.shape == (2, 3, 224, 224) and pixels.isfinite().all()
    smooth = Image.linear_gradient("L").resize((660, 20)).convert("RGB")
    theirs = CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    expected = theirs([smooth], return_tensors="pt")["pixel_values"]
    assert (Preprocessing(size=16, shortest_edge=16)([smooth]) - expected).abs().max() < 0.05


def test_preprocessing_follows_the_processor_config() -> None:
    custom = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.3, 0.4], "resample": 2}
    ours = Preprocessing.of(custom, size=16, crop=False)
    theirs = BlipImageProcessorPil(size={"height": 16, "width": 16}, **custom)
    images = [noise(30, 20)]
    assert torch.equal(ours(images), theirs(images, return_tensors="pt")["pixel_values"])
    clip = Preprocessing.of(
        {"size": {"shortest_edge": 40}, "do_center_crop": True}, size=32, crop=True
    )
    assert clip.shortest_edge == 40 and clip.size == 32
    assert Preprocessing.of({"size": 224}, size=224, crop=True).shortest_edge == 224
    assert Preprocessing.of({}, size=32, crop=True).shortest_edge == 32
    assert Preprocessing.of({}, size=32, crop=False).shortest_edge is None
