"""The hosts that failed most, in a small finished run."""

from __future__ import annotations

from pathlib import Path

from pipeline.report.collect import read_facts
from pipeline.report.hosts import Host, read_hosts
from pipeline.report.render import render
from tests.run_folder import make_run


def test_the_report_names_the_hosts_that_failed(tmp_path: Path) -> None:
    store = make_run(str(tmp_path / "run"))
    found = read_hosts(store, read_facts(store).rounds)
    assert found == [Host("web.test", 1, 6 + 2, "http_4xx (1)")]
    page = render(store)
    assert "Where rows failed most" in page
    assert "http_4xx (1)" in page


def test_without_a_ledger_there_is_nothing_to_tell(tmp_path: Path) -> None:
    assert read_hosts(make_run(str(tmp_path / "run")), []) == []
