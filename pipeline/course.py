"""The course of a run: every round planned from the config, the records, and the rounds before it.

Nothing here does work or needs Ray: `rounds` follows the course, `preview` only tells of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from pipeline import tombstones
from pipeline.config import RunConfig
from pipeline.copies import plan_sharing
from pipeline.dag import DatasetTask, Published, made_here, print_of
from pipeline.engine.shard import payload
from pipeline.plan import (
    Model,
    RoundPlan,
    absolute,
    content_of,
    dataset_task,
    plan_round,
    probes,
)
from pipeline.records import fingerprint, record_name
from pipeline.sources import Shards
from pipeline.store import Store
from stages.evaluate import EvaluateStage
from stages.gate import Decision


class Course:
    """Where a run stands between two rounds; `advance` takes it past one."""

    def __init__(self, config: RunConfig, store: Store, world: str | None) -> None:
        self._config, self._store, self._world = config, store, world
        self.models: dict[str, Model] = {}
        """caption, filter and embed, as the next round begins with them; empty for a raw round."""
        self._inherited: dict[tuple[str, str], str] = {}
        self._deduped: DatasetTask | None = None
        self._cohorts: dict[str, frozenset[str]] = {}
        """First shard → all shards that a round brought, in the order of the rounds."""

    def released(self) -> DatasetTask:
        """Begin with the models that the config gives. Returns the task that measures them on the
        probes, as the gate's first holders."""
        config = self._config
        named = {"caption": config.caption.model, "filter": config.filter.model}
        refs = {stage: absolute(str(ref)) for stage, ref in named.items()}
        # Looked up first: measuring takes long, and a misspelt path must not wait for it.
        embedder = _given(str(config.embed.model))
        inputs: dict[str, Published | str] = {
            "captioner": refs["caption"],
            "filter": refs["filter"],
            **probes(config),
        }
        task = dataset_task(EvaluateStage(config.evaluate), config.evaluate, 0, inputs)
        self.models = {s: Model(ref, content_of(ref), task.record) for s, ref in refs.items()}
        self.models["embed"] = embedder
        return task

    def plan(self, number: int, begun: Any, shards: Shards) -> tuple[RoundPlan, str]:
        """The round's plan and the name of its gate's record.

        Args:
            begun: plan.json of the round if it has begun, else None.
            shards: what the round works on.
        """
        published = self._store.record_names()
        self._cohorts |= _newcomers(shards, self._cohorts)

        def planned(forgotten: tuple[str, ...]) -> tuple[RoundPlan, str]:
            given = self._config, number, shards, self.models
            sharing = plan_sharing(*given, tuple(self._cohorts), forgotten, self._store)
            before = self._inherited, self._deduped
            plan = plan_round(*given, self._world, *before, forgotten, sharing)
            return plan, gate_record(self._config, plan, self.models)

        # A round that is finished stays; any other does without what was forgotten meanwhile.
        plan, gate = planned(tuple((begun or {}).get("tombstones", ())))
        if gate not in published:
            plan, gate = planned(tombstones.names(published))
        return plan, gate

    def advance(self, plan: RoundPlan, decision: Decision) -> None:
        """Go past a round: the next one begins with the models that the gate let pass."""
        self._deduped = plan.task("dedup") if self.models else None
        chosen = candidates(plan, self.models, decision)
        # The embedder is frozen for the whole run, so that old and new embeddings compare.
        self.models = {**chosen, "embed": self.models.get("embed", self._embedder(plan))}
        if self._config.rounds.relabel == "new":
            self._inherited = labelled(plan)

    def _embedder(self, plan: RoundPlan) -> Model:
        if self._config.embed.model is not None:
            return _given(self._config.embed.model)
        pretrain = plan.task("pretrain").record
        return Model(made_here(pretrain, "med"), print_of(pretrain))


def _given(ref: str) -> Model:
    """A model that the config names."""
    return Model(absolute(ref), content_of(ref))


def _newcomers(
    shards: Iterable[str], cohorts: Mapping[str, frozenset[str]]
) -> dict[str, frozenset[str]]:
    """The shards that no cohort has yet, as one; its first shard → all of them."""
    new = frozenset(shards).difference(*cohorts.values())
    return {min(new): new} if new else {}


def begun_plan(store: Store, number: int) -> Any:
    """plan.json of a round that has begun, else None. A round 0 without shards has not: released
    models were measured, nothing more."""
    plan = store.read_json(f"round={number:02d}/plan.json")
    return plan if plan is not None and plan.get("shards") else None


def shards_of_plan(begun: Any) -> Shards:
    """The shards that were fixed when the round of that plan.json began."""
    return {name: (kind, record) for name, (kind, record) in begun["shards"].items()}


def candidates(
    plan: RoundPlan, holders: Mapping[str, Model], decision: Decision
) -> dict[str, Model]:
    """Captioner and filter after the gate: those the round trained, or those that hold."""
    trained = {
        "caption": _trained(plan, "finetune_captioner", "captioner"),
        "filter": _trained(plan, "finetune_filter", "filter"),
    }
    verdicts = {"caption": decision.captioner, "filter": decision.filter}
    return {s: trained[s] if verdicts[s].promoted else holders[s] for s in trained}


def gate_record(config: RunConfig, plan: RoundPlan, holders: Mapping[str, Model]) -> str:
    """Name of the record of the gate's decision on the round's models against ``holders``."""
    new = plan.task("evaluate").record
    old = sorted({model.outcomes for model in holders.values() if model.outcomes})
    print_ = fingerprint("gate", 1, config.gate, str(config.seed), *map(print_of, [new, *old]))
    return record_name("gate", plan.number, "all", print_)


def read_decision(store: Store, gate: str) -> Decision:
    """What a gate decided, once its record is published."""
    data = json.loads(store.read_bytes(payload(store.read_record(gate), "gate.json").path))
    return Decision.model_validate(data["decision"])


def without_round(record: str) -> str:
    """A record's name but for the round it belongs to: rounds that do the very same work share
    it."""
    return "/".join(part for part in record.split("/") if not part.startswith("round="))


def _trained(plan: RoundPlan, task: str, folder: str) -> Model:
    """A model that the round trained, with the evaluation that measured it."""
    record = plan.task(task).record
    return Model(made_here(record, folder), print_of(record), plan.task("evaluate").record)


def labelled(plan: RoundPlan) -> dict[tuple[str, str], str]:
    """(stage, shard) → fingerprint of the texts and scores that the round worked with, and of what
    its images shared."""
    return {
        (stage, job.shard): print_of(record)
        for job in plan.jobs(set())
        for stage, record in job.records.items()
        if stage in ("caption", "filter", "shared")
    }
