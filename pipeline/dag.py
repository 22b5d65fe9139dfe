"""The stage graph: what reads what, how a stage is built, and the fingerprint of every work.

    sources ─ download ┬─ embed ─ dedup ─────────────┐
                       ├─ copies ─ caption ─ filter ─┼─ select ─ assemble ─ training ─ evaluate
                       └─────────────────────────────┘

Shard stages (download, embed, caption, filter) take one shard at a time; the others a whole round.
Copies finds images that share one captioning; what concerns a shard is published as a record of
that shard, ``shared``, so that its captions hang on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import RunConfig
from pipeline.records import fingerprint, record_name
from stages.base import Config, DatasetStage, Resources, ShardStage
from stages.caption import CaptionStage
from stages.download import DownloadStage
from stages.embed import EmbedStage
from stages.filter import FilterStage
from stages.schemas import IMAGES, IMAGES_WITH_TEXTS, SHARED

SHARD_READS: Mapping[str, tuple[str, ...]] = {
    "download": ("sources",),
    "embed": ("download",),
    "caption": ("download", "shared"),
    "filter": ("download", "caption", "shared"),
}
"""Shard stages in the order in which a shard passes them, with what each reads. A shard whose
images share nothing has no ``shared``."""

WHOLE_ROUND_READS: Mapping[str, tuple[str, ...]] = {
    "copies": ("download",),  # and embed, where that is configured
    "dedup": ("download", "embed"),
    "select": ("sources", "download", "caption", "filter", "dedup"),
    "assemble": ("select", "download"),
    "ledger": ("sources", "download", "caption", "select", "assemble"),
    "pretrain": ("assemble",),
    "finetune_captioner": ("pretrain", "assemble"),
    "finetune_filter": ("pretrain", "assemble"),
    "evaluate": ("pretrain", "finetune_captioner", "finetune_filter"),
    "audit": ("select", "download", "dedup"),
    "gate": ("evaluate",),
}
"""Whole-round stages with what each reads of its own round; a raw round lacks some of that."""

BEFORE_COPIES = ("download", "embed")
"""Shard stages that every shard has passed before it is known which images share captions."""

OF_THE_RUN = frozenset({"sources", "download", "embed"})
"""Stages whose output belongs to the run: made once, used by every round."""

SHARD_STAGES: Mapping[str, type[ShardStage]] = {
    "download": DownloadStage,
    "embed": EmbedStage,
    "caption": CaptionStage,
    "filter": FilterStage,
}


@dataclass(frozen=True)
class ShardTask:
    """One shard stage of one round, as any worker can build it."""

    name: str
    round: int
    config: Config
    model: str | None = None
    """Hub id, folder, or `made_here` for weights of the run itself."""
    weights: str = ""
    """Hash of the weights; empty for stages without a model."""
    of_human: bool = False
    """Whether shards of human pairs pass the stage. These are trusted: fetched, never captioned,
    filtered or deduplicated, and embedded only to be compared with evaluation sets."""

    @property
    def scope(self) -> int | None:
        """The round that the output belongs to, or None for the run."""
        return None if self.name in OF_THE_RUN else self.round

    def build(self, model: str | None) -> ShardStage:
        """The stage itself; ``model`` is a path or hub id that this worker can open."""
        config = self.config if model is None else self.config.model_copy(update={"model": model})
        return SHARD_STAGES[self.name](config)  # type: ignore[call-arg]

    def fingerprint(self, inputs: Iterable[str]) -> str:
        """Of this stage over inputs with the given fingerprints."""
        version = SHARD_STAGES[self.name].version
        return fingerprint(self.name, version, self.config, self.weights, *inputs)


@dataclass(frozen=True)
class ShardJob:
    """What one shard still needs, and where everything of it is published or will be."""

    shard: str
    records: Mapping[str, str]
    """Stage → record name; ``sources`` among them."""
    todo: tuple[str, ...]
    """Stages without a record yet, in order."""


@dataclass(frozen=True)
class Published:
    """Files that records publish (or will, by the time the work begins)."""

    records: tuple[str, ...]
    """Record names, in the order of their shards."""
    pattern: str
    """Which of their payloads, as a shell pattern over the path."""
    in_turn: bool = False
    """The stage reads one after the other: only one need lie on its machine."""


_ONE_CPU = Resources()


@dataclass(frozen=True)
class DatasetTask:
    """One whole-round stage and where its inputs are found."""

    stage: DatasetStage
    round: int
    fingerprint: str
    folder: str
    """Where its payloads go, relative to the run folder."""
    inputs: Mapping[str, Published | str]
    """Input name → published files, or a folder: path, hub id or `made_here`."""
    resources: Resources = _ONE_CPU
    """Of its one worker; training has those of `EngineConfig`."""

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def record(self) -> str:
        return record_name(self.name, self.round, "all", self.fingerprint)

    @property
    def reads(self) -> list[str]:
        """The records of whole-round stages that it reads, sorted; shards have too many to name."""
        names: set[str] = set()
        for source in self.inputs.values():
            if isinstance(source, Published):
                names.update(source.records)
            elif source.startswith(MADE_HERE):
                names.add(source.removeprefix(MADE_HERE).partition("#")[0])
        return sorted(name for name in names if "/all-" in name)


def needed_by(stage: str) -> frozenset[str]:
    """The stages whose fingerprints that of ``stage`` covers: without their records in the same
    plan, it cannot have been done. Copies is none: captions hang on what it found, not on it."""
    reads = {**SHARD_READS, **WHOLE_ROUND_READS}.get(stage, ())
    return frozenset(reads).union(*map(needed_by, reads))


def print_of(record: str) -> str:
    """The fingerprint in a record's name."""
    return record.rpartition("-")[2].removesuffix(".json")


MADE_HERE = "record:"


def made_here(record: str, folder: str) -> str:
    """Names a model folder that the run itself publishes under ``record``."""
    return f"{MADE_HERE}{record}#{folder}"


def plan_shards(
    tasks: Sequence[ShardTask],
    shards: Mapping[str, tuple[str, str]],
    published: set[str],
    inherited: Mapping[tuple[str, str], str],
    shared: Mapping[str, str] | None = MappingProxyType({}),
) -> list[ShardJob]:
    """What every shard needs, from names alone.

    Args:
        tasks: the shard stages of the round, in graph order.
        shards: shard → (its kind, web or human; name of its source record).
        published: names of all records.
        inherited: (stage, shard) → fingerprint that the round takes over from an earlier one
            as it is, whatever the weights are now (``rounds.relabel: new``), as long as the
            shard's images share what they shared then.
        shared: shard → record of what its images share with others, where they do; None before
            it is known.
    """
    return [
        _plan_shard(tasks, shard, shards[shard], published, inherited, shared)
        for shard in sorted(shards)
    ]


def _plan_shard(
    tasks: Sequence[ShardTask],
    shard: str,
    source: tuple[str, str],
    published: set[str],
    inherited: Mapping[tuple[str, str], str],
    shared: Mapping[str, str] | None,
) -> ShardJob:
    kind, source_record = source
    records = {"sources": source_record}
    if shared is not None and shard in shared:
        records["shared"] = shared[shard]
    prints = {name: print_of(record) for name, record in records.items()}
    as_before = shared is None or inherited.get(("shared", shard)) == prints.get("shared")
    todo = []
    for task in tasks:
        if kind == "human" and not task.of_human:
            continue
        print_ = inherited.get((task.name, shard)) if as_before else None
        prints[task.name] = print_ or task.fingerprint(
            prints[read] for read in SHARD_READS[task.name] if read in prints
        )
        records[task.name] = record_name(task.name, task.scope, shard, prints[task.name])
        if records[task.name] not in published:
            todo.append(task.name)
    return ShardJob(shard, records, tuple(todo))


def stage_input(name: str, tables: Mapping[str, pa.Table]) -> pa.Table:
    """The input table of a shard stage, composed from the outputs it reads."""
    if name == "download":
        return tables["sources"]
    images = _images(tables["download"])
    if name == "embed":
        return images
    shared = tables.get("shared", SHARED.empty_table())
    here = shared.filter(pc.is_null(shared["text"]))
    if name == "caption":
        return _without(images, here)
    images = _without(images, here.filter(pc.is_valid(here["scored_with"])))
    return _with_texts(images, tables["download"], tables["caption"], shared)


def _images(download: pa.Table) -> pa.Table:
    """One row an image that was fetched."""
    return download.filter(pc.is_valid(download["image"])).select(IMAGES.names).cast(IMAGES)


def _without(images: pa.Table, shared: pa.Table) -> pa.Table:
    """The images but for those that ``shared`` names."""
    spared = shared["sample_id"].combine_chunks()
    return images.filter(pc.invert(pc.is_in(images["sample_id"], value_set=spared)))


def _with_texts(
    images: pa.Table, download: pa.Table, captions: pa.Table, shared: pa.Table
) -> pa.Table:
    """Images with their distinct web texts, their synthetic ones, then those of their copies."""
    texts: dict[str, dict[tuple[str, str, str], None]] = {}
    for sample, text, status in _columns(download, "sample_id", "text", "status"):
        if status == "success":
            texts.setdefault(sample, {})[sample, "web", text or ""] = None
    for sample, text, status in _columns(captions, "sample_id", "text", "status"):
        if status == "success":
            texts.setdefault(sample, {})[sample, "synthetic", text] = None
    for sample, text, image in _columns(shared, "sample_id", "text", "scored_with"):
        if text is not None:
            texts.setdefault(image, {})[sample, "web", text] = None
    found = [list(texts.get(sample, ())) for sample in images["sample_id"].to_pylist()]
    return pa.table(
        {
            **{name: images[name] for name in IMAGES.names},
            "owners": [[owner for owner, _, _ in pairs] for pairs in found],
            "sources": [[source for _, source, _ in pairs] for pairs in found],
            "texts": [[text for _, _, text in pairs] for pairs in found],
        },
        schema=IMAGES_WITH_TEXTS,
    )


def _columns(table: pa.Table, *names: str) -> Iterable[tuple[str, ...]]:
    return zip(*(table[name].to_pylist() for name in names), strict=True)


def shard_tasks(
    config: RunConfig, round_: int, model_of: Callable[[str], tuple[str, str]], raw: bool
) -> list[ShardTask]:
    """The shard stages of a round. ``model_of(stage)`` gives (model, weights hash).

    A raw round (round 0) only downloads: it trains the first models on the pairs as they came.
    """
    tasks = [ShardTask("download", round_, config.download, of_human=True)]
    if not raw:
        configs: dict[str, Config] = {
            "embed": config.embed,
            "caption": config.caption,
            "filter": config.filter,
        }
        for name, stage_config in configs.items():
            model, weights = model_of(name)
            compared = name == "embed" and bool(
                config.dedup.evaluation or config.dev or config.test
            )
            tasks.append(ShardTask(name, round_, stage_config, model, weights, compared))
    return tasks
