"""Training tars and their index, read back with tarfile and webdataset."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from pipeline.images import write_tar
from stages.assemble import AssembleConfig, AssembleStage
from stages.base import LocalContext
from stages.errors import RunError
from stages.schemas import DOWNLOAD, PAIRS, TRAINING_INDEX
from tests.tables import filled, write_shards

Row = dict[str, Any]
SHARDS = ("000003", "000007")


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (seed * 40 % 256, 10, 10)).save(buffer, "JPEG")
    return buffer.getvalue()


IMAGES = {sample: jpeg(number) for number, sample in enumerate("abcdh")}


def pair(sample: str, source: str, text: str, state: str, **more: Any) -> Row:
    shard = SHARDS[0] if sample in "ab" else SHARDS[1]
    known = {"pair_id": f"{sample}-{text}", "sample_id": sample, "source": source, "text": text}
    return known | {"state": state, "shard": shard} | more


PAIRS_OF_TWO_SHARDS = [
    pair("a", "web", "eine Straße", "kept", itm_score=0.75),
    pair("a", "synthetic", "a street", "kept", itm_score=0.5),
    pair("b", "web", "spam", "rejected", itm_score=0.1),
    pair("c", "web", "the same street", "merged", itm_score=0.625, carried_by="a"),
    pair("c", "web", "a street", "duplicate", carried_by="a"),
    pair("d", "web", "a 👩‍🚀", "kept"),
    pair("d", "human", "an astronaut", "kept"),
    pair("h", "human", "a horse", "kept"),
    pair("h", "human", "a brown horse", "kept"),
]


def assemble(
    folder: Path,
    pairs: Sequence[Row] = PAIRS_OF_TWO_SHARDS,
    images: Sequence[str] = ("ab", "cdh"),
    samples_per_tar: int = 1000,
) -> Path:
    folder.mkdir(exist_ok=True)
    tars = []
    for shard, samples in zip(SHARDS, images, strict=True):
        rows = [{"sample_id": sample, "image": IMAGES[sample]} for sample in samples]
        tars.append(folder / f"{shard}.tar")
        tars[-1].write_bytes(write_tar(filled(DOWNLOAD, rows)))
    inputs = {"pairs": write_shards(folder, "pairs", [filled(PAIRS, pairs)]), "images": tars}
    output = folder / "out"
    output.mkdir()
    stage = AssembleStage(AssembleConfig(samples_per_tar=samples_per_tar), SHARDS)
    stage.run(inputs, output, LocalContext())
    return output


def samples(tar: Path) -> Mapping[str, Row]:
    data = webdataset.WebDataset(str(tar), shardshuffle=False).decode()
    return {sample["__key__"]: sample for sample in data}


def test_webdataset_reads_every_image_with_its_texts(tmp_path: Path) -> None:
    output = assemble(tmp_path)
    assert sorted(path.name for path in output.iterdir()) == [
        "human-000000.tar", "index.parquet", "web-000000.tar",
    ]  # fmt: skip
    web, human = samples(output / "web-000000.tar"), samples(output / "human-000000.tar")
    assert (list(web), list(human)) == (["a", "d"], ["d", "h"])
    assert web["a"]["json"] == {
        "sample_id": "a",
        "texts": [
            {"text": "a street", "source": "synthetic", "pair_id": "a-a street", "origin": "a"},
            {"text": "eine Straße", "source": "web", "pair_id": "a-eine Straße", "origin": "a"},
            {
                "text": "the same street",
                "source": "web",
                "pair_id": "c-the same street",
                "origin": "c",
            },
        ],
    }
    assert [text["text"] for text in human["h"]["json"]["texts"]] == ["a brown horse", "a horse"]
    with tarfile.open(output / "web-000000.tar") as archive:
        assert archive.getnames() == ["a.jpg", "a.json", "d.jpg", "d.json"]
        image = archive.extractfile("d.jpg")
        assert image is not None
        assert image.read() == IMAGES["d"]


def test_the_index_names_every_kept_and_merged_pair(tmp_path: Path) -> None:
    index = pq.read_table(assemble(tmp_path) / "index.parquet")
    assert index.schema == TRAINING_INDEX
    found = {row.pop("pair_id"): row for row in index.to_pylist()}
    wanted = {row["pair_id"] for row in PAIRS_OF_TWO_SHARDS if row["state"] in {"kept", "merged"}}
    assert found.keys() == wanted
    assert len(index) == len(found)
    assert found["c-the same street"] == {
        "sample_id": "a", "source": "web", "text": "the same street", "itm_score": 0.625,
        "origin": "c", "tar": "web-000000.tar", "key": "a",
    }  # fmt: skip
    assert found["d-an astronaut"]["tar"] == "human-000000.tar"


def test_tars_are_cut_and_the_index_follows(tmp_path: Path) -> None:
    pairs = [pair(sample, "web", "x", "kept") for sample in "abcdh"]
    output = assemble(tmp_path, pairs, samples_per_tar=2)
    names = [f"web-00000{number}.tar" for number in range(3)]
    assert [list(samples(output / name)) for name in names] == [["a", "b"], ["c", "d"], ["h"]]
    index = pq.read_table(output / "index.parquet")
    assert index["tar"].to_pylist() == [names[0]] * 2 + [names[1]] * 2 + [names[2]]


def test_the_same_pairs_give_the_same_bytes(tmp_path: Path) -> None:
    def sums(output: Path) -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in output.iterdir()}

    backwards = list(reversed(PAIRS_OF_TWO_SHARDS))
    first, second = assemble(tmp_path / "1"), assemble(tmp_path / "2", backwards)
    assert sums(first) == sums(second)
    with tarfile.open(first / "web-000000.tar") as archive:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in archive} == {(0, 0, 0, "", 0o644)}


def test_nothing_kept_gives_an_empty_index_and_no_tar(tmp_path: Path) -> None:
    output = assemble(tmp_path, [pair("a", "web", "spam", "rejected")])
    assert [path.name for path in output.iterdir()] == ["index.parquet"]
    assert pq.read_table(output / "index.parquet").num_rows == 0


def test_a_missing_image_is_an_error_not_a_smaller_set(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"000003\.tar: no image of sample b "):
        assemble(tmp_path, [pair("b", "web", "x", "kept")], images=("a", ""))


@pytest.mark.parametrize(
    "lost",
    [
        pair("a", "web", "x", "kept", shard="000099"),
        pair("a", "web", "x", "merged", carried_by="nobody"),
    ],
)
def test_a_pair_that_points_nowhere_is_an_error(tmp_path: Path, lost: Row) -> None:
    with pytest.raises(RunError, match="pair a-x: its image"):
        assemble(tmp_path, [lost])


def test_json_survives_any_text(tmp_path: Path) -> None:
    text = '</script>"\\\n\x00 مزرعة ' + "word " * 10_000
    output = assemble(tmp_path, [pair("a", "web", text, "kept")])
    with tarfile.open(output / "web-000000.tar") as archive:
        member = archive.extractfile("a.json")
        assert member is not None
        assert json.loads(member.read())["texts"][0]["text"] == text
