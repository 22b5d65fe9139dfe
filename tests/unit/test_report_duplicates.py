"""What the report says of the search for duplicates, in a small finished run."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.report.collect import read_facts
from pipeline.report.duplicates import read_duplicates
from pipeline.report.render import render
from pipeline.runfolder import read_rounds
from pipeline.store import Store
from stages.schemas import DEDUP, TEXTS
from tests.run_folder import make_run
from tests.tables import filled

FOUND = {
    ("exact", "copies"): 12.0,
    ("semantic", "tables"): 35.0,
    ("semantic", "bits"): 13.0,
    ("semantic", "pairs"): 1234.0,
    ("semantic", "sampled"): 2000.0,
    ("semantic", "sampled_pairs"): 321.0,
    ("semantic", "recall"): 0.99871,
    ("semantic", "precision"): 1.0,
    ("clusters", "widest_cosine"): 0.8712,
    ("clusters", "widest_size"): 9.0,
    ("contamination", "images"): 3.0,
}


def searched(folder: Path) -> Store:
    """A finished run whose dedup measured `FOUND`."""
    store = make_run(str(folder))
    (name,) = read_rounds(store)[1].records["dedup"]
    record = store.read_record(name)
    rows = [{"net": net, "metric": metric, "value": v} for (net, metric), v in FOUND.items()]
    written = store.put_table("elsewhere", filled(DEDUP, rows))
    store.write_bytes("elsewhere/dedup.parquet", store.read_bytes(written.path))
    moved = written.model_copy(update={"path": "elsewhere/dedup.parquet"})
    store.remove(name)
    store.publish(record.model_copy(update={"payloads": (*record.payloads, moved)}))
    return store


def test_the_report_tells_recall_and_the_widest_cluster(tmp_path: Path) -> None:
    store = searched(tmp_path / "run")
    told = dict(read_duplicates(store, read_facts(store).rounds))
    assert told["Exact copies"] == "12"
    assert told["New embeddings compared"] == "35 tables of 2^13 buckets"
    assert told["Recall"] == "0.9987, on 321 pairs of 2,000 sampled images"
    assert told["Widest cluster"] == "least cosine 0.871, 9 images"
    assert told["Images that evaluation sets show"] == "3"
    page = render(store)
    assert "How duplicates were searched" in page
    assert "0.9987, on 321 pairs" in page


def test_before_dedup_there_is_nothing_to_tell(tmp_path: Path) -> None:
    store = make_run(str(tmp_path / "run"))
    assert read_duplicates(store, read_facts(store).rounds) == []
    assert "How duplicates were searched" not in render(store)


@pytest.mark.parametrize(("rows", "which"), [(3, "3 (all), 6"), (1000, "1,000 (the most shared)")])
def test_the_table_of_shared_texts_says_what_it_holds(
    tmp_path: Path, rows: int, which: str
) -> None:
    store = searched(tmp_path / "run")
    (name,) = read_rounds(store)[1].records["select"]
    record = store.read_record(name)
    shared = [{"text": f"t{n}", "source": "web", "images": 5, "capped": 2} for n in range(rows)]
    payload = store.put_table("selected", filled(TEXTS, shared))
    store.write_bytes("selected/texts.parquet", store.read_bytes(payload.path))
    moved = payload.model_copy(update={"path": "selected/texts.parquet"})
    store.remove(name)
    others = [p for p in record.payloads if not p.path.endswith("/texts.parquet")]
    store.publish(record.model_copy(update={"payloads": (*others, moved)}))
    told = dict(read_duplicates(store, read_facts(store).rounds))
    assert told["Texts that images share"].startswith(which)
