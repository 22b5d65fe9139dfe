from __future__ import annotations

import math
from pathlib import Path

import pytest

from pipeline.report.collect import (
    BINS,
    POINTS,
    Clusters,
    Metric,
    RoundFacts,
    RunFacts,
    read_facts,
    read_histogram,
)
from pipeline.runfolder import read_rounds
from pipeline.store import Store
from stages.schemas import CLUSTERS, PAIRS, TRAINING_LOG
from tests.run_folder import make_run
from tests.tables import filled


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_run(str(tmp_path / "odd [1] *'s"))


@pytest.fixture
def facts(store: Store) -> RunFacts:
    return read_facts(store)


def put(store: Store, round_: int, stage: str, file: str, table: object) -> RoundFacts:
    """The round with another table in place of the one that a stage published."""
    (name,) = read_rounds(store)[round_].records[stage]
    record = store.read_record(name)
    written = store.put_table("elsewhere", table)
    target = f"elsewhere/{stage}/{file}"
    store.write_bytes(target, store.read_bytes(written.path))
    kept = [payload for payload in record.payloads if not payload.path.endswith(file)]
    payloads = (*kept, written.model_copy(update={"path": target}))
    store.remove(name)
    store.publish(record.model_copy(update={"payloads": payloads}))
    return read_facts(store).rounds[round_]


def test_a_finished_run(facts: RunFacts) -> None:
    raw, round_ = facts.rounds
    assert [raw.bootstrapped, round_.bootstrapped] == [False, True]
    assert round_.rows_in == {"web": 6, "human": 2}
    assert round_.pairs_in == {"web": 4, "synthetic": 4, "human": 2}
    assert sum(round_.pairs_in.values()) == round_.count("pairs") == 10
    assert round_.count("rows") == 8 and round_.count("rows", "web", "http_4xx") == 1
    assert round_.count("pairs", None, "kept", "merged") == 9
    assert round_.metrics["test", "med", "tr_at_1"] == Metric(0.75, 40)
    assert round_.losses["pretrain", "loss"] == [(1.0, 1.0), (2.0, 0.5)]
    assert ("pretrain", "loss_itm") not in round_.losses
    assert sorted(round_.tars) == ["000000", "000001"]


def test_time_at_work(facts: RunFacts) -> None:
    """Every record of the folder took a second, one after the other."""
    assert facts.begun == 1_700_000_000.0 and facts.ended is not None
    assert facts.seconds == facts.ended - facts.begun > 20


def test_secrets_are_masked(store: Store) -> None:
    run = store.read_json("run.json")
    run["config"]["run"] = "s3://user:hunter2@bucket/run"
    run["config"]["sources"] = [{"path": "https://h/x.parquet?X-Amz-Signature=hunter2"}]
    store.write_json("run.json", run)
    assert "hunter2" not in str(read_facts(store).config)


def test_clusters(store: Store, facts: RunFacts) -> None:
    # The cat, the dog, the tree and the car: each alone.
    assert facts.rounds[1].clusters == Clusters(images=4, duplicates=0, groups=0)
    assert facts.rounds[0].clusters is None
    rows = [{"sample_id": f"s{n}", "cluster_id": c} for n, c in enumerate("aaabbc")]
    found = put(store, 1, "dedup", "clusters.parquet", filled(CLUSTERS, rows))
    assert found.clusters == Clusters(images=6, duplicates=3, groups=2)
    none = put(store, 1, "dedup", "clusters.parquet", filled(CLUSTERS, []))
    assert none.clusters == Clusters(0, 0, 0)


def test_a_long_curve_is_thinned(store: Store) -> None:
    rows = [
        {"step": step, "loss": 2.0, "loss_itm": math.nan if step == 5 else step / 1000}
        for step in range(1, 1001)
    ]
    log = filled(TRAINING_LOG, rows, stage="pretrain")
    curve = put(store, 1, "pretrain", "log.parquet", log).losses["pretrain", "loss_itm"]
    assert len(curve) == POINTS and curve[-1][0] == 1000
    assert all(math.isfinite(y) for _, y in curve)
    assert all(abs(y - x / 1000) < 0.01 for x, y in curve)


def test_a_histogram_of_scores(store: Store, facts: RunFacts) -> None:
    found = read_histogram(store, facts.rounds[1])
    assert {source: sum(counts) for source, counts in found.items()} == {"web": 4, "synthetic": 4}
    # 0.1, 0.7, 0.8, 0.9 in forty bins
    assert [n for n, count in enumerate(found["web"]) if count] == [4, 28, 32, 36]
    assert read_histogram(store, facts.rounds[0]) == {}
    scores = [-0.5, 0.0, 1.0, 1.5, math.nan, None]
    rows = [{"pair_id": str(n), "itm_score": score} for n, score in enumerate(scores)]
    odd = put(store, 1, "select", "pairs.parquet", filled(PAIRS, rows, source="web"))
    assert read_histogram(store, odd)["web"] == [2, *[0] * (BINS - 2), 2]


@pytest.mark.parametrize("stages", [("gate",), ("ledger", "evaluate"), ("dedup", "select")])
def test_an_unfinished_round(store: Store, stages: tuple[str, ...]) -> None:
    for stage in stages:
        for name in read_rounds(store)[1].records[stage]:
            store.remove(name)
    found = read_facts(store).rounds[1]
    assert bool(found.ledger) == ("ledger" not in stages)
    assert bool(found.metrics) == ("evaluate" not in stages)
    assert ("pairs" in found.views) == ("select" not in stages)


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write_json("run.json", {"config": {}, "created": 1_700_000_000.0})
    facts = read_facts(store)
    assert (facts.rounds, facts.config, facts.begun, facts.seconds) == ((), {}, None, 0)
