"""Human-annotated sets in each of their layouts."""

import json
from pathlib import Path
from typing import Any

import pytest

from stages import media
from stages.errors import SourceError
from stages.ingest import list_files, read_rows
from stages.readers import SourceConfig
from tests.servers import picture


def rows(path: Path, **options: Any) -> list[dict[str, Any]]:
    files = list_files(SourceConfig(path=str(path), **options), "human")
    return [row for file in files for table in read_rows(file) for row in table.to_pylist()]


def texts(path: Path, **options: Any) -> list[tuple[str | None, str]]:
    """(name of the image file or URL, text)."""
    return [
        (row["url"] or (row["media"] and Path(row["media"]).name), row["text"])
        for row in rows(path, **options)
    ]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(3):
        (folder / f"{seed}.jpg").write_bytes(picture(seed=seed))
    return folder


def test_folder_with_annotations_takes_each_way_to_write_them(images: Path) -> None:
    lines = [
        {"image": "0.jpg", "captions": ["a", "b"]},
        {"file": "1.jpg", "caption": "c"},
        {"image": "2.jpg", "text": "d"},
        {"image": "2.jpg"},
    ]
    (images / "annotations.jsonl").write_text("\n".join(map(json.dumps, lines)))
    expected = [("0.jpg", "a"), ("0.jpg", "b"), ("1.jpg", "c"), ("2.jpg", "d"), ("2.jpg", "")]
    assert texts(images) == expected
    found = rows(images)
    assert {row["source"] for row in found} == {"human"}
    assert found[0]["sample_id"] == found[1]["sample_id"] != found[2]["sample_id"]


def test_the_same_bytes_are_the_same_sample_wherever_they_lie(images: Path) -> None:
    (images / "copy.jpg").write_bytes((images / "0.jpg").read_bytes())
    lines = [{"image": "0.jpg", "caption": "a"}, {"image": "copy.jpg", "caption": "b"}]
    (images / "annotations.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert len({row["sample_id"] for row in rows(images)}) == 1


def coco(**image: str) -> dict[str, Any]:
    return {
        "images": [{"id": 5, "file_name": "0.jpg", **image}, {"id": 6, "file_name": "1.jpg"}],
        "annotations": [
            {"image_id": 5, "caption": "first"},
            {"image_id": 6, "caption": "other"},
            {"image_id": 5, "caption": "second"},
        ],
    }


def test_coco_groups_the_captions_of_an_image(tmp_path: Path, images: Path) -> None:
    path = tmp_path / "captions_val.json"
    path.write_text(json.dumps(coco()))
    expected = [("0.jpg", "first"), ("0.jpg", "second"), ("1.jpg", "other")]
    assert texts(path, image_root=str(images)) == expected


def test_coco_uses_the_web_unless_a_folder_is_given(tmp_path: Path, images: Path) -> None:
    path = images / "captions.json"
    path.write_text(json.dumps(coco(coco_url="http://coco.test/0.jpg")))
    assert {image for image, _ in texts(path)} == {"http://coco.test/0.jpg", "1.jpg"}
    assert {image for image, _ in texts(path, image_root=str(images))} == {"0.jpg", "1.jpg"}


def test_karpathy_split_keeps_row_ids(tmp_path: Path, images: Path) -> None:
    entries = [
        {
            "filepath": "images",
            "filename": f"{i}.jpg",
            "split": split,
            "sentences": [{"raw": f"{i} first"}, {"raw": f"{i} second"}],
        }
        for i, split in enumerate(["train", "val", "restval"])
    ]
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"images": entries, "dataset": "coco"}))
    every = rows(path)
    assert [row["text"][0] for row in every] == ["0", "0", "1", "1", "2", "2"]
    assert rows(path, split="val") == every[2:4]
    assert rows(path, split=["train", "restval"]) == every[:2] + every[4:]
    with pytest.raises(SourceError, match="no image of split dev; there are: restval, train, val"):
        rows(path, split="dev")


def test_blip_and_sbu_lists(tmp_path: Path, images: Path) -> None:
    blip = tmp_path / "coco_karpathy_train.json"
    blip.write_text(json.dumps([{"image": "images/0.jpg", "caption": "a", "image_id": "x"}]))
    assert texts(blip) == [("0.jpg", "a")]
    sbu = tmp_path / "sbu-captions-all.json"
    sbu.write_text(json.dumps({"image_urls": ["http://s.test/1.jpg"], "captions": ["b"]}))
    assert texts(sbu) == [("http://s.test/1.jpg", "b")]


def test_one_missing_image_is_a_row_and_all_missing_an_error(images: Path, tmp_path: Path) -> None:
    path = images / "annotations.jsonl"
    lines = [{"image": "0.jpg", "caption": "a"}, {"image": "gone.jpg", "caption": "b"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert texts(path) == [("0.jpg", "a"), ("gone.jpg", "b")]
    with pytest.raises(SourceError, match=r"none of its images .* set image_root"):
        rows(path, image_root=str(tmp_path))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"version": 1}, "not a known layout"),
        ({"images": [], "annotations": [{"bbox": []}]}, "have no captions"),
        ({"images": [1], "annotations": []}, "not a known layout of json"),
        ({"images": [{}], "annotations": [{"caption": "x"}]}, "image_id"),
    ],
)
def test_other_json_is_refused_in_one_line(tmp_path: Path, document: Any, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(document))
    with pytest.raises(SourceError, match=message) as caught:
        rows(path)
    assert "\n" not in str(caught.value)


def web(path: Path, **options: Any) -> list[dict[str, Any]]:
    files = list_files(SourceConfig(path=str(path), **options))
    return [row for file in files for table in read_rows(file) for row in table.to_pylist()]


def listed(path: Path, *images: object) -> Path:
    path.write_text(json.dumps([{"image": image, "caption": "t"} for image in images]))
    return path


def test_a_list_from_the_web_opens_nothing_but_images_beside_it(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(media, "sha256", lambda place: opened.append(place) or "00")
    outside = [
        "simplecache::http://127.0.0.1:1/x",
        "file:///etc/passwd",
        "ftp://a.test/x",
        "memory://x",
        "foo://q",
        "/etc/passwd",
        "../../x.jpg",
        "a\0b",
        "0.jpg::x",
        "..",
    ]
    rows_ = web(listed(images / "x.json", "0.jpg", *outside, "a/../1.jpg", str(images / "2.jpg")))
    assert [row["url"] for row in rows_] == [None, *outside, None, None]
    inside = [f"{images}/0.jpg", f"{images}/a/../1.jpg", f"{images}/2.jpg"]
    assert opened == inside
    assert [row["media"] for row in rows_ if row["media"]] == inside


def test_people_who_annotate_may_name_any_file_of_their_file_system(images: Path) -> None:
    named = [str(images / "0.jpg"), "images/1.jpg", f"file://{images}/2.jpg", "ftp://a.test/3.jpg"]
    path = listed(images.parent / "x.json", *named)
    found = rows(path, image_root=str(images.parent / "elsewhere" / ".."))
    names = [row["media"] and Path(row["media"]).name for row in found]
    assert names == ["0.jpg", "1.jpg", "2.jpg", None]
    assert found[3]["url"] == "ftp://a.test/3.jpg"


def test_a_list_below_a_linked_folder_names_its_images_in_full(images: Path) -> None:
    link = images.parent / "link"
    link.symlink_to(images.parent)
    listed(images / "x.json", f"{link}/images/0.jpg")
    (row,) = web(link / "images" / "x.json", image_root=str(link / "images"))
    assert row["media"] == f"{link}/images/0.jpg"


def test_a_relative_folder_of_images_is_found_from_everywhere(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(images.parent)
    (row,) = rows(listed(images.parent / "x.json", "0.jpg"), image_root="images")
    assert row["media"] == str(images / "0.jpg")


@pytest.mark.parametrize(
    "document",
    [
        [{"image": "0.jpg", "captions": ["a", None]}],
        {
            "images": [{"id": 1, "file_name": "0.jpg"}],
            "annotations": [{"image_id": 1, "caption": text} for text in ("a", None)],
        },
        {"images": [{"filename": "0.jpg", "sentences": [{"raw": "a"}, {"raw": None}]}]},
        {"image_urls": ["http://a.test/0.jpg"] * 2, "captions": ["a", None]},
    ],
)
def test_a_caption_that_is_null_is_empty(images: Path, document: Any) -> None:
    path = images / "x.json"
    path.write_text(json.dumps(document))
    assert [text for _, text in texts(path)] == ["a", ""]
