"""Tombstones in front of stages."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pytest

from stages import ids
from stages.download import DownloadConfig, DownloadStage
from stages.removed import Removed
from stages.schemas import DOWNLOAD, SOURCES, check
from tests.servers import WebServer, picture
from tests.tables import filled


@pytest.fixture
def web() -> Iterator[WebServer]:
    with WebServer() as server:
        for number in range(4):
            server.serve(f"/{number}.jpg", picture(seed=number))
        yield server


def download(web: WebServer, removed: Removed) -> pa.Table:
    stage = DownloadStage(DownloadConfig(connect_to=web.connect_to, image_size=32))
    stage.setup()
    urls = [web.url(f"/{number}.jpg") for number in range(4)]
    rows = [
        {"row_id": f"r{n}", "sample_id": ids.sample_id(url), "url": url, "text": "t"}
        for n, url in enumerate(urls)
    ]
    table = filled(SOURCES, rows, source="web")
    return check(removed.process(stage, table), DOWNLOAD, "download output")


def test_removed_samples_are_never_asked_for(web: WebServer) -> None:
    gone = ids.sample_id(web.url("/1.jpg"))
    table = download(web, Removed(samples=frozenset({gone})))
    assert table["row_id"].to_pylist() == ["r0", "r1", "r2", "r3"]
    assert table["status"].to_pylist() == ["success", "removed", "success", "success"]
    assert table["image"].null_count == 1
    assert (web.hits["/0.jpg"], web.hits["/1.jpg"]) == (1, 0)


def test_removed_bytes_are_dropped_whatever_their_url(web: WebServer) -> None:
    whole = download(web, Removed())
    assert set(whole["status"].to_pylist()) == {"success"}
    sha256 = whole["sha256"][2].as_py()
    table = download(web, Removed(hashes=frozenset({sha256})))
    assert table["status"].to_pylist() == ["success", "success", "removed", "success"]
    row = table.to_pylist()[2]
    assert row["detail"]
    assert {row[name] for name in ("image", "sha256", "phash", "width")} == {None}
    assert table.slice(0, 2).equals(whole.slice(0, 2))
