from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.report.collect import RoundFacts, read_facts
from pipeline.report.funnel import Account, accounts, funnels, reasons
from tests.run_folder import make_run

LEDGER = {
    ("rows", "web", "downloaded"): 80,
    ("rows", "web", "duplicate_row"): 5,
    ("rows", "web", "timeout"): 12,
    ("rows", "web", "http_4xx"): 3,
    ("rows", "human", "downloaded"): 10,
    ("pairs", "web", "kept"): 30,
    ("pairs", "web", "merged"): 4,
    ("pairs", "web", "duplicate"): 6,
    ("pairs", "web", "rejected"): 38,
    ("pairs", "web", "failed"): 2,
    ("pairs", "synthetic", "kept"): 50,
    ("pairs", "synthetic", "rejected"): 20,
    ("pairs", "human", "kept"): 10,
}


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> tuple[RoundFacts, ...]:
    return read_facts(make_run(str(tmp_path_factory.mktemp("run")))).rounds


@pytest.fixture
def facts(rounds: tuple[RoundFacts, ...]) -> RoundFacts:
    pairs = {"web": 80, "synthetic": 70, "human": 10}
    return replace(rounds[1], ledger=LEDGER, rows_in={"web": 100, "human": 10}, pairs_in=pairs)


def cells(account: Account) -> dict[str, tuple[str, ...]]:
    return {line.label: line.cells for line in account.lines}


def test_a_funnel(facts: RoundFacts) -> None:
    (funnel,) = funnels([facts])
    assert [(step.name, step.total) for step in funnel.steps] == [
        ("Source rows", 100),
        ("Rows with an image", 80),
        ("Pairs of image and text", 150),
        ("Passed the filter", 90),
        ("Trained with", 84),
    ]
    assert [step.lost for step in funnel.steps] == [
        "",
        "15 failed, 5 repeat an earlier row",
        "",
        "60 rejected or failed",
        "6 doubled by duplicates; 4 carried over from duplicates",
    ]
    assert funnel.human == 10 and not funnel.raw
    # 150 pairs are the widest bar.
    widths = [sum(part.width for part in step.parts) for step in funnel.steps]
    assert widths == pytest.approx([66.67, 53.33, 100, 60, 56], abs=0.02)


def test_a_raw_round_has_no_filter(rounds: tuple[RoundFacts, ...]) -> None:
    raw, round_ = funnels(rounds)
    assert raw.raw and "Passed the filter" not in [step.name for step in raw.steps]
    assert raw.steps[-1].total == 4 and round_.steps[-1].total == 7
    assert funnels([replace(rounds[0], ledger={})]) == []


def test_why_rows_did_not_become_images(facts: RoundFacts, rounds: tuple[RoundFacts, ...]) -> None:
    found = reasons([facts, replace(facts, ledger={})])
    assert [(r.state, r.count, r.width) for r in found] == [
        ("timeout", 12, 100),
        ("duplicate_row", 5, 41.67),
        ("http_4xx", 3, 25),
    ]
    assert reasons([]) == []
    whole = replace(facts, ledger={("rows", "web", "downloaded"): 3})
    assert reasons([whole]) == []


def test_accounts_balance(facts: RoundFacts) -> None:
    rows, pairs = accounts([facts])
    assert rows.balanced and pairs.balanced
    assert cells(rows)["Rows in"] == cells(rows)["Sum of all states"] == ("110",)
    assert cells(pairs)["Pairs in"] == cells(pairs)["Sum of all states"] == ("160",)
    assert cells(pairs)["synthetic"] == ("70",) and cells(pairs)["synthetic kept"] == ("50",)
    assert cells(rows)["In minus out"] == ("✓ 0",)


def test_an_account_that_does_not_balance_says_so(facts: RoundFacts) -> None:
    odd = replace(facts, rows_in={"web": 97, "human": 10})
    rows, pairs = accounts([facts, odd])
    assert not rows.balanced and pairs.balanced
    assert cells(rows)["In minus out"] == ("✓ 0", "✗ -3")


def test_accounts_of_a_real_run(rounds: tuple[RoundFacts, ...]) -> None:
    found = accounts(rounds)
    assert all(account.balanced and account.rounds == (0, 1) for account in found)
    assert cells(found[1])["synthetic kept"] == ("0", "4")
    assert accounts([]) == []


def test_a_state_that_is_not_known_is_shown_last(facts: RoundFacts) -> None:
    odd = replace(facts, ledger={**LEDGER, ("rows", "web", "\u202estrange"): 1})
    states = [line.label for line in accounts([odd])[0].lines if line.kind == "state"]
    assert states == ["downloaded", "duplicate_row", "timeout", "http_4xx", "strange"]


def test_the_folder_of_this_test_is_left_as_it_was(tmp_path: Path) -> None:
    store = make_run(str(tmp_path / "run"))
    before = store.files()
    read_facts(store)
    assert store.files() == before
