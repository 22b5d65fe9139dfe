"""The loop: ingest, then round after round of curation, training and the gate.

`run` is the whole program behind ``capfilt run``. Everything it does is published by records, so
running it again after any kind of end goes on where records stop.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import preflight, retry, tombstones
from pipeline.config import RunConfig, substitute
from pipeline.dag import DatasetTask, Published, made_here
from pipeline.engine.board import watched
from pipeline.engine.cluster import connected
from pipeline.engine.data import run_shards
from pipeline.engine.dataset import run_dataset
from pipeline.engine.placement import check_training, resources
from pipeline.engine.shard import payload
from pipeline.engine.train import run_training
from pipeline.plan import Model, RoundPlan, content_of, dataset_task, plan_round, print_of, probes
from pipeline.progress import Screen
from pipeline.sources import ingest, new_files
from pipeline.store import Record, Store, fingerprint, record_name
from pipeline.version import code_version
from stages.evaluate import EvaluateStage
from stages.gate import Decision, decide
from stages.scenes.server import WorldServer
from stages.scenes.world import build_world

_VERSIONS = ("ray", "torch", "transformers", "img2dataset", "pyarrow")


def run(
    config: RunConfig, screen: Screen, dry_run: bool = False, retry_failed: bool = False
) -> None:
    """Bring the run folder to the state that ``config`` asks for. With ``retry_failed``, rows that
    failed for reasons that may have passed are cut into shards for the next round to begin.

    Raises:
        UserError: something in the config, a source or a model cannot be used.
        RunError: the run cannot go on; what is published stays.
    """
    store = Store(config.run)
    numbers = range(config.first_round, config.rounds.count + 1)
    begun = all(store.exists(f"round={number:02d}/plan.json") for number in numbers)
    preflight.check(config, sources=not begun)
    store.ensure()
    with _sample_world(config, store) as (filled, world):
        loop = _Loop(filled, store, screen, world)
        if dry_run:
            loop.preview()
            return
        loop.describe()
        if retry_failed:
            loop.retry(last_begun=begun)
        with connected(config.engine, _log_file(store)) as board:
            loop.go(board)


def _log_file(store: Store) -> Path:
    """Where Ray's own log lines go: the run folder, or this machine for a remote one."""
    return Path(store.path("logs/ray.log")) if store.is_local else store.cache / "ray.log"


@contextmanager
def _sample_world(config: RunConfig, store: Store) -> Iterator[tuple[RunConfig, str | None]]:
    """The config with the sample world served and filled in, and the world's folder."""
    if config.world is None:
        yield config, None
        return
    folder = Path(store.path("world")) if store.is_local else store.cache / "world"
    build_world(config.world, folder)
    with WorldServer(folder) as server:
        config = substitute(config, folder)
        download = config.download.model_copy(update={"connect_to": server.connect_to})
        yield config.model_copy(update={"download": download}), str(folder)


class _Loop:
    """The rounds of one run, with what every one of them needs at hand."""

    def __init__(self, config: RunConfig, store: Store, screen: Screen, world: str | None) -> None:
        self._config, self._store = config, store
        self._screen, self._world = screen, world
        self._board: Any = None

    def describe(self) -> None:
        """Write run.json: the resolved config and the versions at work."""
        versions = {name: version(name) for name in _VERSIONS}
        document = {
            "config": json.loads(self._config.model_dump_json()),
            "versions": {"capfilt": code_version(), **versions},
            "created": (self._store.read_json("run.json") or {}).get("created", time.time()),
        }
        self._store.write_json("run.json", document)

    def retry(self, last_begun: bool) -> None:
        """Cut what failed into supplementary shards."""
        rows = retry.retry_failed(self._config, self._store)
        when = "; give a larger rounds.count: the rounds asked for have all begun"
        self._screen.note(
            f"{rows} failed rows are tried again in the next round{when if last_begun else ''}"
        )

    def preview(self) -> None:
        """Say what a run would do, and do nothing."""
        published = self._store.record_names()
        cut = self._store.read_records(n for n in published if "/stage=ingest/" in n)
        shards = sum(len(record.payloads) for record in cut)
        found = len(new_files(self._config, cut))
        self._screen.note(f"{shards} shards are cut; {found} source files are new")
        for number in range(self._config.rounds.count + 1):
            plan = self._store.read_json(f"round={number:02d}/plan.json")
            if plan is None:
                self._screen.note(f"round {number}: not begun")
                continue
            names = [name for records in plan["records"].values() for name in records]
            done = sum(name in published for name in names)
            self._screen.note(f"round {number}: {done} of {len(names)} records are published")

    def go(self, board: Any) -> None:
        """All rounds, each resumed or skipped as its records say."""
        self._board = board
        check_training(self._config.engine, resources())
        first = self._config.first_round
        models = self._released() if first == 1 else {}
        inherited: dict[tuple[str, str], str] = {}
        deduped: DatasetTask | None = None
        for number in range(first, self._config.rounds.count + 1):
            self._screen.begin_round(number, "raw pairs" if not models else "bootstrapping")
            plan = self._plan(number, models, inherited, deduped)
            self._round(plan)
            deduped = plan.task("dedup") if models else None
            models = self._gate(plan, models)
            if self._config.rounds.relabel == "new":
                inherited = _labelled(plan)

    def _plan(
        self,
        number: int,
        models: Mapping[str, Model],
        inherited: Mapping[tuple[str, str], str],
        deduped: DatasetTask | None,
    ) -> RoundPlan:
        """The round's plan. Its shards are fixed when it begins: files that arrive later wait
        for the next round, so that a resumed round is the round that was begun."""
        path = f"round={number:02d}/plan.json"
        begun = self._store.read_json(path)
        if begun is None:
            shards = ingest(self._config, self._store)
        else:
            shards = {name: (kind, record) for name, (kind, record) in begun["shards"].items()}
        published = self._store.record_names()

        def planned(forgotten: tuple[str, ...]) -> tuple[RoundPlan, str]:
            config, world = self._config, self._world
            plan = plan_round(config, number, shards, models, world, inherited, deduped, forgotten)
            return plan, gate_record(config, plan, models)

        # A round that is finished stays; any other does without what was forgotten meanwhile.
        plan, gate = planned(tuple((begun or {}).get("tombstones", ())))
        if gate not in published:
            plan, gate = planned(tombstones.names(published))
        self._store.write_json(path, plan.document(gate))
        return plan

    def _round(self, plan: RoundPlan) -> None:
        """Do all of the round that is not yet published."""
        self._board.reset.remote()
        self._label(plan)
        with watched(self._board, self._screen.update):
            for task in plan.curation:
                self._dataset(task)
            self._train(plan)
            for task in plan.measuring:
                self._dataset(task)

    def _label(self, plan: RoundPlan) -> None:
        """The shard stages: download, and in a bootstrapping round caption, filter, embed."""
        self._link(plan)
        jobs = plan.jobs(self._store.record_names())
        for task in plan.shard_tasks:
            todo = sum(task.name in job.todo for job in jobs)
            mine = sum(task.name in job.records for job in jobs)
            self._screen.begin(task.name, total=mine, done=mine - todo)
        with watched(self._board, self._screen.update):
            run_shards(
                self._store,
                plan.shard_tasks,
                lambda: plan.jobs(self._store.record_names()),
                self._board,
            )
        for task in plan.shard_tasks:
            self._screen.end(task.name)

    def _link(self, plan: RoundPlan) -> None:
        """Publish under this round what an earlier round made by the very same work."""
        published = self._store.record_names()
        earlier = {_without_round(name): name for name in sorted(published)}
        for job in plan.jobs(published):
            for stage in job.todo:
                name = job.records[stage]
                same = earlier.get(_without_round(name))
                if same is not None:
                    record = self._store.read_record(same)
                    self._store.publish(record.model_copy(update={"round": plan.number}))

    # ---- models ------------------------------------------------------------------------------

    def _released(self) -> dict[str, Model]:
        """The models that the config gives, measured on the probes as the gate's first holder."""
        config = self._config
        named = {"caption": config.caption.model, "filter": config.filter.model}
        refs = {stage: str(ref) for stage, ref in named.items()}
        # Looked up first: measuring takes long, and a misspelt path must not wait for it.
        embedder = Model(str(config.embed.model), content_of(str(config.embed.model)))
        inputs: dict[str, Published | str] = {
            "captioner": refs["caption"],
            "filter": refs["filter"],
            **probes(config),
        }
        task = dataset_task(EvaluateStage(config.evaluate), config.evaluate, 0, inputs)
        self._screen.begin_round(0, "released models")
        self._dataset(task)
        plan = {"round": 0, "shards": {}, "records": {task.name: [task.record]}}
        self._store.write_json("round=00/plan.json", plan)
        models = {s: Model(ref, content_of(ref), task.record) for s, ref in refs.items()}
        return {**models, "embed": embedder}

    def _gate(self, plan: RoundPlan, holders: Mapping[str, Model]) -> dict[str, Model]:
        """The models of the next round: the new ones, or those that hold their place."""
        trained = {
            "caption": _trained(plan, "finetune_captioner", "captioner"),
            "filter": _trained(plan, "finetune_filter", "filter"),
        }
        self._screen.begin("gate", total=1, done=0)
        decision = decide_and_publish(self._store, self._config, plan, trained, holders)
        verdicts = {"caption": decision.captioner, "filter": decision.filter}
        for stage, verdict in verdicts.items():
            self._screen.note(f"{stage} model {verdict.reason}")
        self._screen.end("gate")
        models = {s: trained[s] if verdicts[s].promoted else holders[s] for s in trained}
        pretrain = plan.task("pretrain").record
        own = Model(made_here(pretrain, "med"), print_of(pretrain))
        if self._config.embed.model is not None:
            own = Model(self._config.embed.model, content_of(self._config.embed.model))
        # Frozen for the whole run, so that old and new embeddings compare.
        return {**models, "embed": holders.get("embed", own)}

    def _dataset(self, task: DatasetTask) -> None:
        done = self._store.exists(task.record)
        self._screen.begin(task.name, total=1, done=int(done))
        run_dataset(self._store, task, self._board)
        self._screen.end(task.name)

    def _train(self, plan: RoundPlan) -> None:
        for task in plan.training:
            self._screen.begin(task.name, total=1, done=int(self._store.exists(task.record)))
        run_training(self._store, plan.training, self._config.engine, self._board)
        for task in plan.training:
            self._screen.end(task.name)


def decide_and_publish(
    store: Store,
    config: RunConfig,
    plan: RoundPlan,
    trained: Mapping[str, Model],
    holders: Mapping[str, Model],
) -> Decision:
    """Let the gate decide on a round's models, once; what it said is read back ever after."""
    started = time.time()
    new, name = plan.task("evaluate").record, gate_record(config, plan, holders)
    if store.exists(name):
        data = json.loads(store.read_bytes(payload(store.read_record(name), "gate.json").path))
        return Decision.model_validate(data["decision"])
    decision = decide(_outcomes(store, new), _holding(store, holders), config.gate, config.seed)
    verdicts = {"caption": decision.captioner, "filter": decision.filter}
    chosen = {s: trained[s] if verdicts[s].promoted else holders[s] for s in trained}
    data = {"decision": decision.model_dump(), "models": {s: m.ref for s, m in chosen.items()}}
    written = store.put_named(
        f"round={plan.number:02d}/stage=gate", "-gate.json", json.dumps(data, indent=1).encode()
    )
    store.publish(
        Record(
            stage="gate",
            stage_version=1,
            round=plan.number,
            shard="all",
            fingerprint=print_of(name),
            payloads=(written,),
            code_version=code_version(),
            started=started,
            finished=time.time(),
        )
    )
    return decision


def gate_record(config: RunConfig, plan: RoundPlan, holders: Mapping[str, Model]) -> str:
    """Name of the record of the gate's decision on the round's models against ``holders``."""
    new = plan.task("evaluate").record
    old = sorted({model.outcomes for model in holders.values() if model.outcomes})
    print_ = fingerprint("gate", 1, config.gate, str(config.seed), *map(print_of, [new, *old]))
    return record_name("gate", plan.number, "all", print_)


def _outcomes(store: Store, evaluate: str) -> pa.Table:
    return store.read_table(payload(store.read_record(evaluate), "outcomes.parquet"))


def _holding(store: Store, holders: Mapping[str, Model]) -> pa.Table | None:
    """The outcomes of the models that hold their place, each from its own evaluation."""
    held = []
    for stage, name in (("caption", "captioner"), ("filter", "filter")):
        model = holders.get(stage)
        if model is not None and model.outcomes is not None:
            table = _outcomes(store, model.outcomes)
            held.append(table.filter(pc.equal(table["model"], name)))
    return pa.concat_tables(held) if held else None


def _trained(plan: RoundPlan, task: str, folder: str) -> Model:
    """A model that the round trained, with the evaluation that measured it."""
    record = plan.task(task).record
    return Model(made_here(record, folder), print_of(record), plan.task("evaluate").record)


def _labelled(plan: RoundPlan) -> dict[tuple[str, str], str]:
    """(stage, shard) → fingerprint of the texts and scores that the round worked with."""
    return {
        (stage, job.shard): print_of(record)
        for job in plan.jobs(set())
        for stage, record in job.records.items()
        if stage in ("caption", "filter")
    }


def _without_round(record: str) -> str:
    """A record's name but for the round it belongs to."""
    return "/".join(part for part in record.split("/") if not part.startswith("round="))
