"""A finished run of real photos: failed rows are tried again, forgotten ones never."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.integration.test_real_photos import Done, capfilt, done

__all__ = ["done"]


def test_failed_rows_are_tried_again_and_forgotten_ones_never(done: Done, tmp_path: Path) -> None:
    run = Path(shutil.copytree(done.run, tmp_path / "run"))
    again, server = Done(run, done.web), done.web.server
    url = done.web.copies[0][0]
    (tmp_path / "urls.txt").write_text(f"{url}\n", "utf-8")
    forgotten = capfilt("forget", str(run), "--urls", str(tmp_path / "urls.txt"))
    assert forgotten.returncode == 0, forgotten.stderr
    asked = server.hits.copy()
    file = done.run.parent / "config.yaml"
    ended = capfilt("run", str(file), f"run={run}", "rounds.count=2", "--retry-failed")
    assert ended.returncode == 0, ended.stderr[-3000:] + ended.stdout[-2000:]
    # Of the reasons on this web only a refused connection may pass; it has not.
    assert server.hits == asked
    tried = done.web.expected["refused"]
    ledger = again.rows("round=02/stage=ledger/**/*ledger.parquet")
    counts = {(r["account"], r["source"], r["state"]): r["count"] for r in ledger}
    assert counts["rows", "web", "retried"] == counts["rows", "web", "refused"] == tried
    assert counts["rows", "web", "removed"] == 1
    pairs = again.rows("round=02/stage=select/**/*pairs.parquet")
    assert {row["state"] for row in pairs if row["url"] == url} == {"removed"}
    verified = capfilt("verify", str(run))
    assert verified.returncode == 0, verified.stdout
    assert "balanced rounds: 1, 2" in verified.stdout
