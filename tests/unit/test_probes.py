"""Probe folders, good and bad."""

import json
from pathlib import Path

import pytest

from stages.errors import SourceError
from stages.probes import decode_probes, read_probes
from tests.toy_pairs import png


def folder(path: Path, *lines: object) -> Path:
    (path / "a.png").write_bytes(png("red"))
    (path / "b.png").write_bytes(b"no image")
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (path / "annotations.jsonl").write_text(text + "\n", encoding="utf-8")
    return path


def test_probes_are_read_in_order(tmp_path: Path) -> None:
    lines = (
        {"image": "a.png", "captions": ["a red square", "red"], "wrong_captions": ["blue"]},
        "",
        {"image": "b.png", "captions": ["text"], "note": "ignored"},
    )
    first, second = read_probes(folder(tmp_path, *lines))
    assert first.name == "a.png" and first.image == png("red")
    assert first.captions == ("a red square", "red") and first.wrong_captions == ("blue",)
    assert second.wrong_captions == ()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "annotations.jsonl:1: not JSON"),
        ("[1]", "annotations.jsonl:1: no image"),
        ({"captions": ["x"]}, "no image"),
        ({"image": "a.png", "captions": []}, "captions is missing"),
        ({"image": "a.png", "captions": "x"}, "captions must be a list"),
        ({"image": "a.png", "captions": [1]}, "captions must be a list"),
        ({"image": "gone.png", "captions": ["x"]}, "'gone.png' cannot be read"),
        ("", "no probes"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, said: str) -> None:
    with pytest.raises(SourceError, match=said) as caught:
        read_probes(folder(tmp_path, line))
    assert "\n" not in str(caught.value)


def test_a_folder_without_annotations_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        read_probes(tmp_path)


def test_an_image_named_twice_is_refused(tmp_path: Path) -> None:
    line = {"image": "a.png", "captions": ["x"]}
    with pytest.raises(SourceError, match="two lines"):
        read_probes(folder(tmp_path, line, line))


def test_an_image_that_is_none_is_named(tmp_path: Path) -> None:
    probes = read_probes(folder(tmp_path, {"image": "b.png", "captions": ["x"]}))
    with pytest.raises(SourceError, match=r"b\.png"):
        decode_probes(probes, tmp_path)
