"""One round, named before any of it is done: every task with its inputs and fingerprint.

A fingerprint chains: it covers the fingerprints of the records a task reads. So the whole plan,
down to the evaluation, follows from the config and the models that the round starts with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import fsspec

from pipeline.config import RunConfig
from pipeline.dag import (
    BEFORE_COPIES,
    MADE_HERE,
    DatasetTask,
    Published,
    ShardJob,
    ShardTask,
    made_here,
    plan_shards,
    print_of,
    shard_tasks,
)
from pipeline.ledger import LedgerStage
from pipeline.records import fingerprint
from stages.assemble import AssembleStage
from stages.base import Config, DatasetStage, Resources, WholeRoundConfig
from stages.dedup import EVALUATION, DedupStage
from stages.errors import SourceError
from stages.evaluate import EvaluateStage
from stages.finetune import CaptionerFinetune, FilterFinetune
from stages.ingest import find_files
from stages.pretrain import PretrainStage
from stages.probes import ANNOTATIONS
from stages.scenes.stage import AuditStage
from stages.select import SelectConfig, SelectStage


@dataclass(frozen=True)
class Model:
    """A captioner, filter or embedder that a round works with."""

    ref: str
    """Folder, hub id, or `made_here`."""
    weights: str
    """What stands for its content in fingerprints."""
    outcomes: str | None = None
    """Record of the evaluation that measured it; None for the embedder."""


_NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Sharing:
    """Which images of a round share one captioning and one scoring."""

    copies: DatasetTask | None = None
    """What finds out; None where nothing is shared."""
    shared: Mapping[str, str] | None = None
    """Shard → record of what concerns it, where anything does; None before it is known."""


@dataclass(frozen=True)
class RoundPlan:
    """The work of one round."""

    number: int
    shards: Mapping[str, tuple[str, str]]
    """Shard → (web or human, name of its source record)."""
    shard_tasks: tuple[ShardTask, ...]
    inherited: Mapping[tuple[str, str], str]
    curation: tuple[DatasetTask, ...]
    """dedup, select, ledger, assemble: in order, each in a worker of its own."""
    training: tuple[DatasetTask, ...]
    """pretrain and both fine-tunings: in one worker group."""
    measuring: tuple[DatasetTask, ...]
    """evaluate and, where the truth is known, audit."""
    tombstones: tuple[str, ...] = ()
    """Records of the samples that it does without."""
    sharing: Sharing = Sharing()

    def jobs(self, published: set[str]) -> list[ShardJob]:
        """What each shard still needs, given the names of all records; while it is not known which
        images share captions, only what comes before."""
        shared = self.sharing.shared
        if self.sharing.copies is None and shared is None:
            shared = _NOTHING
        jobs = plan_shards(self.shard_tasks, self.shards, published, self.inherited, shared)
        if shared is not None:
            return jobs
        return [
            replace(job, todo=tuple(stage for stage in job.todo if stage in BEFORE_COPIES))
            for job in jobs
        ]

    @property
    def tasks(self) -> tuple[DatasetTask, ...]:
        copies = self.sharing.copies
        known = () if copies is None else (copies,)
        return (*known, *self.curation, *self.training, *self.measuring)

    def task(self, name: str) -> DatasetTask:
        return next(task for task in self.tasks if task.name == name)

    def document(self, gate: str) -> dict[str, object]:
        """What plan.json holds: for every stage the records that are or will be its output.
        ``gate`` is the name of the gate's."""
        records: dict[str, list[str]] = {task.name: [] for task in self.shard_tasks}
        for job in self.jobs(set()):
            for stage, record in job.records.items():
                if stage in records:
                    records[stage].append(record)
        records.update({task.name: [task.record] for task in self.tasks})
        records["gate"] = [gate]
        return {
            "round": self.number,
            "shards": {shard: list(source) for shard, source in self.shards.items()},
            "records": records,
            "tombstones": list(self.tombstones),
        }


def plan_round(
    config: RunConfig,
    number: int,
    shards: Mapping[str, tuple[str, str]],
    models: Mapping[str, Model],
    world: str | None,
    inherited: Mapping[tuple[str, str], str],
    earlier: DatasetTask | None = None,
    tombstones: tuple[str, ...] = (),
    sharing: Sharing = Sharing(),
) -> RoundPlan:
    """The plan of round ``number``.

    Args:
        models: caption, filter and embed; empty for a raw round, which trains the first models on
            the pairs as they came.
        world: folder of the sample world, whose truth the round is held against.
        inherited: see `pipeline.dag.plan_shards`.
        earlier: the dedup of the round before, if it had one.
        tombstones: records of samples that must not be used.
        sharing: which images share captions, from `pipeline.copies`.
    """
    tasks = model_tasks(config, number, models)
    return _Planner(
        config, number, shards, tasks, inherited, world, earlier, tombstones, sharing
    ).plan()


def model_tasks(config: RunConfig, number: int, models: Mapping[str, Model]) -> list[ShardTask]:
    """The shard stages of round ``number`` with these models."""
    return shard_tasks(config, number, lambda s: (models[s].ref, models[s].weights), not models)


class _Planner:
    def __init__(
        self,
        config: RunConfig,
        number: int,
        shards: Mapping[str, tuple[str, str]],
        tasks: Sequence[ShardTask],
        inherited: Mapping[tuple[str, str], str],
        world: str | None,
        earlier: DatasetTask | None,
        tombstones: tuple[str, ...],
        sharing: Sharing,
    ) -> None:
        self._config, self._number, self._shards = config, number, shards
        self._tasks, self._inherited, self._world = tasks, inherited, world
        self._earlier, self._tombstones, self._sharing = earlier, tombstones, sharing
        self._raw = len(tasks) == 1
        # Nothing is scored in a raw round, so no threshold may reach its fingerprints: a new one
        # must not train the first models again.
        raw = SelectConfig(resources=config.select.resources)
        self._select = raw if self._raw else config.select
        self._records: dict[str, list[str]] = {}
        for job in plan_shards(tasks, shards, set(), inherited, sharing.shared or _NOTHING):
            for stage, record in job.records.items():
                self._records.setdefault(stage, []).append(record)

    def plan(self) -> RoundPlan:
        curation = self._curation()
        training = self._training(curation[-2])
        return RoundPlan(
            self._number,
            self._shards,
            tuple(self._tasks),
            self._inherited,
            curation,
            training,
            self._measuring(curation, training),
            self._tombstones,
            self._sharing,
        )

    def _curation(self) -> tuple[DatasetTask, ...]:
        config, names = self._config, sorted(self._shards)
        tables = {name: self._tables(name) for name in ("sources", "download")}
        done = []
        if not self._raw:
            done.append(self._dedup(tables["download"]))
            tables["captions"] = self._tables("caption")
            tables["scores"] = self._tables("filter")
            tables["clusters"] = _output(done[0], "*/clusters.parquet")
            tables["contaminated"] = _output(done[0], "*/contaminated.parquet")
        if self._tombstones:
            tables["tombstones"] = Published(self._tombstones, "*.parquet")
        select = self._task(SelectStage(self._select, names), self._select, tables)
        pairs = _output(select, "*/pairs.parquet")
        images = Published(tuple(self._records["download"]), "*.tar", in_turn=True)
        assemble = self._task(
            AssembleStage(config.assemble, names),
            config.assemble,
            {"pairs": pairs, "images": images},
            folder="dataset",
        )
        books = {
            "sources": tables["sources"],
            "download": tables["download"],
            "captions": self._tables("caption"),
            "rows": _output(select, "*/rows.parquet"),
            "pairs": pairs,
            "index": _output(assemble, "*/index.parquet"),
        }
        ledger = self._task(LedgerStage(), None, books)
        return (*done, select, assemble, replace(ledger, resources=config.select.resources))

    def _dedup(self, download: Published) -> DatasetTask:
        config = self._config
        inputs: dict[str, Published | str] = {
            "download": download,
            "embeddings": self._tables("embed"),
            **{f"{EVALUATION}{name}": path for name, path in evaluation_sets(config).items()},
        }
        embedder = next(task.model for task in self._tasks if task.name == "embed")
        if embedder is not None and len(inputs) > 2:
            inputs["embedder"] = absolute(embedder)
        if self._earlier is not None:
            inputs["earlier"] = _output(self._earlier, "*/clusters.parquet")
        return self._task(DedupStage(config.dedup, config.download), config.dedup, inputs)

    def _training(self, assemble: DatasetTask) -> tuple[DatasetTask, ...]:
        config = self._config
        start: dict[str, Published | str] = {
            "train": _output(assemble, "*.tar"),
            "tokenizer": absolute(config.pretrain.tokenizer),
        }
        inits = {
            "init": config.pretrain.init,
            "init_vision": config.pretrain.init_vision,
            "init_text": config.pretrain.init_text,
        }
        start |= {name: absolute(ref) for name, ref in inits.items() if ref is not None}
        pretrain = self._task(
            PretrainStage(config.pretrain), config.pretrain, start, folder="models"
        )
        med = made_here(pretrain.record, "med")
        human = _output(assemble, "*/human-*.tar")
        finetune = config.finetune
        inputs: dict[str, Published | str] = {"med": med, "train": human}
        return (
            pretrain,
            self._task(
                CaptionerFinetune(finetune.captioner), finetune.captioner, inputs, folder="models"
            ),
            self._task(FilterFinetune(finetune.filter), finetune.filter, inputs, folder="models"),
        )

    def _measuring(
        self, curation: Sequence[DatasetTask], training: Sequence[DatasetTask]
    ) -> tuple[DatasetTask, ...]:
        config = self._config
        pretrain, captioner, filter_ = training
        inputs: dict[str, Published | str] = {
            "med": made_here(pretrain.record, "med"),
            "captioner": made_here(captioner.record, "captioner"),
            "filter": made_here(filter_.record, "filter"),
            **probes(config),
        }
        tasks = [self._task(EvaluateStage(config.evaluate), config.evaluate, inputs)]
        if self._world is not None:
            select = next(t for t in curation if t.name == "select")
            truth: dict[str, Published | str] = {
                "world": self._world,
                "pairs": _output(select, "*/pairs.parquet"),
                "download": self._tables("download"),
            }
            if not self._raw:
                truth["clusters"] = _output(curation[0], "*/clusters.parquet")
            tasks.append(self._task(AuditStage(self._select), self._select, truth))
        return tuple(tasks)

    def _tables(self, stage: str) -> Published:
        return Published(tuple(self._records.get(stage, ())), "*.parquet")

    def _task(
        self,
        stage: DatasetStage,
        config: Config | None,
        inputs: Mapping[str, Published | str],
        folder: str | None = None,
    ) -> DatasetTask:
        return dataset_task(stage, config, self._number, inputs, folder)


def dataset_task(
    stage: DatasetStage,
    config: Config | None,
    round_: int,
    inputs: Mapping[str, Published | str],
    folder: str | None = None,
) -> DatasetTask:
    """A task with its fingerprint, whose payloads go to ``folder`` of the round."""
    prints = [f"{name}={part}" for name in sorted(inputs) for part in _prints(inputs[name])]
    return DatasetTask(
        stage,
        round_,
        fingerprint(stage.name, stage.version, config, *prints),
        f"round={round_:02d}/{folder or f'stage={stage.name}'}",
        inputs,
        config.resources if isinstance(config, WholeRoundConfig) else Resources(),
    )


def probes(config: RunConfig) -> dict[str, Published | str]:
    """The probe folders that are given, by split; by their full paths, see `absolute`.

    Raises:
        SourceError: one is not there. It is no hub id, and is read only after training.
    """
    given: dict[str, Published | str] = {}
    for split, folder in (("dev", config.dev), ("test", config.test)):
        if folder is None:
            continue
        if not (Path(folder) / ANNOTATIONS).is_file():
            raise SourceError(f"{split}: {folder}: no {ANNOTATIONS} in it; give a probe folder")
        given[split] = absolute(folder)
    return given


def evaluation_sets(config: RunConfig) -> dict[str, str]:
    """Pictures that must not be trained on, by name: the run's probes and ``dedup.evaluation``.

    Raises:
        SourceError: one is not there.
    """
    sets = {name: folder for name, folder in probes(config).items() if isinstance(folder, str)}
    for number, path in enumerate(config.dedup.evaluation):
        if not Path(path).exists():
            raise SourceError(
                f"dedup.evaluation: {path}: not there; give a folder or tar of images, or Parquet "
                "with a column `embedding`"
            )
        sets[f"{number}-{Path(path).name}"] = absolute(path)
    return sets


def absolute(ref: str) -> str:
    """A local folder or file by its full path, since workers run elsewhere; a hub id as it is.
    Links stay: what one leads to may be called otherwise, and its ending tells what it is."""
    path = Path(ref).expanduser()
    return str(path.absolute()) if path.exists() else ref


def _output(task: DatasetTask, pattern: str) -> Published:
    return Published((task.record,), pattern)


def _prints(source: Published | str) -> list[str]:
    """What stands for the content of an input."""
    if isinstance(source, Published):
        return [print_of(record) for record in source.records]
    return [content_of(source)]


def content_of(folder: str) -> str:
    """Hash of a folder's files, names and contents; a hub id stands for itself.

    Raises:
        SourceError: it looks like a path and is not there.
    """
    if folder.startswith(MADE_HERE):
        record, _, part = folder.removeprefix(MADE_HERE).partition("#")
        return f"{print_of(record)}#{part}"
    fs, root = fsspec.core.url_to_fs(folder)
    files = find_files(fs, root)
    if not files:
        name, _, revision = folder.partition("@")
        names_hub = "/" not in revision or revision.startswith("refs/")
        if names_hub and name.count("/") <= 1 and not name.startswith((".", "/")):
            return folder
        raise SourceError(f"{folder}: no such folder, or nothing in it")
    state = hashlib.sha256()
    for file in files:
        state.update(Path(file).relative_to(root).as_posix().encode() + b"\0")
        state.update(hashlib.sha256(fs.cat_file(file)).digest())
    return state.hexdigest()[:16]
