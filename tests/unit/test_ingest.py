"""From source files to shards: ids, repeats, cutting."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import ids
from stages.base import LocalContext
from stages.errors import SourceError
from stages.ingest import IngestConfig, IngestStage, check_source, cut, list_files, read_rows
from stages.readers import SourceConfig, SourceFile
from stages.schemas import SOURCES, check
from stages.seen import SeenPairs
from tests.s3 import s3_bucket, use_endpoint
from tests.servers import picture


def table(path: Path, rows: list[tuple[str, str]]) -> Path:
    urls, texts = zip(*rows, strict=True) if rows else ((), ())
    columns = {"url": pa.array(urls, pa.string()), "text": pa.array(texts, pa.string())}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def files(path: Path, origin: Any = "web") -> list[SourceFile]:
    return list_files(SourceConfig(path=str(path)), origin)


def ingest(
    out: Path,
    sources: list[SourceFile],
    size: int = 4,
    first: int = 0,
    seen: list[Path] | None = None,
) -> list[pa.Table]:
    out.mkdir(parents=True)
    stage = IngestStage(IngestConfig(shard_size=size), sources, first)
    stage.run({"seen": seen or []}, out, LocalContext())
    return [pq.read_table(path) for path in sorted(out.iterdir())]


def url(number: int) -> str:
    return f"http://a.test/{number}.jpg"


def test_rows_have_the_ids_of_the_project(tmp_path: Path) -> None:
    (file,) = files(table(tmp_path / "x.parquet", [(f" {url(1)} ", "t"), ("", "u"), ("", "v")]))
    (rows,) = read_rows(file)
    check(rows, SOURCES, "test")
    assert rows["row_id"].to_pylist() == [ids.row_id(file.identity, i) for i in range(3)]
    assert rows["url"].to_pylist() == [url(1), None, None]
    samples = rows["sample_id"].to_pylist()
    assert samples[0] == ids.sample_id(url(1))
    assert len(set(samples)) == 3  # rows without an image do not become one sample


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    """Parts of a set may lie on another disk; fsspec takes such a link for a file."""
    table(tmp_path / "disk" / "x.parquet", [(url(1), "t")])
    table(tmp_path / "data" / "part0" / "x.parquet", [(url(2), "t")])
    (tmp_path / "data" / "part1").symlink_to(tmp_path / "disk")
    (tmp_path / "data" / "part2").mkdir()
    (tmp_path / "data" / "part2" / "x.parquet").symlink_to(tmp_path / "disk" / "x.parquet")
    (tmp_path / "disk" / "back").symlink_to(tmp_path / "data")  # and round again
    (tmp_path / "data" / "loop").symlink_to("loop")
    data = tmp_path / "data"
    three = [str(data / f"part{number}" / "x.parquet") for number in range(3)]
    assert [file.path for file in files(data)] == three
    for pattern in ("*/x.parquet", "*/*.parquet", "part?/x.*", "**/x.parquet"):
        assert [file.path for file in files(data / pattern)] == three
    assert [file.path for file in files(data / "part1" / "*.parquet")] == three[1:2]
    whole = {file.identity for file in files(data)}
    assert whole == {file.identity for file in files(data / "**" / "*.parquet")}
    (data / "part1").unlink()
    shutil.copytree(tmp_path / "disk", data / "part1", ignore=shutil.ignore_patterns("back"))
    assert whole == {file.identity for file in files(data)}


def test_identity_is_name_and_content_but_not_place_or_time(tmp_path: Path) -> None:
    first = table(tmp_path / "one" / "part" / "x.parquet", [(url(1), "t")])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    os.utime(tmp_path / "two" / "part" / "x.parquet", (1, 1))
    (a,), (b,) = files(tmp_path / "one"), files(tmp_path / "two")
    assert a.identity == b.identity
    assert a.identity.startswith("part/x.parquet:")
    assert files(first)[0].identity.startswith("x.parquet:")
    table(tmp_path / "two" / "part" / "x.parquet", [(url(2), "t")])
    assert files(tmp_path / "two")[0].identity != a.identity


def test_globs_and_remote_stores_are_listed(tmp_path: Path) -> None:
    for name in ("b/1.csv", "a/1.csv", "a/.hidden.csv", "a/_SUCCESS.csv", "a/2.csv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"url,text\n{url(1)},{name}\n")
    found = list_files(SourceConfig(path=f"{tmp_path}/*/1.csv"))
    assert [file.identity.partition(":")[0] for file in found] == ["a/1.csv", "b/1.csv"]
    assert len(list_files(SourceConfig(path=str(tmp_path / "a")))) == 2

    memory = fsspec.filesystem("memory")
    memory.pipe("/test-ingest/x.csv", f"url,text\n{url(1)},far\n".encode())
    (file,) = list_files(SourceConfig(path="memory://test-ingest"))
    (rows,) = read_rows(file)
    assert rows["text"].to_pylist() == ["far"]
    memory.rm("/test-ingest", recursive=True)


def test_shards_are_cut_in_order_and_named_from_the_first_number(tmp_path: Path) -> None:
    table(tmp_path / "in" / "a.parquet", [(url(i), f"text {i}") for i in range(6)])
    table(tmp_path / "in" / "b.parquet", [(url(i), f"text {i}") for i in range(6, 9)])
    shards = ingest(tmp_path / "out", files(tmp_path / "in")[::-1], size=4, first=12)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["shard=000012.parquet", "shard=000013.parquet", "shard=000014.parquet"]
    texts = [text for shard in shards for text in shard["text"].to_pylist()]
    assert texts == [f"text {i}" for i in range(9)]
    for shard in shards:
        check(shard, SOURCES, "test")


def test_the_same_sources_give_the_same_bytes(tmp_path: Path) -> None:
    table(tmp_path / "in" / "a.parquet", [(url(i % 5), f"text {i % 3}") for i in range(50)])
    for name in ("one", "two"):
        ingest(tmp_path / name, files(tmp_path / "in"), size=7)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_web_and_human_never_share_a_shard(tmp_path: Path) -> None:
    table(tmp_path / "web.parquet", [(url(i), "w") for i in range(3)])
    folder = tmp_path / "human"
    folder.mkdir()
    (folder / "0.jpg").write_bytes(picture())
    (folder / "annotations.jsonl").write_text(
        json.dumps({"image": "0.jpg", "captions": ["a", "b"]})
    )
    both = files(folder, "human") + files(tmp_path / "web.parquet")
    shards = ingest(tmp_path / "out", both, size=100)
    assert [set(shard["source"].to_pylist()) for shard in shards] == [{"web"}, {"human"}]
    assert shards[1]["media"].to_pylist() == [str(folder / "0.jpg")] * 2


def test_repeats_point_to_the_first_row_also_of_earlier_shards(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", [(url(1), "t"), (url(1), "other"), (url(1), "t")])
    (first,) = ingest(tmp_path / "one", files(tmp_path / "a.parquet"))
    original = first["row_id"][0].as_py()
    assert first["repeat_of"].to_pylist() == [None, None, original]

    table(tmp_path / "b.parquet", [(url(2), "t"), (url(1), "t"), (url(2), "t")])
    seen = sorted((tmp_path / "one").iterdir())
    (second,) = ingest(tmp_path / "two", files(tmp_path / "b.parquet"), first=1, seen=seen)
    assert second["repeat_of"].to_pylist() == [None, original, second["row_id"][0].as_py()]


def test_a_human_caption_is_no_repeat_of_a_web_text(tmp_path: Path) -> None:
    web = files(table(tmp_path / "a.parquet", [(url(1), "t")]))
    human = files(table(tmp_path / "b.parquet", [(url(1), "t")]), "human")
    for shard in ingest(tmp_path / "out", web + human):
        assert shard["repeat_of"].to_pylist() == [None]


def test_captions_of_one_image_stay_together(tmp_path: Path) -> None:
    rows = [(url(image), f"caption {i}") for image in range(4) for i in range(3)]
    shards = ingest(tmp_path / "out", files(table(tmp_path / "x.parquet", rows)), size=4)
    assert [shard.num_rows for shard in shards] == [3, 3, 3, 3]
    rows = [(url(0), f"caption {i}") for i in range(10)]
    shards = ingest(tmp_path / "long", files(table(tmp_path / "y.parquet", rows)), size=4)
    assert [shard.num_rows for shard in shards] == [4, 4, 2]


@pytest.mark.parametrize("batches", [[10], [1] * 10, [3, 3, 4], [9, 1]])
def test_cut_does_not_depend_on_how_rows_arrive(batches: list[int]) -> None:
    rows = [
        {
            "row_id": f"{i:02x}",
            "sample_id": str(i // 3),
            "source": "web",
            "url": "u",
            "text": str(i % 2),
        }
        for i in range(10)
    ]
    whole = pa.Table.from_pylist(
        [{**row, "media": None, "repeat_of": None} for row in rows], SOURCES
    )
    starts = [sum(batches[:i]) for i in range(len(batches))]
    pieces = [whole.slice(start, size) for start, size in zip(starts, batches, strict=True)]
    with SeenPairs() as seen:
        shards = list(cut(pieces, 4, seen))
    assert [shard["row_id"].to_pylist() for shard in shards] == [
        ["00", "01", "02"],
        ["03", "04", "05"],
        ["06", "07", "08", "09"],
    ]
    assert [shard["repeat_of"][2].as_py() for shard in shards] == ["00", "03", "06"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere: no such file, folder or match"),
        ("*.csv", "no such file, folder or match"),
        ("empty", "no such file, folder or match"),
        ("photos", "no source file there; known are .csv, .json"),
        ("x.docx", "no source file there"),
        ("none.parquet", "holds no rows"),
        ("none.csv", "holds no rows"),
        ("header.csv", "holds no rows"),
    ],
)
def test_missing_and_empty_sources_are_one_line(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(picture())
    (tmp_path / "x.docx").write_bytes(b"?")
    if name == "header.csv":
        (tmp_path / name).write_text("url,text\n")
    elif name == "none.csv":
        (tmp_path / name).write_text("")
    elif name == "none.parquet":
        table(tmp_path / name, [])
    with pytest.raises(SourceError, match=message) as caught:
        check_source(SourceConfig(path=str(tmp_path / name)))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_store_is_one_line() -> None:
    with pytest.raises(SourceError, match="cannot be listed: Protocol not known: nope"):
        list_files(SourceConfig(path="nope://bucket/x.parquet"))


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    source = files(table(tmp_path / "x.parquet", [(url(1), "t")]))
    with pytest.raises(SourceError, match="same name and content as"):
        ingest(tmp_path / "out", source + files(tmp_path))


def test_a_source_is_checked_by_its_first_row(tmp_path: Path) -> None:
    """An empty file may stand beside a full one; what lies behind the first row is not read."""
    table(tmp_path / "a.parquet", [])
    with pytest.raises(SourceError, match="holds no rows"):
        check_source(SourceConfig(path=str(tmp_path)))
    table(tmp_path / "b.parquet", [(url(1), "t")])
    (tmp_path / "c.parquet").write_bytes(b"junk")
    check_source(SourceConfig(path=str(tmp_path)))
    with pytest.raises(SourceError, match=r"c\.parquet: not a valid parquet file"):
        check_source(SourceConfig(path=str(tmp_path / "c.parquet")))


def test_a_folder_of_parquet_on_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_bucket(monkeypatch) as bucket:
        s3 = fsspec.filesystem("s3")
        for number in range(3):
            local = table(tmp_path / f"{number}.parquet", [(url(number), f"text {number}")] * 2)
            s3.put(str(local), f"{bucket}/laion/part-{number}.parquet")
        s3.pipe(f"{bucket}/laion/_SUCCESS", b"")
        found = list_files(SourceConfig(path=f"{bucket}/laion"))
        assert [file.path for file in found] == [
            f"{bucket}/laion/part-{number}.parquet" for number in range(3)
        ]
        assert len({file.identity for file in found}) == 3
        rows = [row for file in found for part in read_rows(file) for row in part.to_pylist()]
        assert [row["url"] for row in rows] == [url(n) for n in (0, 0, 1, 1, 2, 2)]
        assert [file.path for file in list_files(SourceConfig(path=f"{bucket}/laion/*-1.*"))] == [
            f"{bucket}/laion/part-1.parquet"
        ]


def test_a_store_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for path in ("s3://bucket/x.parquet", "s3://bucket/*.parquet"):
        with pytest.raises(SourceError, match=r"s3://bucket/.*: cannot be (reached|listed)"):
            check_source(SourceConfig(path=path))
