"""Colours of kept images: whatever the file's ICC profile says, in sRGB. And their hash."""

from __future__ import annotations

import io
import struct
from itertools import product
from typing import Any

import imagehash
import numpy as np
from PIL import Image

from stages.keeper import ImageConfig, ImageKeeper, perceptual_hash
from tests.unit.test_hostile import swapped_profile

_D50 = struct.pack(">3i", 63190, 65536, 54061)  # the white of all profiles, as XYZ


def encoded(image: Image.Image, format_: str, **more: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format_, **more)
    return out.getvalue()


def profile_of(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile (version 2) with the given tags."""
    name = b"for tests"
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(name) + 1) + name + bytes(79),
        b"wtpt": b"XYZ " + bytes(4) + _D50,
        **tags,
    }
    place, entries, body = 128 + 4 + 12 * len(tags), b"", b""
    for tag, data in tags.items():
        entries += tag + struct.pack(">2I", place + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = struct.pack(">I", place + len(body))
    header = size + bytes(4) + struct.pack(">I", 0x02400000) + kind + space + connection
    header = (header.ljust(36, b"\0") + b"acsp").ljust(68, b"\0") + _D50
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + entries + body


def grey_profile(gamma: float) -> bytes:
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(256 * gamma))
    return profile_of(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": curve})


def cmyk_profile(inks: dict[tuple[int, ...], tuple[int, int, int]]) -> bytes:
    """A press that is known by no ink and all of it: (c, m, y, k) of 0 or 1 → L in 0 to 255, a
    and b around 128; black where ``inks`` says nothing."""
    nodes = bytes(v for c in product((0, 1), repeat=4) for v in inks.get(c, (0, 128, 128)))
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + nodes + ramp * 3
    return profile_of(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})


def test_cmyk_is_converted_by_its_profile() -> None:
    keep = ImageKeeper(ImageConfig(image_size=64, encode_format="png", encode_quality=1))
    ink = Image.new("CMYK", (64, 64), (255, 0, 0, 0))  # as much cyan as there is
    # A press whose cyan is red: CIELAB (53, 80, 67).
    profile = cmyk_profile({(0, 0, 0, 0): (255, 128, 128), (1, 0, 0, 0): (136, 208, 195)})
    shown = {}
    for format_ in ("JPEG", "TIFF"):
        for name, more in (("plain", {}), ("pressed", {"icc_profile": profile})):
            outcome = keep(encoded(ink, format_, **more))
            assert outcome.status == "success", outcome
            shown[format_, name] = np.asarray(
                Image.open(io.BytesIO(outcome.image or b"")).convert("RGB")
            )[32, 32]
    for format_ in ("JPEG", "TIFF"):
        assert np.abs(shown[format_, "plain"].astype(int) - [0, 255, 255]).max() < 8
        assert np.abs(shown[format_, "pressed"].astype(int) - [255, 0, 0]).max() < 24, shown


def test_grey_is_converted_by_its_profile_and_no_other_speaks_of_it() -> None:
    keep = ImageKeeper(ImageConfig(image_size=64, encode_format="png", encode_quality=1))
    grey = Image.new("L", (64, 64), 128)
    linear = grey_profile(1.0)
    bright = keep(encoded(grey, "PNG", icc_profile=linear))
    again = keep(encoded(grey.convert("LA"), "PNG", icc_profile=linear))
    plain = keep(encoded(grey, "PNG"))
    other = keep(encoded(grey, "PNG", icc_profile=swapped_profile()))
    wrong = keep(encoded(Image.new("RGB", (64, 64), (200, 10, 10)), "PNG", icc_profile=linear))
    pixels = [
        np.asarray(Image.open(io.BytesIO(o.image or b"")).convert("RGB"))[32, 32]
        for o in (bright, plain, wrong)
    ]
    assert np.abs(pixels[0].astype(int) - 188).max() < 4  # half of the light, as sRGB has it
    assert pixels[1].tolist() == [128, 128, 128]
    assert pixels[2].tolist() == [200, 10, 10]
    assert again.pixel_sha256 == bright.pixel_sha256
    assert other.pixel_sha256 == plain.pixel_sha256


def test_the_perceptual_hash_is_that_of_imagehash() -> None:
    """But for how the grey pixels are made, which only large pictures show."""
    for seed in range(40):
        made = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
        small = Image.fromarray(made).resize((64, 64), Image.Resampling.BICUBIC)
        assert perceptual_hash(small) == str(imagehash.phash(small, hash_size=16))


def test_rounding_says_nothing_of_a_symmetric_picture() -> None:
    bars = np.zeros((64, 64, 3), np.uint8)
    bars[:, 16:48] = 255
    # Only even frequencies across, and none down: the others are exactly zero, like the median.
    ones = f"{int(perceptual_hash(Image.fromarray(bars)), 16):0256b}"
    assert set(ones[16:]) == {"0"} and set(ones[1:16:2]) == {"0"} and "1" in ones[:16]
