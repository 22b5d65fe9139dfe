"""Downloads counted by host and outcome."""

from __future__ import annotations

from pathlib import Path

from stages.hosts import by_host
from stages.schemas import DOWNLOAD, HOSTS
from tests.tables import filled, write_shards


def test_outcomes_are_counted_by_host(tmp_path: Path) -> None:
    rows = [
        {"url": "http://A.test/1", "status": "success", "http_code": 200},
        {"url": "https://user:secret@a.test:8443/2", "status": "success", "http_code": 200},
        {"url": "http://a.test?x", "status": "http_4xx", "http_code": 404, "detail": "HTTP 404"},
        {"url": "http://a.test/3", "status": "http_4xx", "http_code": 410, "detail": "HTTP 410"},
        {"url": "http://[2001:db8::1]:80/x", "status": "timeout", "detail": "slow"},
        {"url": "not a url", "status": "invalid_url", "detail": "no"},
        {"url": None, "status": "success"},
    ]
    files = write_shards(
        tmp_path, "download", [filled(DOWNLOAD, rows[:3]), filled(DOWNLOAD, rows[3:])]
    )
    table = by_host(files)
    assert table.schema.equals(HOSTS)
    assert [tuple(row.values()) for row in table.to_pylist()] == [
        ("a.test", "success", 200, 2, None),
        (None, "invalid_url", None, 1, "no"),
        (None, "success", None, 1, None),
        ("[2001:db8::1]", "timeout", None, 1, "slow"),
        ("a.test", "http_4xx", 404, 1, "HTTP 404"),
        ("a.test", "http_4xx", 410, 1, "HTTP 410"),
    ]
    assert by_host([]).num_rows == 0
