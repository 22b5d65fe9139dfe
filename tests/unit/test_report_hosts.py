"""The hosts that failed most, in a small finished run."""

from __future__ import annotations

from pathlib import Path

from pipeline.report.collect import read_facts
from pipeline.report.hosts import Host, _last_views, read_hosts
from pipeline.report.render import render
from pipeline.runfolder import read_rounds
from tests.run_folder import make_run


def test_the_report_names_the_hosts_that_failed(tmp_path: Path) -> None:
    store = make_run(str(tmp_path / "run"))
    found = read_hosts(store, read_facts(store).rounds)
    assert found == [Host("web.test", 1, 6 + 2, "http_4xx (1)")]
    page = render(store)
    assert "Where rows failed most" in page
    assert "http_4xx (1)" in page


def test_before_a_round_nothing_can_be_told(tmp_path: Path) -> None:
    assert read_hosts(make_run(str(tmp_path / "run")), []) == []


def test_without_a_ledger_the_downloads_so_far_are_counted(tmp_path: Path) -> None:
    store = make_run(str(tmp_path / "run"))
    for round_ in read_rounds(store):
        store.remove(round_.records["ledger"][0])
    store.remove(read_rounds(store)[0].records["download"][2])  # of human pairs
    assert read_hosts(store, read_facts(store).rounds) == [Host("web.test", 1, 6, "http_4xx (1)")]
    assert "Where rows failed most" in render(store)


def test_a_ledger_of_before_does_not_stand_for_later_downloads(tmp_path: Path) -> None:
    store = make_run(str(tmp_path / "run"))
    first, last = read_rounds(store)
    store.remove(last.records["ledger"][0])
    assert set(_last_views(read_facts(store).rounds)) == {"hosts"}, "round 0 had the same"
    fewer = store.read_json("round=00/plan.json")
    fewer["records"]["download"] = list(first.records["download"][1:])
    store.write_json("round=00/plan.json", fewer)
    facts = read_facts(store).rounds
    assert set(_last_views(facts)) == {"download"}
    assert read_hosts(store, facts) == [Host("web.test", 1, 8, "http_4xx (1)")]
