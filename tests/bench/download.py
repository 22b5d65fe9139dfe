"""The download stage against img2dataset called directly, with memory, and ingest's memory.

    python -m tests.bench.download [--json FILE] [--images 3000] [--rows 10000 1000000]

One local server in a process of its own gives both the same images of about 40 kB. Both fetch with
as many threads, resize the same way, encode JPEG and write each thousand rows to disk, as a tar of
images and a Parquet file of the rest. They take turns; the median of three counts.

Then every row of images and faults is held against the server's truth, by status and HTTP code.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.images import write_tar
from pipeline.store import Store
from stages import ids
from stages.download import DownloadConfig, DownloadStage
from stages.schemas import SOURCES
from tests.servers import WebServer, gzip_bomb, known_locally, picture
from tests.tables import filled

FAULTS: dict[str, tuple[str, int | None]] = {
    "/404": ("http_4xx", 404),
    "/410": ("http_4xx", 410),
    "/429": ("http_4xx", 429),
    "/500": ("http_5xx", 500),
    "/reset": ("broken_response", None),
    "/cut": ("broken_response", None),
    "/nothttp": ("broken_response", None),
    "/hugeheader": ("broken_response", None),
    "/html": ("not_an_image", 200),
    "/htmlimage": ("not_an_image", 200),
    "/svg": ("not_an_image", 200),
    "/empty": ("not_an_image", 200),
    "/noai": ("opted_out", 200),
    "/noindex": ("opted_out", 200),
    "/foragent": ("opted_out", 200),
    "/loop": ("redirect", None),
    "/to?file:///etc/passwd": ("redirect", None),
    "/declared": ("too_large", None),
    "/gzipbomb": ("too_large", None),
    "/to?http://169.254.169.254/": ("blocked_address", None),
}
"""Path → (status, HTTP code) of what the web server has built in and answers at once."""


class Row(NamedTuple):
    """A URL, and what has to come of it."""

    url: str
    status: str
    code: int | None = None
    """HTTP status of the answer that decided; None where what decided was no whole answer."""
    image_hash: str | None = None
    """That the source says the image has."""


WEB, RULES = "http://web.test", "http://rules.test"
FAULTY = (
    *(Row(WEB + path, *truth) for path, truth in FAULTS.items()),
    Row(f"{WEB}/endless", "too_large"),
    Row(f"{WEB}/bomb.png", "too_large", 200),
    Row(f"{WEB}/tiny.png", "too_small", 200),
    Row(f"{WEB}/long.png", "aspect", 200),
    Row(f"{WEB}/damaged.jpg", "decode", 200),
    Row(f"{WEB}/0.jpg", "hash_mismatch", 200, "0" * 64),
    Row(f"{WEB}/0.jpg", "duplicate_row"),
    Row(f"{WEB}/reserved.jpg", "opted_out", 200),
    Row(f"{RULES}/disallowed/0.jpg", "opted_out"),
    Row(f"{RULES}/reserved/0.jpg", "opted_out"),
    Row(f"{RULES}/0.jpg", "success", 200),
    Row("https://web.test/0.jpg", "tls"),
    Row("http://closed.test/0.jpg", "refused"),
    Row("http://no-such-name.invalid/0.jpg", "dns"),
    Row("http://127.0.0.1/0.jpg", "blocked_address"),
    Row("ftp://web.test/0.jpg", "invalid_url"),
    Row("no URL at all", "invalid_url"),
)
SLOW = tuple(Row(f"{WEB}/{path}", "timeout") for path in ("hang", "drip", "dripheader"))
_ROBOTS = b"User-agent: capfilt\nDisallow: /disallowed/\n"
_TDMREP = b'[{"location": "/reserved/", "tdm-reservation": 1}]'
_DISTINCT = 40
_SIZE, _THREADS = 256, 16


def serve(pipe: Any) -> None:
    """The server's process: sends where its hosts are, ends when told to."""
    with WebServer() as web, WebServer("rules.test") as rules:
        for number in range(_DISTINCT):
            web.serve(f"/{number}.jpg", photo(number))
        web.serve("/tiny.png", picture(4, 4, format="PNG"))
        web.serve("/long.png", picture(700, 10, format="PNG"))
        web.serve("/bomb.png", _pixel_bomb())
        web.serve("/damaged.jpg", picture()[:300])
        web.serve("/reserved.jpg", picture(), TDM_Reservation="1")
        rules.serve("/robots.txt", _ROBOTS, "text/plain")
        rules.serve("/.well-known/tdmrep.json", _TDMREP, "application/json")
        for path in ("/0.jpg", "/disallowed/0.jpg", "/reserved/0.jpg"):
            rules.serve(path, picture())
        gzip_bomb()  # made here, not while a time-out runs
        pipe.send({**web.connect_to, **rules.connect_to})
        pipe.recv()


def _pixel_bomb() -> bytes:
    """A few kB of PNG that are 64 million pixels."""
    out = io.BytesIO()
    Image.new("1", (8000, 8000)).save(out, "PNG")
    return out.getvalue()


def photo(seed: int) -> bytes:
    """A JPEG of about 40 kB: smooth colours with grain, as photos have."""
    smooth = np.asarray(Image.open(io.BytesIO(picture(512, 384, seed)))).astype(np.int16)
    grain = np.random.default_rng(seed).normal(0, 7, smooth.shape)
    out = io.BytesIO()
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=86)
    return out.getvalue()


def images(count: int) -> list[Row]:
    return [Row(f"{WEB}/{n % _DISTINCT}.jpg", "success", 200) for n in range(count)]


def passing(count: int) -> list[Row]:
    """Images that come when they are asked for again."""
    return [Row(f"{WEB}/flaky/1/{n}", "success", 200) for n in range(count)]


def mixed(count: int, slow: int) -> list[Row]:
    """Images and every fault in turn, half and half, ``slow`` rows that never end among them."""
    rows = [FAULTY[n // 2 % len(FAULTY)] if n % 2 else row for n, row in enumerate(images(count))]
    for n in range(slow):
        rows[n * count // slow] = SLOW[n % len(SLOW)]
    return rows


def ours(rows: Sequence[Row], hosts: Mapping[str, str], **options: Any) -> tuple[float, int, int]:
    """(seconds, images kept, rows with another status or HTTP code than theirs) of the stage over
    shards of 1,000 rows, each written to disk as the engine does."""
    patient = {"retries": 0, "host_connections": 2 * _THREADS, "host_failures": 10**6}
    connect_to = {**hosts, "closed.test": f"127.0.0.1:{_closed_port()}"}
    config = DownloadConfig(
        image_size=_SIZE, threads=_THREADS, connect_to=connect_to, **{**patient, **options}
    )
    stage = DownloadStage(config)
    stage.setup()
    kept = wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        begun = time.perf_counter()
        for start in range(0, len(rows), 1000):
            part = rows[start : start + 1000]
            found = stage.process(_sources(part, start))
            store.put_named("images", ".tar", write_tar(found))
            store.put_table("stage=download", found.drop_columns(["image"]))
            came = zip(found["status"].to_pylist(), found["http_code"].to_pylist(), strict=True)
            wrong += sum((r.status, r.code) != one for r, one in zip(part, came, strict=True))
            kept += len(found) - found["image"].null_count
        seconds = time.perf_counter() - begun
    return seconds, kept, wrong


def _sources(rows: Sequence[Row], start: int) -> pa.Table:
    table = [
        {
            "row_id": str(n),
            "sample_id": ids.digest(str(n)),
            "url": row.url,
            "text": "t",
            "image_hash": row.image_hash,
            "repeat_of": "0" if row.status == "duplicate_row" else None,
        }
        for n, row in enumerate(rows, start=start)
    ]
    return filled(SOURCES, table, source="web")


def _closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def img2dataset(rows: Sequence[Row], hosts: Mapping[str, str], folder: Path) -> tuple[float, int]:
    """(seconds, successes) of `img2dataset.download` in one process, writing a WebDataset. The
    seconds are its own shards' durations, so that its start-up does not count, as ours does not."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    urls = [row.url.replace("web.test", hosts["web.test"]) for row in rows]
    table = pa.table({"url": urls})
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


def worker_memory(side: str, count: int, hosts: Mapping[str, str]) -> int:
    """Peak bytes of the process that downloads ``count`` images for ``ours`` or ``img2dataset``."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    worker = context.Process(target=_download_alone, args=(there, side, count, hosts))
    worker.start()
    there.close()  # so that a worker that fails ends the waiting
    peak: int = here.recv()
    worker.join()
    return peak


def _download_alone(pipe: Connection, side: str, count: int, hosts: Mapping[str, str]) -> None:
    rows = images(count)
    if side == "ours":
        ours(rows, hosts)
        pipe.send(_peak(os.getpid()))
        return
    ended, peaks = threading.Event(), [0]

    def watch() -> None:  # it downloads in a process of its own, which ends before it returns
        while not ended.wait(0.05):
            peaks.extend(_peak(child.pid or 0) for child in multiprocessing.active_children())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            img2dataset(rows, hosts, Path(folder))
    finally:
        ended.set()
        watching.join()
    pipe.send(max(peaks))


def _peak(process: int) -> int:
    """Peak bytes of a process so far; 0 where it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def raced(
    count: int, rounds: int, hosts: Mapping[str, str]
) -> tuple[list[float], list[float], int]:
    """(images a second of ours, of img2dataset's, our wrong rows), round by round in turn."""
    mine, theirs, wrong = [], [], 0
    for _ in range(rounds):
        seconds, kept, odd = ours(images(count), hosts)
        mine.append(kept / seconds)
        wrong += odd
        with tempfile.TemporaryDirectory() as folder:
            seconds, kept = img2dataset(images(count), hosts, Path(folder))
        theirs.append(kept / seconds)
    return mine, theirs, wrong


def run(
    count: int, faulty: int, rows: tuple[int, ...], slow: int, rounds: int = 3
) -> list[dict[str, Any]]:
    """All measurements, as the benchmark's JSON has them."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    server = context.Process(target=serve, args=(other,), daemon=True)
    server.start()
    hosts = pipe.recv()
    try:
        mine, theirs, wrong = raced(count, rounds, hosts)
        with patch.object(socket, "getaddrinfo", known_locally):
            limits = {"timeout": 5.0, "total_timeout": 10.0, "max_bytes": 2 << 20}
            rules = {"min_image_size": 8, "respect_robots": True, "respect_tdmrep": True}
            wrong += ours(mixed(faulty, slow), hosts, **limits, **rules)[2]
        wrong += ours(passing(faulty // 20), hosts, retries=1, backoff=0.01)[2]
        memory, others = (worker_memory(side, count, hosts) for side in ("ours", "img2dataset"))
    finally:
        pipe.send("end")
        server.join()
    ratios = [one / other for one, other in zip(mine, theirs, strict=True)]
    results = [
        _result("images a second", median(mine), "images/s", "img2dataset", median(ratios))
        | {"values": mine, "others": theirs, "least": min(ratios), "most": max(ratios)},
        _result("peak memory of a worker", memory / 2**20, "MiB", "img2dataset", memory / others),
        _result("rows with another status or code than the server's", wrong, "rows", "truth", None),
    ]
    peaks = [ingest_memory(number) for number in rows]
    for number, peak in zip(rows, peaks, strict=True):
        metric = f"ingest of {number:,} rows, peak memory"
        results.append(_result(metric, peak / 2**20, "MiB", f"{rows[0]:,} rows", peak / peaks[0]))
    return results


def _result(
    metric: str, value: float, unit: str, against: str, ratio: float | None
) -> dict[str, Any]:
    return {"metric": metric, "value": value, "unit": unit, "against": against, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--images", type=int, default=3000, help="of a round")
    parser.add_argument("--faulty", type=int, default=20_000)
    parser.add_argument("--slow", type=int, default=40, help="of the faulty, never end")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    options = parser.parse_args()
    results = run(options.images, options.faulty, tuple(options.rows), options.slow)
    for r in results:
        ratio = "" if r["ratio"] is None else f"  {r['ratio']:.2f} x {r['against']}"
        ratio += f" ({r['least']:.2f} to {r['most']:.2f})" if "least" in r else ""
        print(f"{r['metric']:50} {r['value']:10.1f} {r['unit']}{ratio}")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
