"""What became of the rows, host by host: where downloads succeed, where they fail and why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import duckdb
import pyarrow as pa

from stages.base import read_table
from stages.schemas import DOWNLOAD, HOSTS, check


def by_host(downloads: Sequence[Path]) -> pa.Table:
    """HOSTS of DOWNLOAD files, the largest count first."""
    table = read_table(downloads, DOWNLOAD, ["url", "status", "http_code", "detail"])
    with duckdb.connect(":memory:", config={"autoinstall_known_extensions": False}) as connection:
        connection.register("download", table)
        return check(connection.sql(_BY_HOST).to_arrow_table(), HOSTS, "hosts")


_BY_HOST = r"""
SELECT lower(nullif(regexp_extract(
        url, '^\s*[A-Za-z]+://(?:[^/?#@]*@)?(\[[^\]]*\]|[^/:?#]+)', 1), '')) AS host,
    status, http_code, count(*) AS count, min(detail) AS detail
FROM download GROUP BY ALL
ORDER BY count DESC, host NULLS FIRST, status, http_code
"""
