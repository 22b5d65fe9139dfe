"""``capfilt run … --dry-run``: what a run would do with the config as it is given.

Nothing is written. What records show as done is done; what depends on a decision that is not
made yet, or on files that are not cut yet, is said to be so.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config import RunConfig
from pipeline.course import Course, begun_plan, read_decision, shards_of_plan, without_round
from pipeline.plan import RoundPlan
from pipeline.sources import known_shards, new_files
from pipeline.store import Store


def preview(config: RunConfig, store: Store, world: str | None) -> Iterator[str]:
    """Lines that say what each round still needs.

    Args:
        world: folder of the sample world, if there is one.
    """
    published = store.record_names()
    cut = store.read_records(name for name in published if "/stage=ingest/" in name)
    waiting = len(new_files(config, cut))
    known = known_shards(cut)
    yield f"{len(known)} shards are cut; {waiting} source files are new"
    course = Course(config, store, world)
    if config.first_round == 1 and course.released().record not in published:
        yield "released models: to be measured on the probes"
    for number in range(config.first_round, config.rounds.count + 1):
        begun = begun_plan(store, number)
        more = begun is None and waiting > 0
        shards = known if begun is None else shards_of_plan(begun)
        if not shards:
            yield from _unknown(config, number, "once its sources are cut")
            return
        plan, gate = course.plan(number, begun, shards)
        todo = ", ".join(_todo(plan, gate, published))
        files = f"; and all of the shards of {waiting} new files" if more else ""
        yield f"round {number}: {f'to do: {todo}{files}' if todo or more else 'nothing to do'}"
        if gate not in published or more:
            yield from _unknown(config, number + 1, f"with the models of round {number}")
            return
        course.advance(plan, read_decision(store, gate))


def _unknown(config: RunConfig, first: int, why: str) -> Iterator[str]:
    """Rounds that cannot be named yet."""
    for number in range(first, config.rounds.count + 1):
        yield f"round {number}: all of it, {why}"


def _todo(plan: RoundPlan, gate: str, published: set[str]) -> Iterator[str]:
    """Stages that lack a record, in order; of shard stages how many shards."""
    earlier = {without_round(name) for name in published}
    jobs = plan.jobs(published)
    for task in plan.shard_tasks:
        mine = [job.records[task.name] for job in jobs if task.name in job.records]
        left = sum(without_round(record) not in earlier for record in mine)
        if left:
            yield f"{task.name} {left} of {len(mine)} shards"
    for whole in plan.tasks:
        if whole.record not in published:
            yield whole.name
    if gate not in published:
        yield "gate"
