"""A whole run whose folder is a bucket, through the command line, Ray and back."""

import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from pipeline.lease import current
from pipeline.runfolder import open_run
from pipeline.verify import verify
from tests.integration.test_resume import OVERRIDES
from tests.s3 import s3_bucket

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_a_run_in_a_bucket_ends_verified_and_has_nothing_left_to_do(monkeypatch):
    with s3_bucket(monkeypatch) as bucket:
        run = f"{bucket}/runs/{uuid.uuid4().hex}"  # this machine keeps copies by the run's URL
        command = [sys.executable, "-m", "pipeline", "run", "configs/tiny.yaml", f"run={run}"]
        for _ in range(2):
            done = subprocess.run(
                [*command, *OVERRIDES], cwd=ROOT, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-1000:]
        store = open_run(run)
        assert verify(store).problems == []
        stages = {record.stage for record in store.read_records(store.record_names())}
        assert {"download", "embed", "shared", "caption", "filter", "assemble", "gate"} <= stages
        assert current(store).released
        assert not store.files("scratch")
        # The second run found all of it published.
        tokens = {record.token for record in store.read_records(store.record_names())}
        assert tokens == {1} and current(store).token == 2
        shutil.rmtree(store.cache)
