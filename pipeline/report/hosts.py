"""The hosts from which most rows did not come, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.inspect import Query, View
from pipeline.report.collect import RoundFacts
from pipeline.report.safe import plain
from pipeline.store import Store

_SHOWN = 12


@dataclass(frozen=True)
class Host:
    """One host and what its URLs ended as."""

    name: str
    failed: int
    rows: int
    reasons: str
    """The commonest first: ``http_4xx 404 (31), timeout (2)``."""


def read_hosts(store: Store, rounds: Sequence[RoundFacts]) -> list[Host]:
    """The dozen hosts with most failures, among the last round's downloads as far as they are."""
    views = _last_views(rounds)
    rows = Query(store, views).run(_WORST, 20 * _SHOWN)[1] if views else ()
    failures: dict[str, Counter[str]] = {}
    totals: dict[str, int] = {}
    for host, status, code, count, total in rows:
        name = (
            f"{status} {code}" if code is not None and str(status).startswith("http_") else status
        )
        failures.setdefault(host, Counter())[str(name)] += count
        totals[host] = total
    return [
        Host(
            plain(host, 60),
            sum(found.values()),
            totals[host],
            ", ".join(f"{plain(name, 30)} ({n:,})" for name, n in found.most_common(3)),
        )
        for host, found in failures.items()
    ]


def _last_views(rounds: Sequence[RoundFacts]) -> dict[str, View]:
    """What tells of hosts: a ledger's count, unless a later round has downloaded more."""
    last = next((f for f in reversed(rounds) if "download" in f.views), None)
    if last is None:
        return {}
    for facts in reversed(rounds):
        same = facts.views.get("download", last.views["download"]).files
        if "hosts" in facts.views and same == last.views["download"].files:
            return {"hosts": facts.views["hosts"]}
    return {"download": last.views["download"]}


_WORST = f"""
WITH worst AS (
    SELECT host, sum(count) FILTER (status NOT IN ('success', 'duplicate_row')) AS failed,
        sum(count)::BIGINT AS total
    FROM hosts WHERE host IS NOT NULL GROUP BY host HAVING failed > 0
    ORDER BY failed DESC, host LIMIT {_SHOWN}
)
SELECT host, status, http_code, count, total FROM hosts JOIN worst USING (host)
WHERE status NOT IN ('success', 'duplicate_row') ORDER BY failed DESC, host, count DESC
"""
