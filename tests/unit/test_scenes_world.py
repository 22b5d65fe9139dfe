"""The world as files: whole, repeatable, readable by the tools that read them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
from PIL import Image, UnidentifiedImageError

from stages.errors import SourceError
from stages.models.text import load_tokenizer
from stages.scenes.config import FaultConfig, WorldConfig
from stages.scenes.language import WORDS, is_true
from stages.scenes.plan import annotated_scenes
from stages.scenes.scene import Scene
from stages.scenes.world import build_world, write_tokenizer

CONFIG = WorldConfig(
    web_rows=200,
    human_images=20,
    dev_images=10,
    test_images=12,
    faults=FaultConfig(slow=1, pixel=2, hostile=4),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds") / "world"
    build_world(CONFIG, folder)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_equal_configs_give_equal_bytes(world: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    build_world(CONFIG, again)
    assert files_of(again) == files_of(world)


def test_a_built_world_is_left_alone(world: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in world.rglob("*")}
    build_world(CONFIG, world)
    assert {file: file.stat().st_mtime_ns for file in world.rglob("*")} == before


def test_half_a_world_is_built_anew(tmp_path: Path) -> None:
    leftover = tmp_path / ".world.partial" / "human"
    leftover.mkdir(parents=True)
    (leftover / "junk").touch()
    build_world(CONFIG, tmp_path / "world")
    assert [path.name for path in tmp_path.iterdir()] == ["world"]
    assert not (tmp_path / "world" / "human" / "junk").exists()


def test_another_world_is_not_overwritten(world: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds another world"):
        build_world(CONFIG.model_copy(update={"seed": 1}), world)
    (tmp_path / "letter.txt").write_text("precious")
    with pytest.raises(SourceError, match="other files"):
        build_world(CONFIG, tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "precious"


def test_truth_has_one_row_for_each_url_and_caption(world: Path) -> None:
    web, truth = f"'{world}/web.parquet'", f"'{world}/truth.parquet'"
    query = f"select count(*), count(is_true) from {web} left join {truth} using (url, caption)"
    assert duckdb.sql(query).fetchall() == [(200, 200)]
    query = f"select count(*), count(distinct (url, caption)) from {truth}"
    assert duckdb.sql(query).fetchall() == [(198, 198)]
    for row in pq.read_table(world / "truth.parquet").to_pylist():
        scene = row["scene"] and Scene.from_json(row["scene"])
        assert row["is_true"] == bool(scene and is_true(scene, row["caption"]))


def test_answers_are_what_the_truth_says(world: Path) -> None:
    answers = {row["url"]: row for row in pq.read_table(world / "responses.parquet").to_pylist()}
    truth = {row["url"]: row for row in pq.read_table(world / "truth.parquet").to_pylist()}
    statuses = {"not_found": 404, "gone": 410, "redirect": 302, "slow": 0, "refused": 0}
    for url, row in truth.items():
        answer, headers = answers[url], json.loads(answers[url]["headers"])
        assert answer["status"] == statuses.get(row["fault"], 200)
        assert ("X-Robots-Tag" in headers) == (row["fault"] == "opt_out")
        if row["fault"] == "redirect":
            answer = answers[headers["Location"]]
        if row["fault"] in ("ok", "redirect", "opt_out"):
            assert min(Image.open(io.BytesIO(answer["body"])).size) >= 32
        if row["fault"] in ("corrupt", "html"):
            with pytest.raises((UnidentifiedImageError, OSError, SyntaxError)):
                Image.open(io.BytesIO(answer["body"])).load()
        if row["fault"] == "pixel":
            assert Image.open(io.BytesIO(answer["body"])).size == (1, 1)


def test_exact_duplicates_are_equal_bytes_and_no_other_images_are(world: Path) -> None:
    answers = {row["url"]: row for row in pq.read_table(world / "responses.parquet").to_pylist()}
    groups: dict[bytes, set[tuple[int, bool]]] = {}
    for row in pq.read_table(world / "truth.parquet").to_pylist():
        if row["fault"] == "ok":
            identity = (row["duplicate_group"], row["duplicate_kind"] == "near")
            groups.setdefault(answers[row["url"]]["body"], set()).add(identity)
    assert all(len(identities) == 1 for identities in groups.values())
    whole = [identity for identities in groups.values() for identity in identities]
    originals = [identity for identity in whole if not identity[1]]
    assert len(originals) == len(set(originals))


def test_annotated_sets_hold_pictures_true_captions_and_near_misses(world: Path) -> None:
    scenes = iter(annotated_scenes(CONFIG))
    for name, count in (("test", 12), ("dev", 10), ("human", 20)):
        lines = [json.loads(line) for line in (world / name / "annotations.jsonl").open()]
        assert len(lines) == count
        for line in lines:
            scene = next(scenes)
            assert Image.open(world / name / line["image"]).size == (64, 64)
            assert len(line["captions"]) == (1 if name == "human" else 2)
            assert all(is_true(scene, text) for text in line["captions"])
            assert ("wrong_captions" in line) == (name != "human")
            assert not any(is_true(scene, text) for text in line.get("wrong_captions", ()))


def test_the_tokenizer_opens_and_keeps_words_whole(world: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer")
    words = ["a", "picture", "of", "an", "orange", "ring"]
    assert tokenizer.tokenize("A picture of an orange ring") == words
    assert all(tokenizer.tokenize(word) == [word] for word in WORDS)
    assert tokenizer.tokenize("IMG_0042.jpg zebra") == (
        ["img", "_", "0", "##0", "##4", "##2", ".", "jpg", "z", "##e", "##b", "##r", "##a"]
    )
    assert tokenizer.decode(tokenizer("a red star")["input_ids"], skip_special_tokens=True) == (
        "a red star"
    )


def test_the_tokenizer_takes_blips_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    plain = len((tmp_path / "vocab.txt").read_text().splitlines())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[DEC]", "[ENC]"]) == [0, plain, plain + 1]
    assert tokenizer.bos_token == "[DEC]"
