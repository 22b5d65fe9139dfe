from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.report.render import render, write_report
from pipeline.runfolder import read_rounds
from pipeline.store import Store
from stages.errors import StoreError, UserError
from stages.schemas import METRICS
from tests.run_folder import make_run
from tests.s3 import s3_bucket
from tests.tables import filled

TAGS = """
html head meta title link style body header main section article nav div p span h1 h2 h3 a b i
strong small code pre bdi dl dt dd ul li table thead tbody tr th td details summary figure
figcaption img svg g line polyline circle rect text
"""
ATTRIBUTES = """
lang charset name content http-equiv rel href class id style title alt src width height dir open
colspan role aria-label viewbox x y x1 x2 y1 y2 cx cy r rx points opacity text-anchor
"""


class Page(HTMLParser):
    """A page taken apart as a browser does it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[str] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "title"):
            self.shown.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.shown).split())

    def attributes(self, name: str) -> list[str]:
        return [found[name] or "" for _, found in self.tags if name in found]


def check(html: str) -> Page:
    """What must hold of every report."""
    page = Page(html)
    assert not page._open
    assert {tag for tag, _ in page.tags} <= set(TAGS.split())
    assert {name for _, found in page.tags for name in found} <= set(ATTRIBUTES.split())
    assert all(src.startswith("data:image/") for src in page.attributes("src"))
    assert all(href.startswith("#") or href == "data:," for href in page.attributes("href"))
    assert all(re.fullmatch(r"(width|opacity):[\d.]+%?", s) for s in page.attributes("style"))
    assert not re.search(r"url\(|@import|expression\(", html)
    (policy,) = [found["content"] for tag, found in page.tags if "http-equiv" in found]
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f\x7f-\x9f]", html)
    anchors = [href[1:] for href in page.attributes("href") if href.startswith("#")]
    assert set(anchors) <= set(page.attributes("id"))
    return page


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_run(str(tmp_path / "run"))


def forget(store: Store, *stages: str) -> None:
    for round_ in read_rounds(store):
        for stage in stages:
            for name in round_.records.get(stage, ()):
                store.remove(name)


def test_a_whole_page(store: Store) -> None:
    html = render(store)
    page = check(html)
    assert len(html.encode()) < 3_000_000
    for heading in ("Funnel", "Accounts", "Metrics", "Losses", "Pictures", "Gate"):
        assert heading in page.text
    assert "TR@1" in page.text and "share of images whose own text is ranked first" in page.text
    assert page.text.count("✓ 0") == 4
    assert "buy now" in page.text and "0.100" in page.text
    pictures = page.attributes("src")
    assert len(pictures) == 4 + 4  # four web images with their texts, and with synthetic ones
    for src in pictures:
        assert base64.b64decode(src.partition(",")[2]).startswith((b"\x89PNG", b"\xff\xd8"))


def test_hostile_texts_are_shown_and_not_obeyed(store: Store) -> None:
    html = render(store)
    page = check(html)
    assert "<script" not in html and "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "a �[31mred�[0m [bold]dog[/bold] <script>alert(1)</script> second line" in page.text
    # In an element of its own, whose direction does not reach beyond it.
    assert re.search(r'<bdi dir="auto">[^<]*&lt;script', html)


def test_hostile_settings_and_metrics(store: Store) -> None:
    evil = '"><img src=x onerror=alert(1)>\u202e{{ 7 * 7 }}'
    run = store.read_json("run.json")
    run["versions"] = {evil: evil}
    run["config"] = {
        "run": evil,
        "sources": [{"path": f"s3://u:hunter2@bucket/{evil}"}],
        "password": "hunter2",
        "rounds": {"count": 1},
        "select": {"threshold": evil},
        evil: "\ud800",
    }
    store.write_json("run.json", run)
    (name,) = read_rounds(store)[1].records["evaluate"]
    record = store.read_record(name)
    rows = [{"split": evil, "model": evil, "metric": evil, "value": 1.0}]
    table = store.put_table("elsewhere", filled(METRICS, rows))
    store.write_bytes("elsewhere/metrics.parquet", store.read_bytes(table.path))
    moved = table.model_copy(update={"path": "elsewhere/metrics.parquet"})
    store.remove(name)
    store.publish(record.model_copy(update={"payloads": (moved,)}))
    html = render(store)
    page = check(html)
    assert "hunter2" not in html and "{{ 7 * 7 }}" in page.text
    assert evil.replace("\u202e", "") in page.text


def test_the_same_run_gives_the_same_page(store: Store) -> None:
    assert render(store) == render(store)


@pytest.mark.parametrize(
    ("stages", "gone"),
    [
        (("gate",), "Gate"),
        (("ledger",), "Accounts"),
        (("evaluate", "audit"), "Metrics by round"),
        (("pretrain", "finetune_captioner", "finetune_filter"), "Losses"),
        (("select", "dedup"), "Pictures"),
    ],
)
def test_an_unfinished_run(store: Store, stages: tuple[str, ...], gone: str) -> None:
    assert gone in check(render(store)).text
    forget(store, *stages)
    page = check(render(store))
    assert gone not in page.text and "Settings" in page.text


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "run"))
    store.write_json("run.json", {"config": {}, "versions": {}, "created": 1_700_000_000.0})
    page = check(render(store))
    assert "No round has balanced its accounts yet" in page.text and "round 0" in page.text


def test_a_raw_round_alone(store: Store) -> None:
    store.remove("round=01/plan.json")
    page = check(render(store))
    assert "raw pairs, no filter" in page.text and "Web texts, kept" in page.text
    assert "which no filter has scored yet" in page.text and "rejected" not in page.text


def test_pictures_that_are_gone(store: Store) -> None:
    store.remove("images")
    page = check(render(store))
    assert not page.attributes("src") and page.text.count("no image") == 8


def test_where_it_is_written(store: Store, tmp_path: Path) -> None:
    assert write_report(store) == Path(store.path("report.html"))
    other = tmp_path / "other.html"
    other.write_text("old")
    assert write_report(store, other) == other
    assert other.read_text("utf-8") == Path(store.path("report.html")).read_text("utf-8")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("place", ["missing/report.html", "file/report.html", "folder"])
def test_where_it_cannot_be_written(store: Store, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"^report: .*cannot be written: .*--output$"):
        write_report(store, tmp_path / place)
    assert not list(tmp_path.glob(".*"))


def test_damaged_runs(store: Store) -> None:
    (pairs,) = (n for n in read_rounds(store)[1].records["ledger"])
    store.write_bytes(store.read_record(pairs).payloads[0].path, b"not parquet")
    with pytest.raises(UserError):
        render(store)
    store.write_bytes("run.json", b"{")
    with pytest.raises(StoreError, match=r"run\.json is not JSON"):
        render(store)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Store]:
    monkeypatch.chdir(tmp_path)
    with s3_bucket(monkeypatch) as url:
        yield make_run(f"{url}/run")


def test_a_run_on_s3(remote: Store, tmp_path: Path) -> None:
    assert write_report(remote) == Path("report.html")
    page = check((tmp_path / "report.html").read_text("utf-8"))
    assert "s3://bucket/run" in page.text and len(page.attributes("src")) == 8


def test_a_run_that_starts_from_released_models(store: Store) -> None:
    plan = store.read_json("round=00/plan.json")
    evaluated = {"evaluate": plan["records"]["evaluate"]}
    store.write_json("round=00/plan.json", {"round": 0, "shards": {}, "records": evaluated})
    page = check(render(store))
    assert "Round 0 only measures the released models" in page.text
    assert page.text.count("✓ 0") == 2 and "raw pairs, no filter" not in page.text
