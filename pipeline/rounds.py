"""The loop: ingest, then round after round of curation, training and the gate.

`run` is the whole program behind ``capfilt run``. Everything it does is published by records, so
running it again after any kind of end goes on where records stop.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import copies, preflight, retry
from pipeline.config import RunConfig, substitute
from pipeline.course import (
    Course,
    begun_plan,
    candidates,
    read_decision,
    shards_of_plan,
    without_round,
)
from pipeline.dag import BEFORE_COPIES, DatasetTask, print_of
from pipeline.engine import placement
from pipeline.engine.board import watched
from pipeline.engine.cluster import connected, log_file, look
from pipeline.engine.data import run_shards
from pipeline.engine.dataset import run_dataset
from pipeline.engine.shard import payload
from pipeline.engine.spread import SPREAD
from pipeline.engine.train import run_training
from pipeline.forget import catch_up
from pipeline.lease import held
from pipeline.plan import Model, RoundPlan
from pipeline.preview import preview
from pipeline.progress import Screen
from pipeline.records import Record
from pipeline.sources import ingest
from pipeline.store import Store
from pipeline.version import code_version
from stages.gate import Decision, decide
from stages.scenes.server import WorldServer
from stages.scenes.world import build_world

_LINKED = 1000
"""Records of an earlier round that are held at once while they are published under this one."""
_VERSIONS = ("ray", "torch", "transformers", "img2dataset", "pyarrow")


def run(
    config: RunConfig, screen: Screen, dry_run: bool = False, retry_failed: bool = False
) -> None:
    """Bring the run folder to the state that ``config`` asks for. With ``retry_failed``, rows that
    failed for reasons that may have passed are cut into shards for the next round to begin. With
    ``dry_run``, only say what would be done.

    Raises:
        UserError: something in the config, a source or a model cannot be used, or another driver
            holds the run.
        RunError: the run cannot go on; what is published stays.
    """
    if not dry_run:
        check_places(config)
    store = Store(config.run)
    numbers = range(config.first_round, config.rounds.count + 1)
    begun = all(begun_plan(store, number) is not None for number in numbers)
    preflight.check(config, sources=not begun)
    if dry_run:
        with _world_at_hand(config, store) as (filled, world):
            for line in preview(filled, store, world):
                screen.note(line)
        return
    with opened(config, screen) as (filled, store, world):
        if retry_failed:
            rows = retry.retry_failed(filled, store)
            more = "; give a larger rounds.count: the rounds asked for have all begun"
            screen.note(
                f"{rows} failed rows are tried again in the next round{more if begun else ''}"
            )
        go_round(filled, store, screen, world)


def check_places(config: RunConfig) -> None:
    """Refuse a run folder that cannot be reached, and a cluster (or, for a local Ray, a machine)
    that is not there or too small, before models are fetched and opened and before the lease
    is waited for.

    Raises:
        StoreError: the run folder cannot be read.
        ConfigError, RunError: as `look` and `placement.check`.
    """
    # A listing: to that a store says why it refuses, as it does not where one file is looked for.
    Store(config.run).files("leases")
    placement.check(config, look(config.engine))


@contextmanager
def opened(config: RunConfig, screen: Screen) -> Iterator[tuple[RunConfig, Store, str | None]]:
    """Inside, this process alone drives the run. Yields the config with the sample world filled
    in, the run folder under our lease, and the world's folder.

    Raises:
        LeaseHeldError: another driver is at work.
        LeaseLostError: another driver has taken over.
    """
    unfenced = Store(config.run)
    unfenced.ensure()
    with (
        held(unfenced, screen.note) as store,
        sample_world(config, store) as (filled, world),
    ):
        store.remove(SPREAD)  # what drivers that were killed have left
        catch_up(store)
        yield filled, store, world


def go_round(config: RunConfig, store: Store, screen: Screen, world: str | None) -> None:
    """Do all that the rounds up to ``rounds.count`` still need; called inside `opened`."""
    loop = _Loop(config, store, screen, world)
    loop.describe()
    with connected(config.engine, log_file(store), screen.note) as board:
        loop.go(board)


@contextmanager
def sample_world(config: RunConfig, store: Store) -> Iterator[tuple[RunConfig, str | None]]:
    """The config with the sample world served and filled in, and the world's folder."""
    if config.world is None:
        yield config, None
        return
    folder = _world_folder(store)
    build_world(config.world, folder)
    with WorldServer(folder) as server:
        config = substitute(config, folder)
        download = config.download.model_copy(update={"connect_to": server.connect_to})
        yield config.model_copy(update={"download": download}), str(folder)


@contextmanager
def _world_at_hand(config: RunConfig, store: Store) -> Iterator[tuple[RunConfig, str | None]]:
    """As `sample_world`, but nothing is served, and a world that was not built yet is gone
    again afterwards."""
    if config.world is None:
        yield config, None
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = _world_folder(store)
        if not folder.exists():
            folder = Path(scratch) / "world"
        build_world(config.world, folder)
        yield substitute(config, folder), str(folder)


def _world_folder(store: Store) -> Path:
    return Path(store.path("world")) if store.is_local else store.cache / "world"


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

    def go(self, board: Any) -> None:
        """All rounds, each resumed or skipped as its records say."""
        self._board = board
        placement.check(self._config, placement.nodes())
        course = Course(self._config, self._store, self._world)
        first = self._config.first_round
        if first == 1:
            self._measure_released(course.released())
        for number in range(first, self._config.rounds.count + 1):
            raw = not course.models
            self._screen.begin_round(number, "raw pairs" if raw else "bootstrapping")
            plan, gate = self._plan(course, number)
            while plan.sharing.copies is not None and plan.sharing.shared is None:
                self._label(plan, BEFORE_COPIES)
                with watched(self._board, self._screen.update):
                    self._dataset(plan.sharing.copies)
                plan, gate = self._plan(course, number)
            self._round(plan)
            course.advance(plan, self._gate(plan, gate, course.models))

    def _plan(self, course: Course, number: int) -> tuple[RoundPlan, str]:
        """The round's plan. Its shards are fixed when it begins: files that arrive later wait
        for the next round, so that a resumed round is the round that was begun."""
        begun = begun_plan(self._store, number)
        if begun is None:
            catch_up(self._store)  # with what the round before has downloaded
        shards = ingest(self._config, self._store) if begun is None else shards_of_plan(begun)
        plan, gate = course.plan(number, begun, shards)
        document = plan.document(gate)
        if document != begun:
            self._store.write_json(f"round={number:02d}/plan.json", document)
        return plan, gate

    def _round(self, plan: RoundPlan) -> None:
        """Do all of the round that is not yet published."""
        copies.link(self._store, plan.sharing)
        self._label(plan, [task.name for task in plan.shard_tasks])
        with watched(self._board, self._screen.update):
            for task in plan.curation:
                self._dataset(task)
            self._train(plan)
            for task in plan.measuring:
                self._dataset(task)

    def _label(self, plan: RoundPlan, stages: Sequence[str]) -> None:
        """The shard stages: download, and in a bootstrapping round embed, caption, filter."""
        # What a pass before this one has counted, the records now tell.
        self._board.reset.remote()
        self._link(plan)
        jobs = plan.jobs(self._store.record_names())
        for task in plan.shard_tasks:
            if task.name not in stages:
                continue
            todo = sum(task.name in job.todo for job in jobs)
            mine = sum(task.name in job.records for job in jobs)
            self._screen.begin(task.name, total=mine, done=mine - todo)
        with watched(self._board, self._screen.update):
            run_shards(
                self._store,
                plan.shard_tasks,
                lambda: plan.jobs(self._store.record_names()),
                self._board,
                self._config.engine.grows_to,
            )
        for name in stages:
            self._screen.end(name)

    def _link(self, plan: RoundPlan) -> None:
        """Publish under this round what an earlier round made by the very same work."""
        published = self._store.record_names()
        earlier = {without_round(name): name for name in sorted(published)}
        wanted = [job.records[stage] for job in plan.jobs(published) for stage in job.todo]
        same = (earlier[short] for name in wanted if (short := without_round(name)) in earlier)
        while some := set(islice(same, _LINKED)):
            found = self._store.read_records(some)
            self._store.publish_all(r.model_copy(update={"round": plan.number}) for r in found)

    # ---- models ------------------------------------------------------------------------------

    def _measure_released(self, task: DatasetTask) -> None:
        """Evaluate the models that the config gives."""
        self._screen.begin_round(0, "released models")
        with watched(self._board, self._screen.update):
            self._dataset(task)
        plan = {"round": 0, "shards": {}, "records": {task.name: [task.record]}}
        self._store.write_json("round=00/plan.json", plan)

    def _gate(self, plan: RoundPlan, gate: str, holders: Mapping[str, Model]) -> Decision:
        """Which of the round's models are promoted."""
        self._screen.begin("gate", total=1, done=0)
        decision = decide_and_publish(self._store, self._config, plan, gate, holders)
        for stage, verdict in (("caption", decision.captioner), ("filter", decision.filter)):
            self._screen.note(f"{stage} model {verdict.reason}")
        self._screen.end("gate")
        return decision

    def _dataset(self, task: DatasetTask) -> None:
        done = self._store.exists(task.record)
        self._screen.begin(task.name, total=1, done=int(done))
        run_dataset(self._store, task, self._board, self._config.engine.grows_to)
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
    name: str,
    holders: Mapping[str, Model],
) -> Decision:
    """Let the gate decide on a round's models, once; what it said is read back ever after.
    ``name`` is that of its record."""
    started = time.time()
    if store.exists(name):
        return read_decision(store, name)
    outcomes = _outcomes(store, plan.task("evaluate").record)
    decision = decide(outcomes, _holding(store, holders), config.gate, config.seed)
    chosen = candidates(plan, holders, decision)
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
