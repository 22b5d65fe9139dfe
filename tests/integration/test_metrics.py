"""What a real Ray exports of our metrics, and whether the dashboard asks for exactly that."""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from pipeline.engine.board import Board, watched
from pipeline.engine.metrics import COUNTERS, GAUGES, HISTOGRAMS, Work, of_record
from pipeline.store import Store
from tests.integration.fakes import Fake, FakeTask, make_shards, run
from tests.run_folder import make_run

DASHBOARD = Path(__file__).parents[2] / "infra/grafana.json"
SAMPLE = re.compile(r"^ray_(capfilt_\w+)\{(.*)\} (\S+)$", re.MULTILINE)
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
Samples = list[tuple[str, dict[str, str], float]]
CAPTION = Work("/runs/a", "caption", 2.0, {"success": 5}, {"batch_size": "32, 16", "tokens": "40"})
RUN = "worked-on"
"""Name of the run folder whose metrics come from stage workers."""
DOWNLOAD = Work("/runs/a", "download", 4.5, {"success": 3, "timeout": 2, "http_4xx": 0}, {})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Samples]:
    """What Prometheus would read after three pieces of work and a GPU's shard, told by hand, what
    the workers of a run tell, and a ledger."""
    store = make_run(str(tmp_path_factory.mktemp("metrics") / "run"))
    worked_on = Store(str(tmp_path_factory.mktemp("metrics") / RUN))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 500},
    )
    try:
        board = Board.remote()  # type: ignore[attr-defined]
        on_gpu = Work("/runs/a", "filter", 1.0, {"success": 1}, {}, gpu_bytes=1 << 30)
        for work in (CAPTION, DOWNLOAD, DOWNLOAD, on_gpu):
            ray.get(board.measured.remote(work))
        with watched(board, lambda _: None):  # as a driver does
            shards = make_shards(worked_on, [["a", "broken"], ["b"]])
            tasks = [FakeTask(name, 1, Fake()) for name in ("download", "caption")]
            run(worked_on, shards, board, tasks)
            ray.get(board.measured.remote(_ledger(store)))
            found = _scraped(f"http://127.0.0.1:{port}/metrics")
        yield found
    finally:
        ray.shutdown()


def _ledger(store: Store) -> Work:
    name = next(n for n in store.record_names() if "round=01" in n and "stage=ledger" in n)
    return of_record(store, store.read_record(name))


def _scraped(url: str) -> Samples:
    """When all has arrived that the board was told: gauges, some set long ago, and four shards."""
    deadline = time.monotonic() + 40
    found: Samples = []

    def told() -> bool:
        done = [v for n, ls, v in found if n == "capfilt_published_total" and _worked_on(ls)]
        return sum(done) >= 4 and GAUGES.keys() <= {n for n, _, _ in found}

    while time.monotonic() < deadline and not told():
        time.sleep(0.5)
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            continue  # Ray's agent is not up yet
        found = [(n, dict(LABEL.findall(ls)), float(v)) for n, ls, v in SAMPLE.findall(text)]
    return found


def _worked_on(labels: dict[str, str]) -> bool:
    return labels.get("run", "").endswith(f"/{RUN}")


def value(exported: Samples, name: str, **labels: str) -> float:
    """Of the one sample with these labels."""
    matching = [v for n, ls, v in exported if n == name and labels.items() <= ls.items()]
    assert len(matching) == 1, (name, labels, exported)
    return matching[0]


def test_what_stage_workers_publish_is_counted(exported: Samples) -> None:
    worked = [sample for sample in exported if _worked_on(sample[1])]
    assert value(worked, "capfilt_rows_total", stage="download", status="success") == 3
    assert value(worked, "capfilt_rows_total", stage="caption", status="success") == 2
    # Of the shard that was run alone, since a row of it raised.
    assert value(worked, "capfilt_rows_total", stage="caption", status="quarantined") == 1
    for stage in ("download", "caption"):
        assert value(worked, "capfilt_published_total", stage=stage) == 2
        assert value(worked, "capfilt_seconds_total", stage=stage) > 0
        assert value(worked, "capfilt_work_seconds_count", stage=stage) == 2
    assert value(worked, "capfilt_batch_size_bucket", stage="caption", le="1.0") == 2


def test_work_is_counted(exported: Samples) -> None:
    exported = [sample for sample in exported if not _worked_on(sample[1])]
    assert value(exported, "capfilt_rows_total", stage="download", status="timeout") == 4
    assert value(exported, "capfilt_rows_total", stage="caption", status="success") == 5
    assert value(exported, "capfilt_published_total", stage="download") == 2
    assert value(exported, "capfilt_seconds_total", stage="download") == 9
    assert value(exported, "capfilt_tokens_total", stage="caption") == 40
    assert value(exported, "capfilt_gpu_bytes", stage="filter") == 1 << 30
    assert value(exported, "capfilt_work_seconds_bucket", stage="download", le="3.0") == 0
    assert value(exported, "capfilt_work_seconds_bucket", stage="download", le="10.0") == 2
    assert value(exported, "capfilt_batch_size_bucket", stage="caption", le="16.0") == 1
    assert value(exported, "capfilt_batch_size_bucket", stage="caption", le="8.0") == 0


def test_the_ledger_is_exported_as_it_stands(exported: Samples) -> None:
    rejected = {"account": "pairs", "source": "web", "state": "rejected"}
    assert value(exported, "capfilt_ledger", round="1", **rejected) == 1


def test_everything_declared_is_exported(exported: Samples) -> None:
    expected: dict[str, set[str]] = {}
    for name, (_, labels) in COUNTERS.items():
        expected[f"{name}_total"] = set(labels)
    for name, (_, labels) in GAUGES.items():
        expected[name] = set(labels)
    for name, (_, labels, _) in HISTOGRAMS.items():
        expected |= {f"{name}_{part}": set(labels) for part in ("bucket", "sum", "count")}
    assert {name for name, _, _ in exported} == set(expected)
    for name, labels, _ in exported:
        assert expected[name] <= labels.keys()


def test_the_dashboard_asks_for_what_is_exported(exported: Samples) -> None:
    known: dict[str, set[str]] = {}
    for name, labels, _ in exported:
        known.setdefault(name, set()).update(labels)
    dashboard = json.loads(DASHBOARD.read_text())
    asked = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    asked += [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    seen = set()
    for query in asked:
        names = set(re.findall(r"\bray_(\w+)", query))
        assert names and names <= known.keys(), query
        labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query))
        for group in re.findall(r"\bby \(([^)]*)\)", query):
            labels |= {label.strip() for label in group.split(",")}
        for name in names:
            assert labels <= known[name], query
        assert query.count("(") == query.count(")") and query.count("{") == query.count("}")
        for status in re.findall(r'stage="(\w+)"', query):
            assert any(ls.get("stage") == status for _, ls, _ in exported), query
        seen |= names
    # A histogram is asked for by its buckets, and means by the counters, which are exact.
    wanted = {n for n in known if not re.search(r"_(work_seconds|batch_size)_(sum|count)$", n)}
    assert seen == wanted
