"""What became of every row and pair: a funnel a round, and the two accounts side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.report.collect import RoundFacts
from pipeline.report.safe import plain
from pipeline.report.words import STATES

SOURCES = ("web", "synthetic", "human")
USED = ("kept", "merged")
_FAILED_ALONE = ("rejected", "failed", "quarantined", "removed", "contaminated")


@dataclass(frozen=True)
class Part:
    """One coloured piece of a bar."""

    style: str
    name: str
    count: int
    width: float
    """Percent of the whole bar."""


@dataclass(frozen=True)
class Step:
    """One bar of a funnel."""

    name: str
    total: int
    parts: tuple[Part, ...]
    lost: str
    """What was left behind on the way to it."""


@dataclass(frozen=True)
class Funnel:
    """One round from source rows to training pairs."""

    number: int
    raw: bool
    steps: tuple[Step, ...]
    human: int
    """Human pairs, which pass by all of it."""


@dataclass(frozen=True)
class Reason:
    """Why rows did not become images."""

    state: str
    meaning: str
    count: int
    width: float


@dataclass(frozen=True)
class Line:
    """One line of an account, a cell a round."""

    kind: Literal["total", "part", "state", "balance"]
    label: str
    meaning: str
    cells: tuple[str, ...]
    style: str = ""


@dataclass(frozen=True)
class Account:
    """Everything in, every way out, and that they are equal."""

    title: str
    meaning: str
    rounds: tuple[int, ...]
    lines: tuple[Line, ...]
    balanced: bool


def funnels(rounds: Iterable[RoundFacts]) -> list[Funnel]:
    """One for each round whose ledger is published."""
    return [_funnel(facts) for facts in rounds if facts.ledger]


def _funnel(facts: RoundFacts) -> Funnel:
    count = facts.count
    web = count("rows", "web")
    fetched = count("rows", "web", "downloaded")
    pairs = {source: count("pairs", source) for source in ("web", "synthetic")}
    passed = {s: n - count("pairs", s, *_FAILED_ALONE) for s, n in pairs.items()}
    used = {source: count("pairs", source, *USED) for source in pairs}
    merged = sum(count("pairs", source, "merged") for source in pairs)
    widest = max(web, fetched, sum(pairs.values())) or 1

    def step(name: str, counts: dict[str, int], lost: str = "") -> Step:
        parts = tuple(
            Part(source, source, n, round(100 * n / widest, 2)) for source, n in counts.items() if n
        )
        return Step(name, sum(counts.values()), parts, lost)

    repeated = count("rows", "web", "duplicate_row")
    failed = web - fetched - repeated
    steps = [
        step("Source rows", {"web": web}),
        step("Rows with an image", {"web": fetched}, _lost(failed, "failed", repeated)),
        step("Pairs of image and text", pairs),
    ]
    if facts.bootstrapped:
        out = sum(pairs.values()) - sum(passed.values())
        steps.append(
            step("Passed the filter", passed, f"{out:,} rejected or failed" if out else "")
        )
    before = passed if facts.bootstrapped else pairs
    gone = sum(before.values()) - sum(used.values())
    lost = f"{gone:,} {'doubled by duplicates' if facts.bootstrapped else 'failed'}" if gone else ""
    carried = f"{merged:,} carried over from duplicates" if merged else ""
    steps.append(step("Trained with", used, "; ".join(filter(None, (lost, carried)))))
    human = count("pairs", "human", *USED)
    return Funnel(facts.number, not facts.bootstrapped, tuple(steps), human)


def _lost(failed: int, word: str, repeated: int) -> str:
    parts = [(failed, f"{failed:,} {word}"), (repeated, f"{repeated:,} repeat an earlier row")]
    return ", ".join(text for count, text in parts if count)


def reasons(rounds: Sequence[RoundFacts]) -> list[Reason]:
    """Of the last round with a ledger: each reason why rows did not become images."""
    facts = next((f for f in reversed(rounds) if f.ledger), None)
    if facts is None:
        return []
    states = _states([facts], "rows", None)
    counts = {s: facts.count("rows", None, s) for s in states if s != "downloaded"}
    most = max(counts.values(), default=1)
    return [
        Reason(plain(state, 40), STATES.get(state, ""), n, round(100 * n / most, 2))
        for state, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


# ---- accounts --------------------------------------------------------------------------------


def accounts(rounds: Iterable[RoundFacts]) -> list[Account]:
    """The rows' and the pairs' account, a column for each round whose ledger is published."""
    booked = [facts for facts in rounds if facts.ledger]
    if not booked:
        return []
    return [_rows_account(booked), _pairs_account(booked)]


def _rows_account(rounds: Sequence[RoundFacts]) -> Account:
    entered = [sum(facts.rows_in.values()) for facts in rounds]
    lines = [Line("total", "Rows in", "lines of the source files", _numbers(entered))]
    for kind in ("web", "human"):
        counts = [facts.rows_in.get(kind, 0) for facts in rounds]
        lines.append(Line("part", kind, "", _numbers(counts), kind))
    for state in _states(rounds, "rows", None):
        counts = [facts.count("rows", None, state) for facts in rounds]
        lines.append(_state(state, counts))
    return _account(
        "Rows",
        "Every line of every source ends in exactly one state.",
        rounds,
        lines,
        entered,
        [facts.count("rows") for facts in rounds],
    )


def _pairs_account(rounds: Sequence[RoundFacts]) -> Account:
    entered = [sum(facts.pairs_in.values()) for facts in rounds]
    lines = [Line("total", "Pairs in", "images with one text each", _numbers(entered))]
    for source in SOURCES:
        counts = [facts.pairs_in.get(source, 0) for facts in rounds]
        if any(counts):
            lines.append(Line("part", source, "", _numbers(counts), source))
    explained: set[str] = set()
    for source in SOURCES:
        for state in _states(rounds, "pairs", source):
            counts = [facts.count("pairs", source, state) for facts in rounds]
            lines.append(_state(state, counts, source, state not in explained))
            explained.add(state)
    return _account(
        "Pairs",
        "Every text of every image ends in exactly one state.",
        rounds,
        lines,
        entered,
        [facts.count("pairs") for facts in rounds],
    )


def _state(state: str, counts: Sequence[int], source: str = "", explain: bool = True) -> Line:
    label = f"{source} {plain(state, 40)}".strip()
    meaning = STATES.get(state, "") if explain else ""
    return Line("state", label, meaning, _numbers(counts), source)


def _account(
    title: str,
    meaning: str,
    rounds: Sequence[RoundFacts],
    lines: Sequence[Line],
    entered: Sequence[int],
    ended: Sequence[int],
) -> Account:
    apart = [a - b for a, b in zip(entered, ended, strict=True)]
    verdicts = tuple("✓ 0" if not gap else f"✗ {gap:,}" for gap in apart)
    total = Line("total", "Sum of all states", "", _numbers(ended))
    balance = Line("balance", "In minus out", "", verdicts)
    numbers = tuple(facts.number for facts in rounds)
    return Account(title, meaning, numbers, (*lines, total, balance), not any(apart))


def _states(rounds: Iterable[RoundFacts], account: str, source: str | None) -> list[str]:
    """The states that occur, in the order of the glossary, unknown ones last."""
    found = {
        state
        for facts in rounds
        for a, s, state in facts.ledger
        if a == account and source in (None, s)
    }
    order = {state: index for index, state in enumerate(("downloaded", *STATES))}
    return sorted(found, key=lambda state: (order.get(state, len(order)), state))


def _numbers(counts: Iterable[int]) -> tuple[str, ...]:
    return tuple(f"{count:,}" if count else "0" for count in counts)
