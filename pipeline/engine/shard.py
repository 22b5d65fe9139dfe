"""One shard through one stage: load its input, process, check, publish. No Ray in here."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from types import MappingProxyType

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.dag import MADE_HERE, SHARD_READS, SHARD_STAGES, ShardJob, ShardTask, stage_input
from pipeline.images import with_images, write_tar
from pipeline.records import Payload, Record
from pipeline.store import Store
from pipeline.version import code_version
from stages.base import ShardStage
from stages.errors import StoreError
from stages.removed import Removed
from stages.schemas import check

Tables = Mapping[str, pa.Table]

_NOTHING = Removed()


def build(task: ShardTask, store: Store) -> ShardStage:
    """The stage of ``task`` with its weights where this process can open them."""
    return task.build(None if task.model is None else open_model(task.model, store))


def open_model(model: str, store: Store) -> str:
    """A path or hub id for ``model``; what the run made itself becomes a local folder."""
    if not model.startswith(MADE_HERE):
        return model
    name, _, folder = model.removeprefix(MADE_HERE).partition("#")
    for payload in store.read_record(name).payloads:
        attempt, found, _ = payload.path.partition(f"/{folder}/")
        if found:
            return str(store.local_folder(f"{attempt}/{folder}"))
    raise StoreError(f"{name}: publishes no folder {folder}")


def load_inputs(stage: str, job: ShardJob, store: Store, carried: Tables) -> dict[str, pa.Table]:
    """The tables that ``stage`` reads: those carried along, the rest from the store."""
    return {
        name: carried[name] if name in carried else load(job.records[name], store)
        for name in SHARD_READS[stage]
        if name in job.records
    }


def load(record_name: str, store: Store) -> pa.Table:
    """The output table of the record of that name, images included."""
    return output_of(store.read_record(record_name), store)


def output_of(record: Record, store: Store) -> pa.Table:
    """The table that a record publishes, images included."""
    table = store.read_table(payload(record, ".parquet"))
    if record.stage != "download":
        return table
    return with_images(table, store.read_bytes(payload(record, ".tar").path))


def payload(record: Record, ending: str) -> Payload:
    """The payload of a record whose path ends so.

    Raises:
        StoreError: there is none.
    """
    for candidate in record.payloads:
        if candidate.path.endswith(ending):
            return candidate
    raise StoreError(f"{record.name}: names no payload that ends in {ending}")


def run_stage(stage: ShardStage, inputs: Tables, removed: Removed = _NOTHING) -> pa.Table:
    """Process one shard's inputs, both ends held against the stage's schemas; rows of samples that
    are ``removed`` never reach the stage."""
    table = check(stage_input(stage.name, inputs), stage.input_schema, f"{stage.name} input")
    return check(removed.process(stage, table), stage.output_schema, f"{stage.name} output")


def settle(stage: ShardStage, task: ShardTask, job: ShardJob, store: Store) -> None:
    """Fix what ``stage`` found on its machine in the shard's plan; a later attempt follows it."""
    found = stage.choices()
    if not found:
        return
    path = f"{_folder(task, job)}/{_fingerprint(task, job)}/plan.json"
    store.create(path, json.dumps(found).encode())
    stage.choose(store.read_json(path))


def _folder(task: ShardTask, job: ShardJob) -> str:
    scope = "" if task.scope is None else f"round={task.scope:02d}/"
    return f"{scope}stage={task.name}/shard={job.shard}"


def _fingerprint(task: ShardTask, job: ShardJob) -> str:
    return job.records[task.name].rpartition("-")[2].removesuffix(".json")


def publish(
    task: ShardTask,
    job: ShardJob,
    output: pa.Table,
    store: Store,
    started: float,
    facts: Mapping[str, str] = MappingProxyType({}),
) -> pa.Table:
    """Write payloads, then the record. Returns the output that is published under the record's
    name: ours, or that of another attempt that came first."""
    payloads = []
    table = output
    if task.name == "download":
        folder = f"images/shard={job.shard}"
        payloads.append(store.put_named(folder, ".tar", write_tar(output)))
        table = output.drop_columns(["image"])
    payloads.append(store.put_table(_folder(task, job), table))
    record = Record(
        stage=task.name,
        stage_version=SHARD_STAGES[task.name].version,
        round=task.scope,
        shard=job.shard,
        fingerprint=_fingerprint(task, job),
        payloads=tuple(payloads),
        counts=count_by(output, "status"),
        details=({"weights": task.weights} if task.weights else {}) | dict(facts),
        code_version=code_version(),
        started=started,
        finished=time.time(),
    )
    if store.publish(record):
        return output
    return load(record.name, store)


def count_by(table: pa.Table, column: str) -> dict[str, int]:
    """How many rows have each value of a string column."""
    counted = pc.value_counts(table[column])
    return {str(entry["values"]): int(entry["counts"]) for entry in counted.to_pylist()}
