"""The download benchmark at its smallest: everything runs, and every status is the truth."""

from __future__ import annotations

from tests.bench.download import run


def test_a_small_run() -> None:
    results = {r["metric"]: r for r in run(images=24, faulty=24, rows=(100, 200))}
    assert results["images a second"]["value"] > 0
    assert results["images a second"]["ratio"] > 0
    assert results["rows with another status than the server's truth"]["value"] == 0
    assert results["ingest of 200 rows, peak memory"]["value"] > 10
