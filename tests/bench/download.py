"""The download stage against img2dataset called directly, and ingest's memory.

    python -m tests.bench.download [--json FILE] [--images 5000] [--rows 10000 1000000]

One local server in a process of its own gives both the same images of about 40 kB, fault by fault
the truth that counts are held against. Both fetch with as many threads, resize the same way and
encode JPEG; each keeps its images in memory or in its own files, as it does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages import ids
from stages.download import DownloadConfig, DownloadStage
from stages.schemas import SOURCES
from tests.servers import WebServer, picture
from tests.tables import filled

FAULTS = {
    "/404": "http_4xx",
    "/410": "http_4xx",
    "/500": "http_5xx",
    "/reset": "broken_response",
    "/cut": "broken_response",
    "/html": "not_an_image",
    "/svg": "not_an_image",
    "/empty": "not_an_image",
    "/noai": "opted_out",
    "/loop": "redirect",
    "/gzipbomb": "too_large",
    "/to?http://169.254.169.254/": "blocked_address",
}
_DISTINCT = 40
_SIZE, _THREADS = 256, 16


def serve(pipe: Any) -> None:
    """The server's process: sends its address, ends when told to."""
    with WebServer() as web:
        for number in range(_DISTINCT):
            web.serve(f"/{number}.jpg", photo(number))
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
    Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=80)
    return out.getvalue()


def ours(urls: list[str], address: str) -> tuple[float, Counter[str]]:
    """(seconds, rows by status) of the stage over shards of 1,000 rows."""
    config = DownloadConfig(
        image_size=_SIZE,
        threads=_THREADS,
        retries=0,
        host_connections=2 * _THREADS,
        host_failures=10**6,
        connect_to={"web.test": address},
    )
    stage = DownloadStage(config)
    stage.setup()
    counts: Counter[str] = Counter()
    begun = time.perf_counter()
    for start in range(0, len(urls), 1000):
        rows = [
            {"row_id": str(n), "sample_id": ids.digest(str(n)), "url": url, "text": "t"}
            for n, url in enumerate(urls[start : start + 1000], start=start)
        ]
        counts.update(stage.process(filled(SOURCES, rows, source="web"))["status"].to_pylist())
    return time.perf_counter() - begun, counts


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


def run(images: int, faulty: int, rows: tuple[int, ...]) -> list[dict[str, Any]]:
    """All measurements, as the benchmark's JSON has them."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe()
    server = context.Process(target=serve, args=(other,), daemon=True)
    server.start()
    address = pipe.recv()
    try:
        good = [f"http://web.test/{n % _DISTINCT}.jpg" for n in range(images)]
        seconds, counts = ours(good, address)
        with tempfile.TemporaryDirectory() as folder:
            theirs, successes = img2dataset(good, address, Path(folder))
        faults = list(FAULTS)
        paths = [
            faults[n // 2 % len(faults)] if n % 2 else f"/{n % _DISTINCT}.jpg"
            for n in range(faulty)
        ]
        truth = Counter(FAULTS.get(path, "success") for path in paths)
        _, found = ours([f"http://web.test{path}" for path in paths], address)
    finally:
        pipe.send("end")
        server.join()
    rate, other_rate = counts["success"] / seconds, successes / theirs
    wrong = sum((truth - found).values()) + images - counts["success"]
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
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    options = parser.parse_args()
    results = run(options.images, options.faulty, tuple(options.rows))
    for r in results:
        ratio = "" if r["ratio"] is None else f"  {r['ratio']:.2f} x {r['against']}"
        print(f"{r['metric']:50} {r['value']:10.1f} {r['unit']}{ratio}")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
