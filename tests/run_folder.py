"""A small run folder, published through `Store` and `Record` as a run does it.

Two web shards and a human one; round 0 on the raw pairs, round 1 captioned and filtered, in which
nothing is left to do but a third round. Select, assemble and the ledger are the real stages.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.images import write_tar
from pipeline.ledger import LedgerStage
from pipeline.records import Payload, Record, fingerprint, record_name
from pipeline.store import Store
from stages.assemble import AssembleConfig, AssembleStage
from stages.base import DatasetStage, LocalContext
from stages.ids import pair_id, sample_id
from stages.schemas import (
    CAPTIONS,
    CLUSTERS,
    DOWNLOAD,
    EMBEDDINGS,
    METRICS,
    SCORES,
    SHARED,
    SOURCES,
    TRAINING_INDEX,
    TRAINING_LOG,
)
from stages.select import SelectConfig, SelectStage
from tests.images import jpeg
from tests.tables import filled

Rows = list[dict[str, Any]]

HOSTILE = "a \x1b[31mred\x1b[0m [bold]dog[/bold] \u202e<script>alert(1)</script>\nsecond line"
"""A web text that would like to be obeyed."""

_WEB = [
    [("cat", "a cat"), ("dog", HOSTILE), ("gone", "a horse")],
    [("tree", "a tree"), ("cat", "a cat"), ("car", "buy now")],
]
_HUMAN = [("boat", "a boat on a lake"), ("hill", "a green hill")]
_SCORES = {"a cat": 0.9, HOSTILE: 0.8, "a tree": 0.7, "buy now": 0.1}


def publish_files(store: Store, paths: Sequence[str]) -> Record:
    """Files of a few bytes, and the record that names them, as of an `assemble` of round 0."""
    for path in paths:
        store.write_bytes(path, b"bytes")
    record = Record(
        stage="assemble",
        stage_version=1,
        round=0,
        shard="all",
        fingerprint="00",
        payloads=tuple(Payload(path=path, bytes=5, sha256="00") for path in paths),
        code_version="test",
        started=0,
        finished=0,
    )
    store.publish(record)
    return record


class _Run:
    """Publishes records, one second of work each."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.clock = 1_700_000_000.0

    def publish(
        self,
        stage: str,
        round_: int | None,
        shard: str,
        payloads: Sequence[Payload],
        counts: Mapping[str, int],
        reads: Sequence[str] = (),
    ) -> str:
        record = Record(
            stage=stage,
            stage_version=1,
            round=round_,
            shard=shard,
            fingerprint=fingerprint(stage, 1, None, str(round_), shard, *reads),
            payloads=tuple(payloads),
            counts=dict(counts),
            details={"reads": json.dumps(list(reads))} if reads else {},
            code_version="0.1.0",
            started=self.clock,
            finished=self.clock + 1,
        )
        self.clock += 1
        assert self.store.publish(record)
        return record.name

    def shard(self, stage: str, round_: int | None, shard: str, table: pa.Table) -> str:
        """One shard of a shard stage; a download's images go to its tar."""
        payloads = []
        counts: dict[str, int] = {}
        for status in table["status"].to_pylist():
            counts[status] = counts.get(status, 0) + 1
        if stage == "download":
            payloads.append(self.store.put_named(f"images/shard={shard}", ".tar", write_tar(table)))
            table = table.drop_columns(["image"])
        scope = "" if round_ is None else f"round={round_:02d}/"
        payloads.append(self.store.put_table(f"{scope}stage={stage}/shard={shard}", table))
        return self.publish(stage, round_, shard, payloads, counts)

    def dataset(
        self,
        stage: str,
        round_: int,
        folder: Path,
        below: str | None = None,
        reads: Sequence[str] = (),
    ) -> str:
        """A whole-round stage that wrote ``folder``."""
        target = f"round={round_:02d}/{below or f'stage={stage}'}"
        return self.publish(stage, round_, "all", self.store.put_folder(target, folder), {}, reads)

    def table(self, stage: str, round_: int, file: str, table: pa.Table) -> str:
        import pyarrow.parquet as pq

        with tempfile.TemporaryDirectory() as scratch:
            pq.write_table(table, Path(scratch) / file)
            return self.dataset(stage, round_, Path(scratch))

    def run(
        self,
        stage: DatasetStage,
        round_: int,
        inputs: Mapping[str, Sequence[str]],
        below: str | None = None,
    ) -> str:
        """Run a real stage on the Parquet, or for ``images`` the tars, that records publish."""
        files = {
            name: [
                self.store.local_copy(payload.path)
                for record in records
                for payload in self.store.read_record(record).payloads
                if payload.path.endswith(_endings(name))
            ]
            for name, records in inputs.items()
        }
        with tempfile.TemporaryDirectory() as scratch:
            stage.run(files, Path(scratch), LocalContext())
            return self.dataset(stage.name, round_, Path(scratch), below)


def _endings(name: str) -> str:
    files = {"images": ".tar", "pairs": "/pairs.parquet", "rows": "/rows.parquet"}
    return files.get(name, "/index.parquet" if name == "index" else ".parquet")


def make_run(url: str) -> Store:
    """A run at ``url`` with rounds 0 and 1 finished, and a third asked for."""
    store = Store(url)
    store.ensure()
    run = _Run(store)
    downloads = _downloads()
    shards: dict[str, tuple[str, str]] = {}
    fetched = []
    for shard, table in downloads.items():
        columns = [name for name in SOURCES.names if name in table.column_names]
        rows = filled(SOURCES, table.select(columns).to_pylist())
        written = store.put_table(f"sources/shard={shard}", rows)
        counts = {"rows": rows.num_rows}
        run.publish("ingest", None, f"file{shard}", [written], counts)
        kind = table["source"][0].as_py()
        shards[shard] = (kind, run.publish("sources", None, shard, [written], counts))
        fetched.append(run.shard("download", None, shard, table))
    sources = [record for _, record in shards.values()]
    for number in (0, 1):
        records = {"download": fetched, **_round(run, number, downloads, sources, fetched)}
        plan = {"round": number, "shards": shards, "records": records}
        store.write_json(f"round={number:02d}/plan.json", plan)
    config = {"run": url, "rounds": {"count": 2}}
    store.write_json("run.json", {"config": config, "versions": {}, "created": 1_700_000_000.0})
    return store


def publish_download(store: Store, shard: str, image: str, name: str) -> str:
    """One more shard's download as its worker publishes it: a web row of ``name`` (of the URL and
    the sample) whose bytes have the hash ``image``. Returns the record's name."""
    row = {"row_id": f"r{shard}", "sample_id": sample_id(name), "text": f"a picture of {name}"}
    row |= {"source": "web", "url": f"http://web.test/{name}", "status": "success"}
    row |= {"image": jpeg(9, (32, 24)), "sha256": image, "width": 32, "height": 24}
    return _Run(store).shard("download", None, shard, filled(DOWNLOAD, [row]))


def publish_shared(store: Store, shard: str, sample: str) -> str:
    """What the images of a shard share, as `pipeline.copies` publishes it: ``sample`` is captioned
    for itself. Returns the record's name."""
    table = filled(SHARED, [{"sample_id": sample, "captioned_as": sample}])
    payloads = [store.put_table(f"stage=shared/shard={shard}", table)]
    return _Run(store).publish("shared", None, shard, payloads, {})


def publish_training(store: Store, number: int, sample: str, config: str) -> dict[str, list[str]]:
    """What another config has left in round ``number``: a training set of one pair of ``sample``
    and the models that were trained on it. Returns stage → records."""
    import pyarrow.parquet as pq

    run = _Run(store)
    select = record_name("select", number, "all", fingerprint("select", 1, None, config))
    row = {"pair_id": pair_id(sample, "web", ""), "sample_id": sample, "origin": sample}
    with tempfile.TemporaryDirectory() as scratch:
        pq.write_table(filled(TRAINING_INDEX, [row]), Path(scratch) / "index.parquet")
        assemble = run.dataset("assemble", number, Path(scratch), "dataset", [select])
    return {"assemble": [assemble], **_models(run, number, assemble)}


def _downloads() -> dict[str, pa.Table]:
    """Shard → its download table; ``gone`` is a dead link, the second cat repeats the first."""
    tables = {}
    seen: dict[tuple[str, str], str] = {}
    for number, (kind, found) in enumerate([("web", _WEB[0]), ("web", _WEB[1]), ("human", _HUMAN)]):
        rows: Rows = []
        for name, text in found:
            row = {"row_id": f"r{number}{len(rows)}", "sample_id": sample_id(name), "text": text}
            row |= {"source": kind, "url": f"http://web.test/{name}", "status": "success"}
            if name == "gone":
                row |= {"status": "http_4xx", "detail": "HTTP 404"}
            elif (name, text) in seen:
                row |= {"status": "duplicate_row"}
            else:
                image = jpeg(len(seen), (32, 24))
                row |= {"image": image, "sha256": name, "width": 32, "height": 24}
            seen.setdefault((name, text), str(row["row_id"]))
            rows.append(row)
        tables[f"{number:06d}"] = filled(DOWNLOAD, rows)
    return tables


def _round(
    run: _Run,
    number: int,
    downloads: Mapping[str, pa.Table],
    sources: Sequence[str],
    fetched: Sequence[str],
) -> dict[str, list[str]]:
    """Stage → records of one whole round."""
    records: dict[str, list[str]] = {}
    inputs = {"sources": sources, "download": fetched}
    if number > 0:
        for stage in ("caption", "filter", "embed"):
            scope = None if stage == "embed" else number
            records[stage] = [
                run.shard(stage, scope, shard, _labels(stage, table))
                for shard, table in downloads.items()
                if table["source"][0].as_py() == "web"
            ]
        records["dedup"] = [run.table("dedup", number, "clusters.parquet", _clusters(downloads))]
        inputs |= {"captions": records["caption"], "scores": records["filter"]}
        inputs |= {"clusters": records["dedup"]}
    names = sorted(downloads)
    select = run.run(SelectStage(SelectConfig(), names), number, inputs)
    made = {"pairs": [select], "images": list(fetched)}
    assemble = run.run(AssembleStage(AssembleConfig(), names), number, made, "dataset")
    books = {k: v for k, v in inputs.items() if k in ("sources", "download", "captions")}
    books |= {"pairs": [select], "rows": [select], "index": [assemble]}
    ledger = run.run(LedgerStage(), number, books)
    return records | {
        "select": [select],
        "assemble": [assemble],
        "ledger": [ledger],
        **_models(run, number, assemble),
        "evaluate": [run.table("evaluate", number, "metrics.parquet", _metrics(number))],
        "gate": [_gate(run, number)],
    }


def _labels(stage: str, download: pa.Table) -> pa.Table:
    """What captioner, filter and embedder make of one shard's images."""
    images = [row for row in download.to_pylist() if row["image"] is not None]
    if stage == "caption":
        captions = [
            {"sample_id": row["sample_id"], "text": f"a photo of {row['sha256']}"} for row in images
        ]
        return filled(CAPTIONS, captions, caption_index=0, status="success", model="c1")
    if stage == "embed":
        vectors = [{"sample_id": row["sample_id"], "embedding": [0.6, 0.8]} for row in images]
        return filled(EMBEDDINGS, vectors, status="success", model="e1")
    scores = []
    for row in images:
        synthetic = f"a photo of {row['sha256']}"
        for source, text, score in (
            ("web", row["text"], _SCORES[row["text"]]),
            ("synthetic", synthetic, 0.6),
        ):
            pair = {"pair_id": pair_id(row["sample_id"], source, text), "source": source}
            pair |= {"sample_id": row["sample_id"], "text": text}
            scores.append(pair | {"itm_score": score, "itc_score": 0.3})
    return filled(SCORES, scores, status="success", model="f1")


def _clusters(downloads: Mapping[str, pa.Table]) -> pa.Table:
    samples = {
        row["sample_id"]
        for table in downloads.values()
        for row in table.to_pylist()
        if row["image"] is not None and row["source"] == "web"
    }
    return filled(CLUSTERS, [{"sample_id": s, "cluster_id": s} for s in sorted(samples)])


def _models(run: _Run, number: int, assemble: str) -> dict[str, list[str]]:
    """Training stages, each a folder with a model and a log."""
    import pyarrow.parquet as pq

    found: dict[str, list[str]] = {}
    for stage, model in (
        ("pretrain", "med"),
        ("finetune_captioner", "captioner"),
        ("finetune_filter", "filter"),
    ):
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / model).mkdir()
            (Path(scratch) / model / "config.json").write_text("{}")
            log = [{"stage": stage, "step": step, "loss": 1.0 / step} for step in (1, 2)]
            pq.write_table(filled(TRAINING_LOG, log), Path(scratch) / "log.parquet")
            reads = [assemble, *found.get("pretrain", ())]
            found[stage] = [run.dataset(stage, number, Path(scratch), "models", reads)]
    return found


def _metrics(number: int) -> pa.Table:
    rows = [
        {"split": "test", "model": "med", "metric": "tr_at_1", "value": 0.25 + number / 2},
        {"split": "truth", "model": "data", "metric": "wrong_after", "value": 0.5 - number * 0.4},
    ]
    return filled(METRICS, rows, n=40)


def _gate(run: _Run, number: int) -> str:
    verdict = {"promoted": True, "reason": "promoted: no earlier model to compare with"}
    document = {"decision": {"captioner": verdict, "filter": verdict}, "models": {}}
    data = json.dumps(document).encode()
    payload = run.store.put_named(f"round={number:02d}/stage=gate", "-gate.json", data)
    return run.publish("gate", number, "all", [payload], {})
