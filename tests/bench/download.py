"""The download stage against img2dataset called directly, and ingest's memory.

    python -m tests.bench.download [--json FILE] [--images 5000] [--rows 10000 1000000]

One local server in a process of its own gives both the same images of about 40 kB, fault by fault
the truth that rows are held against. Both fetch with as many threads, resize the same way and
encode JPEG; each keeps its images in memory or in its own files, as it does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq

from stages import ids
from stages.download import DownloadConfig, DownloadStage
from stages.schemas import SOURCES
from tests.servers import WebServer, known_locally, picture
from tests.tables import filled

FAULTS = {
    "/404": "http_4xx",
    "/410": "http_4xx",
    "/429": "http_4xx",
    "/500": "http_5xx",
    "/reset": "broken_response",
    "/cut": "broken_response",
    "/nothttp": "broken_response",
    "/hugeheader": "broken_response",
    "/html": "not_an_image",
    "/htmlimage": "not_an_image",
    "/svg": "not_an_image",
    "/empty": "not_an_image",
    "/noai": "opted_out",
    "/noindex": "opted_out",
    "/foragent": "opted_out",
    "/loop": "redirect",
    "/to?file:///etc/passwd": "redirect",
    "/declared": "too_large",
    "/gzipbomb": "too_large",
    "/to?http://169.254.169.254/": "blocked_address",
}
"""Path → status of what the web server has built in and answers at once."""


class Row(NamedTuple):
    """A URL, and what has to come of it."""

    url: str
    status: str
    image_hash: str | None = None
    """That the source says the image has."""


WEB = "http://web.test"
FAULTY = (
    *(Row(WEB + path, status) for path, status in FAULTS.items()),
    Row(f"{WEB}/tiny.png", "too_small"),
    Row(f"{WEB}/long.png", "aspect"),
    Row(f"{WEB}/damaged.jpg", "decode"),
    Row(f"{WEB}/0.jpg", "hash_mismatch", "0" * 64),
    Row("http://closed.test/0.jpg", "refused"),
    Row("http://no-such-name.invalid/0.jpg", "dns"),
    Row("http://127.0.0.1/0.jpg", "blocked_address"),
    Row("ftp://web.test/0.jpg", "invalid_url"),
    Row("no URL at all", "invalid_url"),
)
SLOW = (Row(f"{WEB}/hang", "timeout"), Row(f"{WEB}/drip", "timeout"))
_DISTINCT = 40
_SIZE, _THREADS = 256, 16


def serve(pipe: Any) -> None:
    """The server's process: sends its address, ends when told to."""
    with WebServer() as web:
        for number in range(_DISTINCT):
            web.serve(f"/{number}.jpg", photo(number))
        web.serve("/tiny.png", picture(4, 4, format="PNG"))
        web.serve("/long.png", picture(700, 10, format="PNG"))
        web.serve("/damaged.jpg", picture()[:300])
        pipe.send(web.address)
        pipe.recv()


def photo(seed: int) -> bytes:
    """A JPEG of about 40 kB: smooth colours with grain, as photos have."""
    import io

    import numpy as np
    from PIL import Image

    smooth = np.asarray(Image.open(io.BytesIO(picture(512, 384, seed)))).astype(np.int16)
    grain = np.random.default_rng(seed).normal(0, 7, smooth.shape)
    out = io.BytesIO()
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=86)
    return out.getvalue()


def mixed(count: int, slow: int) -> list[Row]:
    """Images and every fault in turn, half and half, ``slow`` rows that never end among them."""
    rows = [
        FAULTY[n // 2 % len(FAULTY)] if n % 2 else Row(f"{WEB}/{n % _DISTINCT}.jpg", "success")
        for n in range(count)
    ]
    for n in range(slow):
        rows[n * count // slow] = SLOW[n % len(SLOW)]
    return rows


def ours(rows: Sequence[Row], address: str, **options: Any) -> tuple[float, int, int]:
    """(seconds, images kept, rows with another status than theirs) of the stage over shards of
    1,000 rows."""
    config = DownloadConfig(
        image_size=_SIZE,
        threads=_THREADS,
        retries=0,
        host_connections=2 * _THREADS,
        host_failures=10**6,
        connect_to={"web.test": address, "closed.test": f"127.0.0.1:{_closed_port()}"},
        **options,
    )
    stage = DownloadStage(config)
    stage.setup()
    images = wrong = 0
    begun = time.perf_counter()
    for start in range(0, len(rows), 1000):
        part = rows[start : start + 1000]
        table = [
            {"row_id": str(n), "sample_id": ids.digest(str(n)), "url": row.url, "text": "t"}
            | {"image_hash": row.image_hash}
            for n, row in enumerate(part, start=start)
        ]
        found = stage.process(filled(SOURCES, table, source="web"))
        statuses = found["status"].to_pylist()
        wrong += sum(row.status != status for row, status in zip(part, statuses, strict=True))
        images += len(found) - found["image"].null_count
    return time.perf_counter() - begun, images, wrong


def _closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def img2dataset(urls: list[str], address: str, folder: Path) -> tuple[float, int]:
    """(seconds, successes) of `img2dataset.download` in one process, writing a WebDataset. The
    seconds are its own shards' durations, so that its start-up does not count, as ours does not."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    table = pa.table({"url": [url.replace("web.test", address) for url in urls]})
    pq.write_table(table, folder / "urls.parquet")
    from img2dataset import download

    download(
        url_list=str(folder / "urls.parquet"),
        input_format="parquet",
        output_folder=str(folder / "out"),
        output_format="webdataset",
        image_size=_SIZE,
        resize_mode="keep_ratio",
        resize_only_if_bigger=True,
        processes_count=1,
        thread_count=_THREADS,
        retries=0,
        number_sample_per_shard=1000,
        enable_wandb=False,
        disallowed_header_directives=["noai", "noimageai", "noindex", "noimageindex"],
    )
    stats = [json.loads(file.read_text()) for file in (folder / "out").glob("*_stats.json")]
    return sum(one["duration"] for one in stats), sum(one["successes"] for one in stats)


_INGEST = """
import sys
from pathlib import Path
from stages.base import LocalContext
from stages.ingest import IngestConfig, IngestStage, list_files
from stages.readers import SourceConfig
folder = Path(sys.argv[1])
files = list_files(SourceConfig(path=str(folder / "in")))
(folder / "out").mkdir()
IngestStage(IngestConfig(), files).run({}, folder / "out", LocalContext())
line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
print(int(line.split()[1]))
"""


def ingest_memory(rows: int) -> int:
    """Peak bytes of a process that cuts ``rows`` rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        schema = pa.schema([("url", pa.string()), ("text", pa.string())])
        with pq.ParquetWriter(folder / "in" / "list.parquet", schema) as writer:
            for start in range(0, rows, 10_000):
                numbers = range(start, min(start + 10_000, rows))
                urls = [f"http://host{n % 997}.test/pictures/{n:012}.jpg" for n in numbers]
                texts = [f"picture number {n} of a long list" for n in numbers]
                writer.write_table(pa.table({"url": urls, "text": texts}, schema))
        command = [sys.executable, "-c", _INGEST, name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout) * 1024


def run(images: int, faulty: int, rows: tuple[int, ...], slow: int) -> list[dict[str, Any]]:
    """All measurements, as the benchmark's JSON has them."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    server = context.Process(target=serve, args=(other,), daemon=True)
    server.start()
    address = pipe.recv()
    try:
        good = [Row(f"{WEB}/{n % _DISTINCT}.jpg", "success") for n in range(images)]
        seconds, kept, wrong = ours(good, address)
        with tempfile.TemporaryDirectory() as folder:
            urls = [row.url for row in good]
            theirs, successes = img2dataset(urls, address, Path(folder))
        with patch.object(socket, "getaddrinfo", known_locally):
            limits = {"timeout": 3.0, "total_timeout": 6.0, "min_image_size": 8}
            wrong += ours(mixed(faulty, slow), address, **limits)[2]
    finally:
        pipe.send("end")
        server.join()
    rate, other_rate = kept / seconds, successes / theirs
    results = [
        _result("images a second", rate, "images/s", "img2dataset", rate / other_rate),
        _result("rows with another status than the server's truth", wrong, "rows", "truth", None),
    ]
    peaks = [ingest_memory(count) for count in rows]
    for count, peak in zip(rows, peaks, strict=True):
        metric = f"ingest of {count:,} rows, peak memory"
        results.append(_result(metric, peak / 2**20, "MiB", f"{rows[0]:,} rows", peak / peaks[0]))
    return results


def _result(
    metric: str, value: float, unit: str, against: str, ratio: float | None
) -> dict[str, Any]:
    return {"metric": metric, "value": value, "unit": unit, "against": against, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--faulty", type=int, default=20_000)
    parser.add_argument("--slow", type=int, default=40, help="of the faulty, never end")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    options = parser.parse_args()
    results = run(options.images, options.faulty, tuple(options.rows), options.slow)
    for r in results:
        ratio = "" if r["ratio"] is None else f"  {r['ratio']:.2f} x {r['against']}"
        print(f"{r['metric']:50} {r['value']:10.1f} {r['unit']}{ratio}")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
