"""What workers share of hosts: connections, failures, pauses."""

from __future__ import annotations

import time

import pytest

from stages import hostbook
from stages.hostbook import SILENCE, Claim, HostBook, Word


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def connections(book: HostBook, worker: str, claim: Claim) -> int:
    return book(worker, {"a.test": claim})["a.test"].connections


def test_one_worker_has_what_it_can_use() -> None:
    book = HostBook(connections=8, failures=20)
    assert connections(book, "one", Claim(left=3)) == 3
    assert connections(book, "one", Claim(left=100)) == 8


def test_workers_come_to_an_even_share() -> None:
    book = HostBook(connections=8, failures=20)
    assert connections(book, "one", Claim(left=100)) == 8
    assert connections(book, "two", Claim(left=100)) == 0
    # The first has all under way: it may start no more until it is below its share.
    assert connections(book, "one", Claim(running=8, left=99)) == 4
    assert connections(book, "two", Claim(left=100)) == 0
    assert connections(book, "one", Claim(running=5, left=96)) == 4
    assert connections(book, "two", Claim(left=100)) == 3
    assert connections(book, "one", Claim(running=4, left=95)) == 4
    assert connections(book, "two", Claim(running=3, left=97)) == 4


def test_of_more_workers_than_connections_some_wait() -> None:
    book = HostBook(connections=2, failures=20)
    assert [connections(book, str(n), Claim(left=9)) for n in range(4)] == [2, 0, 0, 0]
    assert [connections(book, str(n), Claim(left=9)) for n in range(4)] == [1, 1, 0, 0]
    assert connections(book, "0", Claim(left=0)) == 0
    assert [connections(book, str(n), Claim(left=9)) for n in (3, 2, 1)] == [1, 0, 1]


def test_the_dead_give_back_what_they_held(clock: list[float]) -> None:
    book = HostBook(connections=1, failures=20)
    assert connections(book, "dead", Claim(left=9)) == 1
    clock[0] += SILENCE
    assert connections(book, "alive", Claim(left=9)) == 0
    clock[0] += 1
    assert connections(book, "alive", Claim(left=9)) == 1


def test_who_is_started_again_holds_nothing_of_what_it_held() -> None:
    book = HostBook(connections=1, failures=20)
    assert book("one", {"a.test": Claim(left=9)})["a.test"].connections == 1
    assert connections(book, "two", Claim(left=9)) == 0
    book("one", {"b.test": Claim(left=9)}, begins=True)
    assert connections(book, "two", Claim(left=9)) == 1


def test_failures_of_all_workers_count_and_an_answer_ends_them(clock: list[float]) -> None:
    book = HostBook(connections=1, failures=4)
    last = ("timeout", "nothing came")
    assert book("one", {"a.test": Claim(failures=2, last=last)})["a.test"].failures == 2
    word = book("two", {"a.test": Claim(failures=1)})["a.test"]
    assert word == Word(0, 3, last, 0.0)
    word = book("one", {"a.test": Claim(useful=True, failures=1)})["a.test"]
    assert word.failures == 1
    assert book("two", {"b.test": Claim(left=1)})["b.test"].failures == 0


def test_a_pause_holds_for_all_workers(clock: list[float]) -> None:
    book = HostBook(connections=1, failures=20)
    book("one", {"a.test": Claim(pause=30.0)})
    clock[0] += 10
    assert book("two", {"a.test": Claim(left=1)})["a.test"].pause == 20.0


def test_hosts_that_failed_now_and_then_are_forgotten_before_those_set_aside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hostbook, "_FAILING", 2)
    book = HostBook(connections=1, failures=3)
    book("one", {"aside.test": Claim(failures=3)})
    for name in ("a.test", "b.test", "c.test"):
        book("one", {name: Claim(failures=1)})
    book("one", {f"{n}.test": Claim(left=1) for n in range(5)})  # all well, and then done
    book("one", {f"{n}.test": Claim() for n in range(5)})
    asked = book("two", {name: Claim() for name in ("aside.test", "a.test", "b.test", "c.test")})
    assert [word.failures for word in asked.values()] == [3, 0, 1, 1]
    assert len(book._hosts) == 0
