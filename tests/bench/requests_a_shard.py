"""How many requests a shard makes of an object store while it is labelled.

``python -m tests.bench.requests_a_shard`` puts one downloaded shard into an S3 server on loopback,
and does what a worker of each labelling stage does (`pipeline.engine.data.StageWorker`): read
inputs, fix the batch size in the shard's plan, process with a tiny model, write the payload, look
at the lease, publish the record. By default (`dedup.before_caption`) a round passes its shards
twice: between embedding and captioning it is found which images share captions, so images are read
again. The server's log has a line a request. Not counted are the weights, once a machine, and the
pages of one listing a pass.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.dag import ShardJob, ShardTask
from pipeline.engine import shard as shards
from pipeline.records import record_name
from pipeline.store import Store
from stages.caption import CaptionConfig
from stages.embed import EmbedConfig
from stages.filter import FilterConfig
from tests import tiny_models
from tests.run_folder import publish_download, publish_shared
from tests.s3 import s3_bucket


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Inside, requests that the server has answered, by method."""
    found: Counter[str] = Counter()

    class Line(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said = record.getMessage()
            if '"' in said:
                found[said.partition('"')[2].partition(" ")[0].rpartition("m")[2]] += 1

    log = logging.getLogger("werkzeug")
    before, log.handlers, log.propagate = log.handlers, [Line()], False
    log.setLevel(logging.INFO)
    try:
        yield found
    finally:
        log.handlers = before
        log.setLevel(logging.ERROR)


def label(url: str, models: Path) -> dict[str, Counter[str]]:
    """Stage → the requests by method."""
    store = Store(url).fenced(1)
    download = publish_download(store, "000000", "f" * 64, "cat")
    matcher, captioner = str(models / "matcher"), str(models / "captioner")
    tasks = (
        ShardTask("embed", 1, EmbedConfig(batch_size="auto"), matcher),
        ShardTask("caption", 1, CaptionConfig(batch_size="auto"), captioner),
        ShardTask("filter", 1, FilterConfig(batch_size="auto"), matcher),
    )
    records = {t.name: record_name(t.name, t.scope, "000000", "ab" * 8) for t in tasks}
    told = {"download": download, **records}
    carried: dict[str, pa.Table] = {}
    requests = {}
    for task in tasks:
        if task.name == "caption":
            carried = {}  # another pass
            with counted() as requests["copies"]:
                table = store.local_copy(
                    shards.payload(store.read_record(download), ".parquet").path
                )
                sample = pq.read_table(table)["sample_id"][0].as_py()
                # The lease is looked at once for many shards.
                told["shared"] = publish_shared(Store(url), "000000", sample)
        job = ShardJob("000000", told, tuple(records))
        stage = shards.build(task, store)
        stage.setup()
        with counted() as requests[task.name]:
            inputs = shards.load_inputs(task.name, job, store, carried)
            carried.update(inputs)
            shards.settle(stage, task, job, store)
            output = shards.run_stage(stage, inputs)
            carried[task.name] = shards.publish(task, job, output, store, 0.0, stage.facts())
    return requests


def main() -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny_models.save_blip(tiny_models.matcher_model(), folder / "matcher")
        tiny_models.save_blip(tiny_models.captioner_model(), folder / "captioner")
        with s3_bucket(patch) as bucket:
            found = label(f"{bucket}/run", folder)
    for stage, requests in found.items():
        print(f"{stage}: {requests.total()} ({', '.join(f'{n} {m}' for m, n in requests.items())})")
    print(f"a shard: {sum(requests.total() for requests in found.values())}")


if __name__ == "__main__":
    main()
