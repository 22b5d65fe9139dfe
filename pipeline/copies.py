"""Which images of a round share one captioning: found once all are downloaded, told by shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.config import RunConfig
from pipeline.dag import BEFORE_COPIES, DatasetTask, Published, plan_shards
from pipeline.plan import Model, Sharing, dataset_task, model_tasks
from pipeline.records import Record
from pipeline.store import Store
from stages.dedup import CopiesStage


def plan_sharing(
    config: RunConfig,
    number: int,
    shards: Mapping[str, tuple[str, str]],
    models: Mapping[str, Model],
    cohorts: Sequence[str],
    tombstones: tuple[str, ...],
    store: Store,
) -> Sharing:
    """What round ``number`` shares, as far as it is published. ``cohorts``: the first shard of
    each round that brought new ones; the other arguments are `pipeline.plan.plan_round`'s."""
    if not models or config.dedup.before_caption == "off":
        return Sharing()
    tasks = [task for task in model_tasks(config, number, models) if task.name in BEFORE_COPIES]
    web = {shard: source for shard, source in shards.items() if source[0] == "web"}
    jobs = plan_shards(tasks, web, set(), {})
    sharing = config.dedup.sharing(cohorts)

    def made_by(stage: str) -> Published:
        return Published(tuple(job.records[stage] for job in jobs), "*.parquet")

    inputs: dict[str, Published | str] = {"download": made_by("download")}
    if sharing.perceptual_distance is not None:
        inputs["embeddings"] = made_by("embed")
    if tombstones:
        inputs["tombstones"] = Published(tombstones, "*.parquet")
    task = dataset_task(CopiesStage(sharing, sorted(web)), sharing, number, inputs)
    if not store.exists(task.record):
        return Sharing(task)
    return Sharing(task, {record.shard: record.name for record in _by_shard(store, task)})


def link(store: Store, sharing: Sharing) -> None:
    """Publish what concerns a shard under its own name, where it is not yet; a run may have been
    killed before it did."""
    if sharing.copies is None or not sharing.shared:
        return
    missing = set(sharing.shared.values()) - store.record_names()
    if missing:
        store.publish_all(r for r in _by_shard(store, sharing.copies) if r.name in missing)


def _by_shard(store: Store, task: DatasetTask) -> list[Record]:
    """The records of their own that the shards have, or will have: each hangs on nothing but what
    its images share, whatever else the round holds."""
    whole = store.read_record(task.record)
    found = []
    for payload in whole.payloads:
        shard, dash, print_ = payload.path.rpartition("shard=")[2].partition("-")
        if dash:
            changes = {
                "stage": "shared",
                "round": None,
                "shard": shard,
                "fingerprint": print_.removesuffix(".parquet"),
                "payloads": (payload,),
            }
            found.append(whole.model_copy(update=changes))
    return found
