"""Every table layout of the field, read from real files."""

import csv
import datetime
import gzip
import hashlib
import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import media, readers, tars
from stages.errors import SourceError
from stages.ingest import list_files, read_rows
from stages.readers import SourceConfig
from tests.servers import picture

A, B = "http://a.test/1.jpg", "https://b.test/2.png"


def read(path: Path, **options: object) -> list[tuple[str | None, str]]:
    """(url, text as the source has it) of every row."""
    files = list_files(SourceConfig(path=str(path), **options))
    rows = [row for file in files for table in read_rows(file) for row in table.to_pylist()]
    return [(row["url"], row["original_text"]) for row in rows]


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("url", "text"),
    [("URL", "TEXT"), ("url", "caption"), ("url", "text"), ("image_url", "Caption")],
    ids=["laion", "img2dataset", "coyo-datacomp", "hub"],
)
def test_well_known_parquet_columns_are_recognised(tmp_path: Path, url: str, text: str) -> None:
    table = pa.table({"similarity": [0.3, 0.2], url: [A, B], text: ["a cat", None]})
    pq.write_table(table, tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == [(A, "a cat"), (B, "")]


def test_configured_columns_win_over_known_names(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": [A], "mirror": [B], "text": ["t"]}), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet", url_column="mirror") == [(B, "t")]


def test_parquet_streams_in_batches_with_running_numbers(tmp_path: Path) -> None:
    urls = [f"http://a.test/{i}" for i in range(5_000)]
    pq.write_table(pa.table({"url": urls, "text": urls}), tmp_path / "x.parquet")
    (file,) = list_files(SourceConfig(path=str(tmp_path / "x.parquet")))
    tables = list(read_rows(file))
    assert [table.num_rows for table in tables] == [2_000, 2_000, 1_000]
    assert len({row for table in tables for row in table["row_id"].to_pylist()}) == 5_000


@pytest.mark.parametrize(
    "line", [f"a cat, sleeping\t{A}", f"{A}\ta cat, sleeping"], ids=["cc3m", "cc12m"]
)
def test_tsv_without_header_finds_the_url_and_keeps_quotes(tmp_path: Path, line: str) -> None:
    quoted = line.replace("a cat", '"a cat')
    (tmp_path / "x.tsv").write_text(f"{line}\n{quoted}\n{line}\n")
    expected = [(A, "a cat, sleeping"), (A, '"a cat, sleeping'), (A, "a cat, sleeping")]
    assert read(tmp_path / "x.tsv") == expected


def test_csv_with_header_quotes_newlines_and_ragged_rows(tmp_path: Path) -> None:
    with (tmp_path / "x.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [["id", "URL", "TEXT"], [1, A, 'two\nlines, "quoted"'], [2], [3, B, "שלום 🐈"]]
        )
    assert read(tmp_path / "x.csv") == [
        (A, 'two\nlines, "quoted"'),
        (None, ""),
        (B, "שלום 🐈"),
    ]


def test_very_long_text_and_bad_utf8_are_rows(tmp_path: Path) -> None:
    words = "word " * 100_000
    (tmp_path / "x.csv").write_bytes(f"url,text\n{A},{words}\n{B},".encode() + b"\xff\xfe\n")
    (_, long), (_, bad) = read(tmp_path / "x.csv")
    assert long == words
    assert bad == "\ufffd\ufffd"


def test_jsonl_gz_with_a_broken_line_and_half_a_character(tmp_path: Path) -> None:
    lines = [json.dumps({"url": A, "text": "ok \ud83d"}), "{broken", "[1]", json.dumps({"url": B})]
    with gzip.open(tmp_path / "x.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    assert read(tmp_path / "x.jsonl.gz") == [(A, "ok ?"), (None, ""), (None, ""), (B, "")]


def test_jsonl_with_several_texts_gives_a_row_for_each(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"url": A, "captions": ["one", "two"]}))
    assert read(tmp_path / "x.jsonl") == [(A, "one"), (A, "two")]


def test_text_list_with_and_without_captions(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(f"{A}\n\n{B}\ta dog\nnot a url\n")
    assert read(tmp_path / "x.txt") == [(A, ""), (B, "a dog"), ("not a url", "")]


def test_webdataset_samples_with_each_kind_of_text(tmp_path: Path) -> None:
    image = picture()
    members = {
        "./000.jpg": image,
        "./000.txt": b"from txt",
        "./000.json": b'{"caption": "from json"}',
        "./001.json": b'{"TEXT": "only json"}',
        "./001.webp": picture(seed=1, format="WEBP"),
        "./002.txt": b"no image",
        "./003.png": picture(seed=2, format="PNG"),
        "./004.cls": b"7",
    }
    tar(tmp_path / "a.tar", members)
    (file,) = list_files(SourceConfig(path=str(tmp_path)))
    rows = [row for table in read_rows(file) for row in table.to_pylist()]
    assert [row["text"] for row in rows] == ["from txt", "only json", "no image", ""]
    members_read = [row["media"] and row["media"].partition("#")[2] for row in rows]
    assert members_read == ["./000.jpg", "./001.webp", None, "./003.png"]
    assert all(row["url"] is None for row in rows)


def test_configured_columns_of_a_webdataset_are_those_of_its_json(tmp_path: Path) -> None:
    fields = {"alt": "from alt", "title": "from title", "similarity": 0.5, "sha256": "AB"}
    members = {"0.txt": b"from txt", "0.json": json.dumps(fields).encode(), "1.txt": b"alone"}
    tar(tmp_path / "a.tar", members)

    def rows(**options: object) -> list[tuple[str, str | None, str | None]]:
        (file,) = list_files(SourceConfig(path=str(tmp_path), **options))
        found = [row for table in read_rows(file) for row in table.to_pylist()]
        return [(row["original_text"], row["image_hash"], row["extra"]) for row in found]

    named = rows(text_column="alt", hash_column="sha256", keep_columns=["similarity"])
    assert named == [("from alt", "ab", '{"similarity": 0.5}'), ("", None, '{"similarity": null}')]
    assert [row[0] for row in rows(text_column=["title", "alt"])] == ["from title", "from alt", ""]
    assert rows(keep_columns=["alt"])[0] == ("from txt", None, '{"alt": "from alt"}')
    with pytest.raises(SourceError, match=r"a\.tar: no column nsfw in the \.json of any sample"):
        rows(keep_columns=["nsfw", "alt"])
    tar(tmp_path / "a.tar", {"0.txt": b"t", "0.json": b'{"lic'})
    assert rows(keep_columns=["license"]) == [("t", None, '{"license": null}')]


def test_images_of_a_tar_are_found_again_whatever_it_and_they_are_called(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "A.TAR", {"caf\udce9.jpg": b"one", "caf\udce9.txt": b"t", "é.jpg": b"two"}
    )
    (file,) = list_files(SourceConfig(path=str(tmp_path)))
    names = [row["media"] for table in read_rows(file) for row in table.to_pylist()]
    assert names == [f"{path}#caf\\udce9.jpg", f"{path}#é.jpg"]
    assert dict(media.read_many(names)) == {names[0]: b"one", names[1]: b"two"}


def test_one_bad_row_spoils_no_other(tmp_path: Path) -> None:
    huge, deep = '{"n": ' + "9" * 5_000 + "}", "[" * 100_000
    good = json.dumps({"url": A, "text": "t"})
    (tmp_path / "x.jsonl").write_text("\n".join([good, huge, deep, good]))
    assert read(tmp_path / "x.jsonl") == [(A, "t"), (None, ""), (None, ""), (A, "t")]
    tar(tmp_path / "x.tar", {"0.json": huge.encode(), "1.json": deep.encode(), "2.txt": b"t"})
    assert read(tmp_path / "x.tar") == [(None, ""), (None, ""), (None, "t")]
    odd = json.dumps({"url": A, "text": "t", "md5": "\ud800"})
    (tmp_path / "y.jsonl").write_text(f'{good[:-1]}, "md5": "ab"}}\n{odd}')
    assert read(tmp_path / "y.jsonl", hash_column="md5") == [(A, "t"), (A, "t")]


def test_bytes_in_a_table_that_are_no_utf8_are_replaced(tmp_path: Path) -> None:
    strings = pa.array([b"t", b"caf\xe9", None]).view(pa.string())
    columns = {"url": [A, B, A], "text": strings, "kept": pa.array([[b"\xe9"], [], None])}
    columns["kept"] = columns["kept"].cast(pa.list_(pa.string()), safe=False)
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    expected = [(A, "t"), (B, "caf\ufffd"), (A, "")]
    assert read(tmp_path / "x.parquet") == expected
    coded = columns | {"text": strings.dictionary_encode()}
    pq.write_table(pa.table(coded), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet", keep_columns=["url"]) == expected


def test_a_document_too_deep_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(SourceError, match=r"x\.json: not a valid json file: .*recursion"):
        read(tmp_path / "x.json")


def test_tables_beside_tars_are_read_only_when_asked_for(tmp_path: Path) -> None:
    tar(tmp_path / "00000.tar", {"0.jpg": picture(), "0.txt": b"in the tar"})
    pq.write_table(pa.table({"url": [A], "caption": ["in the table"]}), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    assert read(tmp_path) == [(None, "in the tar")]
    assert read(tmp_path, kind="table") == [(A, "in the table")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"link,words\n1,2\n", "no column for the url .*there are: link, words"),
        ("x.csv", b"url,words\n1,2\n", "no column for the text .*there are: url, words"),
        ("x.parquet", b"PAR1 broken", "not a valid parquet file"),
        ("x.jsonl", b"{broken", "not a valid jsonl file"),
        ("x.jsonl", b"[1]\n", "must be JSON objects"),
        ("x.tar", b"not a tar" * 200, "cannot be read as webdataset"),
        ("x.csv.gz", b"not gzip", "cannot be read as csv"),
        ("x.txt", b"Read me first.\n", "no URL in its first lines"),
    ],
)
def test_unreadable_files_are_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.csv.gz", "x.txt.gz"])
def test_a_file_that_is_one_line_is_not_read_into_memory(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "LONGEST_FIELD", 100_000)
    head = b"url,text\n" if "csv" in name else b'{"url": "u", "text": "t"}\n'
    with gzip.open(tmp_path / name, "wb") as file:
        file.write(head)
        for _ in range(40):
            file.write(b"a" * 1_000_000)
    files = list_files(SourceConfig(path=str(tmp_path / name)))
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match="line 2 has more than 100,000 characters") as caught:
            list(read_rows(files[0]))
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert str(tmp_path / name) in str(caught.value)


def test_members_of_tars_are_hashed_in_pieces_and_texts_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars, "LONGEST_FIELD", 100_000)
    image = bytes(40_000_000)
    good = tar(tmp_path / "good.tar", {"0.jpg": image, "0.txt": b"a cat"})
    bad = tar(tmp_path / "bad.tar", {"0.jpg": b"", "0.txt": b"a" * 100_001})
    files = [file for path in (good, bad) for file in list_files(SourceConfig(path=str(path)))]
    tracemalloc.start()
    try:
        (record,) = tars.read_webdataset(files[0])
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()
    assert (record.text, record.sha256) == ("a cat", hashlib.sha256(image).hexdigest())
    with pytest.raises(SourceError, match=r"bad\.tar.*: 0\.txt has more than 100,000 bytes"):
        list(read_rows(files[1]))


def test_a_configured_column_that_is_missing_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": [A], "text": ["t"]}), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match="no column alt; there are: url, text; set text_column"):
        read(tmp_path / "x.parquet", text_column="alt")


def test_a_column_of_another_type_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": [A], "text": [1.5]}), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match="column text holds double"):
        read(tmp_path / "x.parquet")


@pytest.mark.skipif("CAPFILT_TEST_DATA" not in os.environ, reason="CAPFILT_TEST_DATA is unset")
def test_real_alt_text_files() -> None:
    folder = Path(os.environ["CAPFILT_TEST_DATA"]) / "alt_text"
    laion = read(folder / "img2dataset_test_1000.parquet")
    cc3m = read(folder / "cc3m_validation_6000.tsv")
    assert (len(laion), len(cc3m)) == (1000, 6000)
    assert all(url and url.startswith("http") for url, _ in laion + cc3m)
    assert sum(bool(text) for _, text in laion + cc3m) > 6900


def test_several_text_columns_are_rows_of_one_image(tmp_path: Path) -> None:
    lines = [
        {"url": A, "alt": "a cat", "title": "Tom", "more": ["x", ""]},
        {"url": B, "alt": "", "title": None, "more": "y"},
        {"url": A, "alt": None},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    found = read(tmp_path / "x.jsonl", text_column=["alt", "title", "more"])
    assert found == [(A, "a cat"), (A, "Tom"), (A, "x"), (B, "y"), (A, "")]
    table = {"url": [A, B], "alt": ["a", ""], "title": ["b", ""]}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    source = SourceConfig(path=str(tmp_path / "x.parquet"), text_column=("alt", "title"))
    (rows,) = read_rows(list_files(source)[0])
    assert rows["original_text"].to_pylist() == ["a", "b", ""]
    assert len(set(rows["row_id"].to_pylist())) == 3
    assert len(set(rows["sample_id"].to_pylist())) == 2


def test_hashes_and_further_columns_are_kept(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"url": [A], "text": ["t"], "MD5": [" ABC "], "nsfw": [0.5], "licence": ["by"]}),
        tmp_path / "x.parquet",
    )
    source = SourceConfig(
        path=str(tmp_path / "x.parquet"), hash_column="MD5", keep_columns=("nsfw", "licence")
    )
    (rows,) = read_rows(list_files(source)[0])
    assert rows["image_hash"].to_pylist() == ["abc"]
    assert json.loads(rows["extra"][0].as_py()) == {"nsfw": 0.5, "licence": "by"}
    for field in ({"hash_column": "nope"}, {"keep_columns": ("nope",)}):
        with pytest.raises(SourceError, match="no column nope"):
            read(tmp_path / "x.parquet", **field)


def test_kept_columns_are_json_whatever_they_hold(tmp_path: Path) -> None:
    row = {
        "url": A,
        "text": "t",
        "similarity": float("nan"),
        "scores": [0.5, float("-inf")],
        "digest": b"b\x00\xff",
        "taken": datetime.date(2024, 5, 1),
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "x.parquet")
    kept = ("similarity", "scores", "digest", "taken")
    source = SourceConfig(path=str(tmp_path / "x.parquet"), keep_columns=kept)
    (rows,) = read_rows(list_files(source)[0])

    def never(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    assert json.loads(rows["extra"][0].as_py(), parse_constant=never) == {
        "similarity": None,
        "scores": [0.5, None],
        "digest": "6200ff",
        "taken": "2024-05-01",
    }
