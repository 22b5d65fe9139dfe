"""Final states of rows and pairs, on rounds small enough to work out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from stages.base import LocalContext
from stages.ids import failed_caption_id, pair_id
from stages.schemas import (
    CAPTIONS,
    CLUSTERS,
    CONTAMINATED,
    DOWNLOAD,
    PAIRS,
    ROWS,
    SCORES,
    SOURCES,
    TEXTS,
)
from stages.select import SelectConfig, SelectStage, TextRules, normal_form
from stages.texts import identify_language, score_text
from tests.tables import filled, write_shards

Row = dict[str, Any]


@dataclass
class Round:
    """A round under construction: download rows by shard, and what the models said."""

    folder: Path
    shards: list[list[Row]] = field(default_factory=lambda: [[]])
    captions: list[Row] = field(default_factory=list)
    scores: list[Row] = field(default_factory=list)
    clusters: dict[str, str] = field(default_factory=dict)
    tombstones: list[str] = field(default_factory=list)
    retries: dict[str, str] = field(default_factory=dict)
    contaminated: dict[str, str] = field(default_factory=dict)
    scored: bool = True

    def web(self, sample: str, text: str, score: float | None = None, **more: Any) -> str:
        """A downloaded row with its score; returns the pair's id."""
        row = {"sample_id": sample, "text": text, "source": "web", "status": "success"} | more
        self.shards[-1].append({"row_id": f"row{sum(map(len, self.shards)):03d}"} | row)
        return self._score(sample, row["source"], text, score)

    def synthetic(self, sample: str, text: str, score: float | None = None, index: int = 0) -> str:
        caption = {"sample_id": sample, "caption_index": index, "text": text, "status": "success"}
        self.captions.append(caption)
        return self._score(sample, "synthetic", text, score)

    def _score(self, sample: str, source: str, text: str, score: float | None) -> str:
        pair = pair_id(sample, source, text)
        if score is not None:
            names = {"pair_id": pair, "sample_id": sample, "source": source, "text": text}
            values = {"itm_score": score, "itc_score": score / 2, "status": "success"}
            self.scores.append(names | values)
        return pair

    def _source(self, row: Row) -> Row:
        known = {name: row[name] for name in ("row_id", "sample_id", "source", "text")}
        return {
            **known,
            **score_text(row["text"] or "")._asdict(),
            **identify_language(row["text"] or "")._asdict(),
            "retry_of": self.retries.get(row["row_id"]),
        }

    def select(self, config: SelectConfig | None = None) -> tuple[list[Row], dict[str, Row]]:
        downloads = [filled(DOWNLOAD, rows) for rows in self.shards]
        inputs = {
            "sources": write_shards(
                self.folder,
                "sources",
                [
                    filled(SOURCES, [self._source(row) for row in table.to_pylist()])
                    for table in downloads
                ],
            ),
            "download": write_shards(self.folder, "download", downloads),
        }
        if self.scored:
            inputs |= {
                "captions": self._write("captions", filled(CAPTIONS, self.captions)),
                "scores": self._write("scores", filled(SCORES, self.scores)),
            }
        if self.clusters:
            tied = [{"sample_id": s, "cluster_id": c} for s, c in self.clusters.items()]
            inputs["clusters"] = self._write("clusters", filled(CLUSTERS, tied))
        if self.contaminated:
            leaks = [{"sample_id": s, "collides_with": n} for s, n in self.contaminated.items()]
            inputs["contaminated"] = self._write("contaminated", filled(CONTAMINATED, leaks))
        if self.tombstones:
            inputs["tombstones"] = self._write("gone", pa.table({"sample_id": self.tombstones}))
        names = [f"{number:06d}" for number in range(len(downloads))]
        SelectStage(config or SelectConfig(), names).run(inputs, self.folder, LocalContext())
        rows, pairs = (pq.read_table(self.folder / f"{name}.parquet") for name in ("rows", "pairs"))
        assert rows.schema == ROWS
        assert pairs.schema == PAIRS
        found = {row["pair_id"]: row for row in pairs.to_pylist()}
        assert len(found) == len(pairs)
        return rows.to_pylist(), found

    def _write(self, name: str, table: pa.Table) -> list[Path]:
        return write_shards(self.folder, name, [table])


@pytest.fixture
def round_(tmp_path: Path) -> Round:
    return Round(tmp_path)


def states(pairs: dict[str, Row]) -> dict[str, str]:
    return {pair: row["state"] for pair, row in pairs.items()}


def test_thresholds_by_source_and_human_pairs_unfiltered(round_: Round) -> None:
    high, low = round_.web("a", "a dog", 0.5), round_.web("a", "a cat", 0.499)
    near = round_.synthetic("a", "a brown dog", 0.89)
    sharp = round_.synthetic("a", "a dog on grass", 0.9, index=1)
    human = round_.web("h", "a horse", source="human")
    _, pairs = round_.select(SelectConfig(synthetic_threshold=0.9))
    assert states(pairs) == {
        high: "kept", low: "rejected", near: "rejected", sharp: "kept", human: "kept",
    }  # fmt: skip
    assert pairs[sharp]["itm_score"] == pytest.approx(0.9)
    assert pairs[sharp]["itc_score"] == pytest.approx(0.45)
    assert pairs[low]["detail"] is None
    assert pairs[human]["cluster_id"] is None
    assert pairs[high]["cluster_id"] == "a"


@pytest.mark.parametrize(("keep", "kept"), [("web", 0), ("synthetic", 1), ("both", 2)])
def test_ablations(round_: Round, keep: Any, kept: int) -> None:
    web, synthetic = round_.web("a", "one", 0.9), round_.synthetic("a", "two", 0.9)
    human = round_.web("h", "three", source="human")
    _, pairs = round_.select(SelectConfig(keep=keep))
    expected = [{web}, {synthetic}, {web, synthetic}][kept] | {human}
    assert {pair for pair, state in states(pairs).items() if state == "kept"} == expected
    assert set(states(pairs).values()) <= {"kept", "rejected"}


def test_every_row_has_one_state(round_: Round) -> None:
    round_.web("a", "x", 0.9)
    round_.web("a", "x", status="duplicate_row")
    round_.web("b", "y", status="http_404")
    round_.web("c", "z", status="quarantined")
    round_.tombstones = ["d"]
    round_.web("d", "w", 0.9)
    round_.web("d", "w", status="timeout")
    rows, pairs = round_.select()
    assert [(row["row_id"], row["state"]) for row in rows] == [
        ("row000", "downloaded"), ("row001", "duplicate_row"), ("row002", "http_404"),
        ("row003", "quarantined"), ("row004", "removed"), ("row005", "removed"),
    ]  # fmt: skip
    assert sorted(states(pairs).values()) == ["kept", "removed"]


def test_a_row_that_download_lost_has_no_state(round_: Round) -> None:
    round_.web("a", "x", 0.9)
    downloads = [filled(DOWNLOAD, [])]
    sources = [filled(SOURCES, [{"row_id": "row", "sample_id": "a"}])]
    inputs = {
        "sources": write_shards(round_.folder, "sources", sources),
        "download": write_shards(round_.folder, "download", downloads),
    }
    SelectStage(SelectConfig(), ["000000"]).run(inputs, round_.folder, LocalContext())
    rows = pq.read_table(round_.folder / "rows.parquet").to_pylist()
    assert rows == [{"row_id": "row", "sample_id": "a", "state": None, "shard": "000000"}]


def test_failures_keep_their_reason(round_: Round) -> None:
    round_.captions = [
        {"sample_id": "a", "caption_index": 0, "status": "failed", "detail": "no tokens"},
        {"sample_id": "a", "caption_index": 1, "status": "quarantined", "detail": "crashed"},
    ]
    empty, blank = round_.web("a", "", 0.9), round_.web("a", " \u3000\n", 0.9)
    dots, unscored = round_.web("a", "...", 0.9), round_.web("a", "a dog")
    broken = round_.web("a", "a cat")
    failed = {"pair_id": broken, "status": "quarantined", "detail": "shard crashed"}
    round_.scores.append(failed)
    nan = round_.web("a", "a bird", float("nan"))
    nothing = round_.web("h", "", source="human")
    _, pairs = round_.select(SelectConfig(threshold=0))
    assert {pair: (row["state"], row["detail"]) for pair, row in pairs.items()} == {
        failed_caption_id("a", 0): ("failed", "no tokens"),
        failed_caption_id("a", 1): ("quarantined", "crashed"),
        empty: ("failed", "empty text"),
        blank: ("failed", "empty text"),
        dots: ("failed", "empty text"),
        nothing: ("failed", "empty text"),
        unscored: ("failed", "not scored"),
        broken: ("quarantined", "shard crashed"),
        nan: ("failed", "score is not a number"),
    }
    assert pairs[failed_caption_id("a", 0)]["text"] is None


def test_the_best_matching_image_carries_the_texts_of_its_cluster(round_: Round) -> None:
    size = {"original_width": 10, "original_height": 10}
    large = {"original_width": 900, "original_height": 900}
    round_.clusters = {"a": "a", "b": "a", "c": "a", "z": "z"}
    a_good, a_bad = round_.web("a", "A red ball!", 0.8, **large), round_.web("a", "spam", 0.1)
    b_best = round_.web("b", "a ball on a table", 0.95, **size)
    b_same = round_.web("b", "a red ball", 0.7, **size)
    c_same, c_own = round_.web("c", "a red BALL", 0.94, **large), round_.synthetic("c", "toy", 0.6)
    alone = round_.web("z", "a red ball", 0.9)
    _, pairs = round_.select()
    assert {pair: (row["state"], row["carried_by"]) for pair, row in pairs.items()} == {
        b_best: ("kept", None),
        b_same: ("kept", None),
        a_good: ("duplicate", "b"),
        c_same: ("duplicate", "b"),
        c_own: ("merged", "b"),
        a_bad: ("rejected", None),
        alone: ("kept", None),
    }


def test_of_repeated_merged_texts_the_best_scored_is_merged(round_: Round) -> None:
    round_.clusters = {"a": "a", "b": "a", "c": "a"}
    best = round_.web("a", "x", 0.99)
    weak, strong = round_.web("b", "y", 0.6), round_.web("c", "Y.", 0.8)
    _, pairs = round_.select()
    assert states(pairs) == {best: "kept", weak: "duplicate", strong: "merged"}


def test_a_web_text_wins_over_the_same_synthetic_one(round_: Round) -> None:
    synthetic, web = round_.synthetic("a", "a dog", 0.9), round_.web("a", "A dog.", 0.9)
    _, pairs = round_.select()
    assert states(pairs) == {web: "kept", synthetic: "duplicate"}
    assert pairs[synthetic]["carried_by"] is None


@pytest.mark.parametrize("size", [(20, 20), (10, 10)])
def test_equal_matches_fall_to_resolution_then_to_the_smaller_id(
    round_: Round, size: tuple[int, int]
) -> None:
    round_.clusters = {"a": "a", "b": "a"}
    round_.web("a", "x", 0.9, original_width=10, original_height=10)
    round_.web("b", "y", 0.9, original_width=size[0], original_height=size[1])
    _, pairs = round_.select()
    survivor = next(row["sample_id"] for row in pairs.values() if row["state"] == "kept")
    assert survivor == ("b" if size == (20, 20) else "a")


def test_a_removed_survivor_leaves_its_cluster_to_choose_again(round_: Round) -> None:
    round_.clusters = {"a": "a", "b": "a", "c": "a"}
    best, second = round_.web("a", "x", 0.99), round_.web("b", "y", 0.8)
    third = round_.web("c", "z", 0.7)
    round_.tombstones = ["a"]
    _, pairs = round_.select()
    assert states(pairs) == {best: "removed", second: "kept", third: "merged"}
    assert pairs[third]["carried_by"] == "b"


def test_a_cluster_without_a_good_pair_has_no_survivor(round_: Round) -> None:
    round_.clusters = {"a": "a", "b": "a"}
    round_.web("a", "x", 0.1)
    round_.web("b", "y", 0.2)
    _, pairs = round_.select()
    assert set(states(pairs).values()) == {"rejected"}


def test_human_pairs_are_never_merged(round_: Round) -> None:
    """The same address stands in a web list and in a human set; its web twin matches better."""
    round_.clusters = {"a": "a", "b": "a"}
    web, twin = round_.web("a", "a dog", 0.6), round_.web("b", "a big dog", 0.9)
    human = round_.web("a", "a dog", source="human")
    _, pairs = round_.select()
    assert states(pairs) == {web: "merged", twin: "kept", human: "kept"}
    assert pairs[human]["carried_by"] is None


def test_a_sample_in_two_shards_is_one_pair_in_the_first(round_: Round) -> None:
    pair = round_.web("a", "x", 0.9, url="u1")
    round_.shards.append([])
    other = round_.web("a", "y", 0.9, url="u2")
    assert round_.web("a", "x", 0.2, url="u2") == pair
    rows, pairs = round_.select()
    assert [row["shard"] for row in rows] == ["000000", "000001", "000001"]
    assert {row["state"] for row in rows} == {"downloaded"}
    assert {(p, row["shard"], row["url"], row["state"]) for p, row in pairs.items()} == {
        (pair, "000000", "u1", "kept"),
        (other, "000000", "u1", "kept"),
    }
    assert pairs[pair]["itm_score"] == pytest.approx(0.9)


def test_a_raw_round_keeps_every_text(round_: Round) -> None:
    round_.scored = False
    one, again, empty = (round_.web("a", text) for text in ("a dog", "A DOG", ""))
    human = round_.web("h", "a horse", source="human")
    _, pairs = round_.select(SelectConfig(threshold=0.9))
    assert sorted(pairs[pair]["state"] for pair in (one, again)) == ["duplicate", "kept"]
    assert (pairs[empty]["state"], pairs[human]["state"]) == ("failed", "kept")
    assert pairs[one]["itm_score"] is None


def test_odd_texts_pass_through_unchanged(round_: Round) -> None:
    texts: Sequence[str] = (
        "<script>alert(1)</script>", "'; DROP TABLE pairs; --", "👩‍🚀 מִזְרָח", "nul \x00 inside",
        "word " * 10_000,
    )  # fmt: skip
    ids = {round_.web("a", text, 0.9): text for text in texts}
    _, pairs = round_.select()
    assert {pair: row["text"] for pair, row in pairs.items()} == ids
    assert set(states(pairs).values()) == {"kept"}


@pytest.mark.parametrize("shards", [0, 1, 2])
def test_no_rows_at_all(round_: Round, shards: int) -> None:
    round_.shards = [[] for _ in range(shards)]
    assert round_.select() == ([], {})


def test_order_of_the_files_of_scores_does_not_matter(tmp_path: Path) -> None:
    found = []
    for reverse in (False, True):
        folder = tmp_path / str(reverse)
        folder.mkdir()
        round_ = Round(folder)
        for number in range(50):
            round_.web(f"s{number:02d}", f"text {number % 3}", number / 50)
        round_.clusters = {f"s{number:02d}": f"s{number % 5:02d}" for number in range(50)}
        if reverse:
            round_.scores.reverse()
        found.append(round_.select(SelectConfig(threshold=0.3)))
    assert found[0] == found[1]
    assert set(states(found[0][1]).values()) == {"kept", "merged", "duplicate", "rejected"}


def test_what_an_evaluation_set_shows_is_never_trained_on(round_: Round) -> None:
    """Nor what shows the same picture, nor human pairs; tombstones and failures keep their say."""
    round_.clusters = {"a": "a", "b": "a", "c": "c"}
    one, two = round_.web("a", "x", 0.9), round_.web("b", "y", 0.1)
    other, caption = round_.web("c", "z", 0.9), round_.synthetic("a", "w", 0.9)
    human = round_.web("h", "t", source="human")
    gone = round_.web("g", "u", 0.9)
    round_.contaminated = {"b": "test/7.png", "h": "test/8.png", "g": "test/9.png"}
    round_.tombstones = ["g"]
    rows, pairs = round_.select()
    expected = dict.fromkeys([one, two, caption, human], "contaminated")
    assert states(pairs) == expected | {other: "kept", gone: "removed"}
    assert pairs[one]["detail"] == pairs[two]["detail"] == "test/7.png"
    assert pairs[human]["detail"] == "test/8.png"
    assert {row["state"] for row in rows if row["sample_id"] != "g"} == {"downloaded"}


def test_of_texts_that_many_images_share_the_best_matching_are_kept(round_: Round) -> None:
    scores = {"Buy now 1!": 0.9, "buy NOW 22": 0.8, "Buy, now": 0.7, "buy now": 0.3}
    pairs_ = [round_.web(f"s{i}", text, score) for i, (text, score) in enumerate(scores.items())]
    rare = round_.web("s9", "a red cube", 0.6)
    synthetic = round_.synthetic("s0", "buy now 3", 0.95)
    for cap, kept in ((None, 3), (3, 3), (2, 2), (1, 1)):
        _, pairs = round_.select(SelectConfig(text_cap=cap))
        expected = ["kept"] * kept + ["rejected"] * (4 - kept)
        assert [pairs[pair]["state"] for pair in pairs_] == expected
        assert states(pairs)[rare] == states(pairs)[synthetic] == "kept"
        table = pq.read_table(round_.folder / "texts.parquet")
        assert table.schema == TEXTS
        [row] = table.to_pylist()
        assert row == {
            "text": "buy now", "source": "web", "images": 4, "good": 3, "capped": 3 - kept,
        }  # fmt: skip
    assert "select.text_cap" in pairs[pairs_[1]]["detail"]


def test_copies_of_one_picture_share_a_turn(round_: Round) -> None:
    round_.clusters = {"a": "a", "b": "a", "c": "c", "d": "d"}
    same = [
        round_.web(s, "spam", score) for s, score in zip("abcd", (0.9, 0.6, 0.8, 0.7), strict=True)
    ]
    _, pairs = round_.select(SelectConfig(text_cap=2))
    assert [pairs[pair]["state"] for pair in same] == ["kept", "duplicate", "kept", "rejected"]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Photo #12 of 40!", "photo of"), ("IMG_0001", "img"), ("12/40", "12/40"), ("", ""),
        ("Straße  № 5", "strasse"), ("日本 2024", "日本"),
    ],
)  # fmt: skip
def test_texts_that_differ_in_case_digits_or_punctuation_are_alike(text: str, normal: str) -> None:
    assert normal_form(text) == normal


@pytest.mark.parametrize(
    ("rules", "rejected"),
    [
        ({}, set()),
        ({"min_words": 2}, {"dog"}),
        ({"max_words": 3}, {"a dog a dog a dog"}),
        ({"min_letters": 0.5}, {"12 34"}),
        ({"max_repetition": 0.5}, {"a dog a dog a dog"}),
        ({"boilerplate": False}, {"IMG_1.jpg"}),
    ],
)
def test_texts_are_rejected_by_rule_whatever_their_score(
    round_: Round, rules: dict[str, Any], rejected: set[str]
) -> None:
    texts = ("dog", "a dog a dog a dog", "12 34", "IMG_1.jpg")
    for number, text in enumerate(texts):
        round_.web(f"s{number}", text, 0.9)
        round_.synthetic(f"s{number}", text.upper() + " x", 0.9)
    _, pairs = round_.select(SelectConfig(texts=TextRules(**rules)))
    web = {pair["text"]: pair for pair in pairs.values() if pair["source"] == "web"}
    assert {text for text, pair in web.items() if pair["state"] == "rejected"} == rejected
    assert all(web[text]["detail"] for text in rejected)
    assert {p["state"] for p in pairs.values() if p["source"] == "synthetic"} == {"kept"}


def test_texts_are_kept_by_language(round_: Round) -> None:
    texts = {
        "en": "a dog runs on the beach",
        "de": "ein Hund läuft am Strand entlang",
        "ru": "собака бежит по пляжу",
        None: "12 34",
    }
    for number, text in enumerate(texts.values()):
        round_.web(f"s{number}", text, 0.9)
        round_.synthetic(f"s{number}", f"une photo {number}", 0.9)

    def details(**rules: Any) -> dict[str | None, str]:
        _, pairs = round_.select(SelectConfig(texts=TextRules(**rules)))
        assert {p["state"] for p in pairs.values() if p["source"] == "synthetic"} == {"kept"}
        refused = {p["text"]: p["detail"] for p in pairs.values() if p["state"] == "rejected"}
        return {code: refused[text] for code, text in texts.items() if text in refused}

    assert details() == {}
    assert details(languages=("en", "ru")) == {
        "de": "de is none of select.texts.languages",
        None: "language not identified",
    }
    assert set(details(min_language_score=1.0)) == {"en", "de", "ru"}
    with pytest.raises(ValidationError, match="must be a language's code"):
        TextRules(languages=("english",))


def test_a_row_that_a_later_one_tries_again_is_retried(round_: Round) -> None:
    round_.web("a", "a dog", status="timeout")
    round_.web("a", "a dog", 0.9)
    round_.web("b", "a cat", status="timeout")
    round_.retries = {"row001": "row000"}
    rows, pairs = round_.select()
    assert [row["state"] for row in rows] == ["retried", "downloaded", "timeout"]
    assert sorted(states(pairs).values()) == ["kept"]
