"""One bootstrapping round on real photos, from released models, through the command line."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from stages.models.matcher import Matcher
from stages.scenes.world import write_tokenizer
from stages.texts import clean_text
from tests import tiny_models
from tests.servers import WebServer

pytestmark = [
    pytest.mark.skipif(
        "CAPFILT_TEST_DATA" not in os.environ, reason="CAPFILT_TEST_DATA is unset: no real photos"
    ),
    pytest.mark.timeout(500),
]

ROOT = Path(__file__).parents[2]
WEB, HUMAN, DEV, TEST = 40, 12, 8, 8
UNCLOSED = '"><img src=x onerror=alert(1) a photo of a cat'  # cleaning takes closed tags only
SCRIPT = "<script>alert('capfilt')</script> a photo of a dog"
HOSTILE = "pngsuite__xdtn0g01.png"  # a PNG without pixels
ODD_TEXTS = {
    "empty": "",
    "emoji": "a red car 🚗🚙 on the road 👩‍👩‍👧",
    "rtl": "צילום של חתול \u202eعلى العشب\u202c",
    "script": SCRIPT,
    "unclosed": UNCLOSED,
    "long": " ".join(f"word{n}" for n in range(10_000)),
}


@dataclass
class Web:
    """What is served, and what has to come of each row: its status by URL and text."""

    server: WebServer
    rows: list[tuple[str, str]] = field(default_factory=list)
    expected: Counter[str] = field(default_factory=Counter)
    copies: list[tuple[str, str]] = field(default_factory=list)
    near: list[tuple[str, str]] = field(default_factory=list)

    def add(self, url: str, text: str, status: str = "downloaded") -> str:
        self.rows.append((url, text))
        self.expected[status] += 1
        return url


@dataclass
class Done:
    """A finished run."""

    run: Path
    web: Web

    def table(self, pattern: str) -> pa.Table:
        files = sorted(self.run.glob(pattern))
        assert files, pattern
        return pa.concat_tables(pq.ParquetFile(file).read() for file in files)

    def rows(self, pattern: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.table(pattern).to_pylist()
        return rows


def capfilt(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def photos() -> list[tuple[Path, str, str]]:
    """(file, good text, noisy text) of every photo with both."""
    folder = Path(os.environ["CAPFILT_TEST_DATA"]) / "photos"
    lines = map(json.loads, (folder / "photos.jsonl").read_text("utf-8").splitlines())
    return [
        (folder / p["file"], p["alt"], p["caption"]) for p in lines if p["alt"] and p["caption"]
    ]


def changed(data: bytes) -> bytes:
    """The same picture, smaller and encoded again."""
    with Image.open(io.BytesIO(data)) as image:
        small = image.convert("RGB").resize((image.width * 3 // 4, image.height * 3 // 4))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=70)
    return out.getvalue()


def closed_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def build_web(server: WebServer, chosen: list[tuple[Path, str, str]]) -> Web:
    web = Web(server)
    bodies = [file.read_bytes() for file, _, _ in chosen]
    urls = [server.serve(f"/photo/{n}.jpg", body) for n, body in enumerate(bodies)]
    odd = list(ODD_TEXTS.values())
    for n, (url, (_, alt, caption)) in enumerate(zip(urls, chosen, strict=True)):
        wrong = chosen[n - 1][1]
        # A third each: what the picture shows, what the book says of it, another photo's text.
        web.add(url, odd[n] if n < len(odd) else (alt, caption, wrong)[n % 3])
    for n in range(10, 16):
        copy = server.serve(f"/copy/{n}.jpg", bodies[n])
        web.copies.append((urls[n], web.add(copy, f"{SCRIPT} {n}")))
    for n in range(16, 22):
        near = server.serve(f"/near/{n}.jpg", changed(bodies[n]))
        web.near.append((urls[n], web.add(near, chosen[n][1])))
    web.add(*web.rows[20], status="duplicate_row")
    for n in range(3):
        web.add(server.url(f"/gone/{n}.jpg"), chosen[n][1], "http_4xx")
    web.add("http://closed.test/photo.jpg", "nobody answers here", "refused")
    web.add(f"http://{server.address}/photo/0.jpg", "inside the network", "blocked_address")
    web.add("file:///etc/hostname", "not on the web", "invalid_url")
    web.add(server.url("/htmlimage"), "a page called an image", "not_an_image")
    web.add(server.serve("/half.jpg", bodies[0][: len(bodies[0]) // 2]), "cut in half", "decode")
    hostile = Path(os.environ["CAPFILT_TEST_DATA"]) / "hostile"
    body = (hostile / HOSTILE).read_bytes()
    web.add(server.serve("/hostile.png", body), "a hostile file", "decode")
    return web


def annotated(folder: Path, chosen: list[tuple[Path, str, str]]) -> str:
    folder.mkdir()
    lines = []
    for file, alt, _ in chosen:
        (folder / file.name).write_bytes(file.read_bytes())
        lines.append(json.dumps({"image": file.name, "captions": [alt]}))
    (folder / "annotations.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return str(folder)


def median_score(matcher: Path, chosen: list[tuple[Path, str, str]]) -> float:
    """A threshold that an untrained filter's scores lie on both sides of."""
    images = [Image.open(file).convert("RGB") for file, _, _ in chosen]
    scores = Matcher(matcher)(images, [[alt] for _, alt, _ in chosen])
    return float(np.median([match for [(match, _)] in scores]))


def config(folder: Path, web: Web, rest: list[tuple[Path, str, str]]) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((ROOT / "configs/tiny.yaml").read_text("utf-8"))
    del values["world"]
    table = pa.table({"url": [u for u, _ in web.rows], "text": [t for _, t in web.rows]})
    pq.write_table(table, folder / "web.parquet")
    write_tokenizer(folder / "tokenizer")
    models = {
        "caption": tiny_models.save_blip(tiny_models.captioner_model(), folder / "captioner"),
        "filter": tiny_models.save_blip(tiny_models.matcher_model(), folder / "matcher"),
        "embed": tiny_models.save_clip(tiny_models.clip_model(), folder / "clip"),
    }
    values |= {stage: {"model": str(model)} for stage, model in models.items()}
    values |= {
        "run": str(folder / "run"),
        "sources": [{"path": str(folder / "web.parquet")}],
        "human": [{"path": annotated(folder / "human", rest[:HUMAN]), "kind": "human"}],
        "dev": annotated(folder / "dev", rest[HUMAN : HUMAN + DEV]),
        "test": annotated(folder / "test", rest[HUMAN + DEV : HUMAN + DEV + TEST]),
        # Random weights find every photo alike: only bytes and perceptual hashes may decide.
        "dedup": {"perceptual_cosine": 0.0, "semantic_cosine": 1.0},
        "select": {
            "threshold": median_score(models["filter"], rest[:HUMAN]),
            "synthetic_threshold": 0.0,
        },
    }
    connect_to = web.server.connect_to | {"closed.test": f"127.0.0.1:{closed_port()}"}
    values["download"] |= {"image_size": 64, "connect_to": connect_to}
    values["pretrain"]["tokenizer"] = str(folder / "tokenizer")
    values["pretrain"]["model"]["vision"] |= {"image_size": 64, "patch_size": 16}
    values["pretrain"]["steps"] = 10
    for name in ("captioner", "filter"):
        values["finetune"][name] = values["finetune"][name] | {"image_size": 64, "steps": 5}
    return values


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    folder = tmp_path_factory.mktemp("photos")
    found = photos()
    with WebServer() as server:
        web = build_web(server, found[:WEB])
        values = config(folder, web, found[WEB:])
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(values), "utf-8")
        ended = capfilt("run", str(file))
        assert ended.returncode == 0, ended.stderr[-3000:] + ended.stdout[-2000:]
        # What Ray and its workers say goes to a file.
        assert ended.stderr == "" and (folder / "run" / "logs" / "ray.log").is_file()
        yield Done(folder / "run", web)


def test_every_row_ends_as_planned(done: Done) -> None:
    download = done.rows("stage=download/*/*.parquet")
    web = [row for row in download if row["source"] == "web"]
    # Download's "success" is the account's "downloaded".
    ended = Counter(row["status"].replace("success", "downloaded") for row in web)
    assert ended == done.web.expected
    rows = Counter(row["state"] for row in done.rows("round=01/stage=select/**/*rows.parquet"))
    assert rows == done.web.expected + Counter(downloaded=HUMAN)
    # Servers hear who asks.
    assert all(agent.startswith("capfilt/") for agent in done.web.server.agents)


def test_the_books_balance(done: Done) -> None:
    verified = capfilt("verify", str(done.run))
    assert verified.returncode == 0, verified.stdout
    assert "balanced rounds: 1" in verified.stdout
    ledger = done.rows("round=01/stage=ledger/**/*ledger.parquet")
    counts = {(r["account"], r["source"], r["state"]): r["count"] for r in ledger}
    assert counts["rows", "human", "downloaded"] == HUMAN
    assert counts["pairs", "human", "kept"] == HUMAN
    assert counts["pairs", "web", "failed"] == 1  # the empty text
    assert counts["pairs", "web", "kept"] > 0 and counts["pairs", "web", "rejected"] > 0
    assert (
        sum(
            n
            for (account, source, _), n in counts.items()
            if (account, source) == ("pairs", "synthetic")
        )
        > 0
    )


def test_duplicates_are_found_and_others_left_alone(done: Done) -> None:
    pairs = {row["url"]: row for row in done.rows("round=01/stage=select/**/*pairs.parquet")}
    clusters = {
        row["sample_id"]: row for row in done.rows("round=01/stage=dedup/**/*clusters.parquet")
    }
    of_url = {url: clusters[row["sample_id"]] for url, row in pairs.items() if url is not None}
    for net, found in (("exact", done.web.copies), ("perceptual", done.web.near)):
        for url, copy in found:
            assert of_url[url]["cluster_id"] == of_url[copy]["cluster_id"]
            assert of_url[url]["net"] == of_url[copy]["net"] == net
    alone = len(done.web.copies) + len(done.web.near)
    assert len({row["cluster_id"] for row in clusters.values()}) == len(clusters) - alone


def test_hostile_texts_survive_as_data(done: Done) -> None:
    sources = done.rows("sources/**/*.parquet")
    assert set(ODD_TEXTS.values()) <= {row["original_text"] for row in sources}
    states = {
        row["text"]: row["state"] for row in done.rows("round=01/stage=select/**/*pairs.parquet")
    }
    cleaned = {clean_text(text) for text in ODD_TEXTS.values()} - {""}
    assert UNCLOSED in cleaned and "a photo of a dog" in cleaned
    assert {states[text] for text in cleaned} <= {"kept", "rejected"}


def test_released_models_are_measured_before_the_first_round(done: Done) -> None:
    before = done.rows("round=00/stage=evaluate/**/*metrics.parquet")
    assert {row["model"] for row in before} == {"captioner", "filter"}
    after = done.rows("round=01/stage=evaluate/**/*metrics.parquet")
    assert {row["model"] for row in after} == {"med", "captioner", "filter"}
    [gate] = done.run.glob("round=01/stage=gate/*gate.json")
    decision = json.loads(gate.read_text("utf-8"))["decision"]
    for model in ("captioner", "filter"):
        assert decision[model]["items"] == DEV
        assert decision[model]["old"] is not None


def test_a_missing_embedder_is_refused_before_anything_is_measured(
    done: Done, tmp_path: Path
) -> None:
    file, run = done.run.parent / "config.yaml", tmp_path / "run"
    ended = capfilt("run", str(file), f"run={run}", "embed.model=/nowhere/clip")
    assert ended.returncode == 2
    assert "/nowhere/clip: no such folder" in ended.stderr
    assert not list(run.rglob("*metrics.parquet"))


def test_every_table_opens_in_three_readers(done: Done) -> None:
    files = sorted(done.run.rglob("*.parquet"))
    assert len(files) > 15
    for file in files:
        table = pq.read_table(file)
        [(counted,)] = duckdb.execute(
            "SELECT count(*) FROM read_parquet(?)", [str(file)]
        ).fetchall()
        fetched = duckdb.execute("SELECT * FROM read_parquet(?)", [str(file)]).fetchall()
        frame = pd.read_parquet(file)
        assert table.num_rows == counted == len(fetched) == len(frame), file


def test_the_report_escapes_what_the_web_wrote(done: Done, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    written = capfilt("report", str(done.run), "--output", str(target))
    assert written.returncode == 0, written.stderr
    html = target.read_text("utf-8")
    assert "<img src=x" not in html
    assert "&gt;&lt;img src=x onerror=alert(1)" in html
