"""The download benchmark at its smallest: everything runs, and every status is the truth."""

from __future__ import annotations

from tests.bench.download import FAULTY, mixed, run


def test_a_small_run() -> None:
    faulty = 2 * len(FAULTY) + 20
    assert {row.status for row in mixed(faulty, slow=3)} >= {"timeout", "dns", "aspect", "success"}
    results = {r["metric"]: r for r in run(24, faulty, (100, 200), 3, rounds=1)}
    raced = results["images a second"]
    assert [raced["value"]] == raced["values"]
    assert 0 < raced["least"] == raced["ratio"] == raced["most"]
    memory = results["peak memory of a worker"]
    assert memory["value"] > 50 and memory["value"] / memory["ratio"] > 50  # MiB
    assert results["rows with another status or code than the server's"]["value"] == 0
    assert results["ingest of 200 rows, peak memory"]["value"] > 10
