"""The download benchmark at its smallest: everything runs, and every status is the truth."""

from __future__ import annotations

from tests.bench.download import FAULTY, mixed, run


def test_a_small_run() -> None:
    faulty = 2 * len(FAULTY) + 2
    assert {row.status for row in mixed(faulty, slow=2)} >= {"timeout", "dns", "aspect", "success"}
    results = {r["metric"]: r for r in run(images=24, faulty=faulty, rows=(100, 200), slow=2)}
    assert results["images a second"]["value"] > 0
    assert results["images a second"]["ratio"] > 0
    assert results["rows with another status than the server's truth"]["value"] == 0
    assert results["ingest of 200 rows, peak memory"]["value"] > 10
