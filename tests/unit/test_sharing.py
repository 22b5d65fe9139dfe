"""With shared captions, a round says of every text what it says without; with real models."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dag import stage_input
from pipeline.engine.shard import run_stage
from pipeline.ledger import balance
from stages.base import LocalContext, ShardStage
from stages.caption import CaptionConfig, CaptionStage
from stages.dedup import CopiesStage, DedupConfig, DedupStage
from stages.filter import FilterConfig, FilterStage
from stages.keeper import ImageConfig
from stages.schemas import DOWNLOAD, SHARED, SOURCES
from stages.select import SelectConfig, SelectStage
from tests import tiny_models
from tests.images import jpeg
from tests.tables import filled, write_shards

TEXTS = ["a red dog", "two birds", "a blue car near the sea", "a small house", "a cat", "a horse"]
Row = dict[str, Any]
Outcome = dict[str, Any]


class Counted(CaptionStage):
    """A captioner that remembers what it was asked for."""

    def __init__(self, config: CaptionConfig) -> None:
        super().__init__(config)
        self.seen: list[str] = []

    def process(self, table: pa.Table) -> pa.Table:
        self.seen += table["sha256"].to_pylist()
        return super().process(table)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, ShardStage]:
    folder = tmp_path_factory.mktemp("models")
    captioner = tiny_models.save_blip(tiny_models.captioner_model(), folder / "captioner")
    matcher = tiny_models.save_blip(tiny_models.matcher_model(), folder / "matcher")
    made: dict[str, ShardStage] = {
        "caption": Counted(CaptionConfig(model=str(captioner), batch_size=4, device="cpu")),
        "filter": FilterStage(FilterConfig(model=str(matcher), batch_size=4, device="cpu")),
    }
    for stage in made.values():
        stage.setup()
    return made


def crawl(pictures: int, images: int, shards: int) -> list[list[Row]]:
    """Shards of images of few pictures: each of its own URL, many with a text of their own."""
    rng = np.random.default_rng(0)
    found: list[list[Row]] = [[] for _ in range(shards)]
    for number in range(images):
        picture = number if number < pictures else int(rng.integers(pictures))
        data = jpeg(picture)
        digest = hashlib.sha256(data).hexdigest()
        row = {
            "row_id": f"r{number:03d}", "sample_id": f"s{int(rng.integers(1 << 30)):010x}",
            "source": "web", "url": f"http://x/{number}", "text": str(rng.choice(TEXTS)),
            "status": "success", "sha256": digest, "pixel_sha256": digest, "image": data,
            "original_width": 32 + number, "original_height": 32,
        }  # fmt: skip
        found[int(rng.integers(shards))].append(row)
    return found


def curated(
    folder: Path, shards: Sequence[Sequence[Row]], stages: Mapping[str, ShardStage], share: bool
) -> tuple[pa.Table, Outcome]:
    """(pairs, what was counted) of a round's curation."""
    folder.mkdir()
    names = [f"{number:06d}" for number in range(len(shards))]
    downloads = [filled(DOWNLOAD, rows) for rows in shards]
    columns = [name for name in SOURCES.names if name in DOWNLOAD.names]
    sources = [
        filled(SOURCES, table.select(columns).to_pylist(), original_text="", text_boilerplate=False)
        for table in downloads
    ]
    inputs = {
        "sources": write_shards(folder, "sources", sources),
        "download": write_shards(folder, "download", downloads),
    }
    if share:
        CopiesStage(DedupConfig().sharing([]), names).run(inputs, folder, LocalContext())
    captioned, scored = [], []
    for name, download in zip(names, downloads, strict=True):
        tables = {"download": download}
        for file in folder.glob(f"shard={name}-*.parquet"):
            tables["shared"] = pq.read_table(file, schema=SHARED)
        tables["caption"] = run_stage(stages["caption"], tables)
        captioned.append(tables["caption"])
        scored.append(run_stage(stages["filter"], tables))
        assert len(scored[-1]) == sum(
            len(texts) for texts in stage_input("filter", tables)["texts"].to_pylist()
        )
    inputs["captions"] = write_shards(folder, "captions", captioned)
    inputs["scores"] = write_shards(folder, "scores", scored)
    DedupStage(DedupConfig(), ImageConfig()).run(inputs, folder, LocalContext())
    inputs["clusters"] = [folder / "clusters.parquet"]
    every = pa.concat_tables(scored)["itm_score"].to_numpy()
    SelectStage(SelectConfig(threshold=middle(every), synthetic_threshold=0), names).run(
        inputs, folder, LocalContext()
    )
    books = {"rows": [folder / "rows.parquet"], "pairs": [folder / "pairs.parquet"]}
    balance(inputs | books)
    return pq.read_table(folder / "pairs.parquet"), {"captions": sum(map(len, captioned))}


def middle(scores: np.ndarray) -> float:
    """A threshold that no score is near: other batches round otherwise."""
    ordered = np.unique(scores.round(4))
    inner = ordered[len(ordered) // 4 : -len(ordered) // 4]
    widest = int(np.argmax(np.diff(inner)))
    assert inner[widest + 1] - inner[widest] > 1e-3
    return float(inner[widest] + inner[widest + 1]) / 2


def trainable(pairs: pa.Table) -> dict[tuple[str, str, str], float]:
    """(picture, source, text) → score, of what goes into the training set."""
    rows = [row for row in pairs.to_pylist() if row["state"] in ("kept", "merged")]
    found = {(row["cluster_id"], row["source"], row["text"]): row["itm_score"] for row in rows}
    assert len(found) == len(rows)
    return found


def test_copies_are_captioned_once_and_the_training_set_is_the_same(
    tmp_path: Path, stages: Mapping[str, ShardStage]
) -> None:
    shards = crawl(pictures=6, images=60, shards=4)
    captioner = stages["caption"]
    assert isinstance(captioner, Counted)
    captioner.seen.clear()
    alone, every = curated(tmp_path / "off", shards, stages, share=False)
    assert len(captioner.seen) == every["captions"] == 60
    captioner.seen.clear()
    shared, once = curated(tmp_path / "exact", shards, stages, share=True)
    assert sorted(captioner.seen) == sorted({row["sha256"] for rows in shards for row in rows})
    assert once["captions"] == 6
    expected, found = trainable(alone), trainable(shared)
    assert set(found) == set(expected) and 12 < len(found) < 42
    assert [found[key] for key in found] == pytest.approx(
        [expected[key] for key in found], abs=1e-5
    )
    states = {pair["pair_id"]: pair["state"] for pair in alone.to_pylist()}
    web = [pair for pair in shared.to_pylist() if pair["source"] == "web"]
    assert len(web) == 60 and {pair["state"] for pair in web} >= {"rejected", "duplicate", "merged"}
    # No web text is judged otherwise; which of equal ones is the duplicate hangs on the survivor.
    judged = {"rejected": "rejected"}
    assert [judged.get(pair["state"]) for pair in web] == [
        judged.get(states[pair["pair_id"]]) for pair in web
    ]
