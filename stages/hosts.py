"""What became of the rows, host by host: where downloads succeed, where they fail and why."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from stages.database import add_view, database
from stages.schemas import DOWNLOAD, HOSTS, check


def by_host(downloads: Sequence[Path]) -> pa.Table:
    """HOSTS of DOWNLOAD files, the largest count first. Memory grows with the hosts, not the
    rows."""
    with tempfile.TemporaryDirectory() as scratch, database(Path(scratch)) as connection:
        columns = ("url", "status", "http_code", "detail")
        add_view(connection, "download", downloads, DOWNLOAD, columns)
        return check(connection.sql(BY_HOST).to_arrow_table(), HOSTS, "hosts")


BY_HOST = r"""
SELECT lower(nullif(regexp_extract(
        url, '^\s*[A-Za-z]+://(?:[^/?#@]*@)?(\[[^\]]*\]|[^/:?#]+)', 1), '')) AS host,
    status, http_code, count(*) AS count, min(detail) AS detail
FROM download GROUP BY ALL
ORDER BY count DESC, host NULLS FIRST, status, http_code
"""
"""HOSTS of a table ``download``."""
