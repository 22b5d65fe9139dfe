"""The variants of `tests.bench.table1`, in one run folder a seed, all in this process.

Work is planned, published and found again as a run does it, so variants share what is equal.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from pipeline.config import RunConfig, load, substitute
from pipeline.dag import DatasetTask, Published, made_here, print_of
from pipeline.engine.dataset import open_inputs, publish_folder
from pipeline.engine.shard import build, load_inputs, payload, publish, run_stage
from pipeline.plan import Model, RoundPlan, dataset_task, plan_round
from pipeline.records import Record
from pipeline.rounds import sample_world
from pipeline.sources import ingest
from pipeline.store import Store
from stages.base import Config, Context, DatasetStage, LocalContext, ShardStage
from stages.errors import ConfigError
from stages.evaluate import EvaluateStage
from stages.finetune import FilterFinetune, FilterLosses
from stages.models.checkpoints import save_med
from stages.models.losses import MedLosses
from stages.models.workers import Workers
from stages.training.config import FilterFinetuneConfig
from stages.training.data import Batch

if TYPE_CHECKING:
    from transformers import BertTokenizer

    from stages.models.med import Med
    from stages.training.data import Pairs
    from stages.training.loop import Losses

VARIANTS: Mapping[str, tuple[str, ...]] = {
    "raw": (),
    "filter": ("select.keep=web",),
    "captioner": ("select.threshold=0", "select.synthetic_threshold=0"),
    "captioner+filter": (),
    "replicated": (),
    "shared": (),
    "beam": ("caption.generation.method=beam",),
    "continued": (),
}
"""Variant → what it changes in the config; what else it does is in `Seed.tasks`."""

MEASURES = ("tr_at_1", "ir_at_1", "cider")
FACTS = ("wrong_after", "synthetic_right_before", "filter_precision", "filter_recall")

_PAIRS, _INDEX, _TARS = "*/pairs.parquet", "*/index.parquet", "*.tar"

Figures = dict[str, float]
"""Figure → value, NaN where it is about nothing."""


class SharedFinetuneConfig(FilterFinetuneConfig):
    """The filter's settings, and the prompt behind which the same model learns to caption."""

    prompt: str


class SharedLosses(FilterLosses):
    """The filter's losses, and the captioner's on the same batch."""

    prompt: Tensor
    """(P,) int64, on the model's device."""

    def forward(self, batch: Batch, alpha: float, workers: Workers | None) -> MedLosses:
        matching = super().forward(batch, alpha, workers)
        ids, prompt = batch.input_ids, self.prompt.expand(len(batch.input_ids), -1)
        image_kv = self.med.text_encoder.cross_kv(self.med.vision_model(batch.pixel_values()))
        prompted = torch.cat([ids[:, :1], prompt, ids[:, 1:]], dim=1)
        lm = self.med.language_modelling(image_kv, prompted, 1 + prompt.shape[1], workers)
        return MedLosses(matching.itc, matching.itm, lm)


class SharedFinetune(FilterFinetune):
    """MED becomes captioner and filter in one, near misses and prompt as for two. Inputs as
    `FilterFinetune`'s; writes ``med/``, which opens as either."""

    name = "finetune_shared"
    trained = ("itc", "itm", "lm")  # type: ignore[assignment]
    parts = (*FilterFinetune.parts, "text_decoder")  # type: ignore[assignment]
    config: SharedFinetuneConfig

    def _losses(self, med: Med, tokenizer: BertTokenizer, pairs: Pairs, rank: int) -> Losses:
        plain = super()._losses(med, tokenizer, pairs, rank)
        assert isinstance(plain, FilterLosses)
        losses = SharedLosses(med, plain.swaps, plain.count, plain.seed, plain.rank)
        prompt = tokenizer.encode(self.config.prompt, add_special_tokens=False)
        losses.register_buffer("prompt", torch.tensor(prompt, dtype=torch.int64))
        return losses

    def _save(self, med: Med, tokenizer: BertTokenizer, output_dir: Path) -> None:
        save_med(med, tokenizer, output_dir / "med", momentum=False)


class ReplicateConfig(Config):
    """Which texts come once more than others."""

    seed: int


class ReplicateStage(DatasetStage):
    """``pairs`` of a raw round, its kept web pairs repeated whole, then in part, until they are as
    many as ``index`` has pairs that are not human. Writes ``pairs.parquet``."""

    name = "replicate"
    version = 1

    def __init__(self, config: ReplicateConfig) -> None:
        self.config = config

    def run(self, inputs: Mapping[str, Sequence[Path]], output_dir: Path, ctx: Context) -> None:
        pairs, index = (pq.read_table(inputs[name][0]) for name in ("pairs", "index"))
        wanted = len(index.filter(pc.not_equal(index["source"], "human")))
        kept = pairs.filter(pc.equal(pairs["state"], "kept"))
        is_human = np.asarray(pc.equal(kept["source"], "human"))
        order = np.random.default_rng(self.config.seed).permutation(np.flatnonzero(~is_human))
        rows = np.concatenate([np.flatnonzero(is_human), np.resize(order, wanted)])
        pq.write_table(kept.take(np.sort(rows)), output_dir / "pairs.parquet")


@contextmanager
def opened(file: str, overrides: Sequence[str]) -> Iterator[Seed]:
    """The seed whose config is ``file`` with ``overrides`` (``run`` and ``seed`` among them); its
    world is built and served meanwhile.

    Raises:
        ConfigError: the config cannot be used, or has no world or no test probe.
    """
    config = load(file, overrides)
    for name in ("world", "test"):
        if getattr(config, name) is None:
            raise ConfigError(f"{file}: {name}: is missing; table 1 is measured on a sample world")
    store = Store(config.run)
    store.ensure()
    with sample_world(config, store) as (filled, world):
        assert world is not None
        yield Seed(file, overrides, filled, store, Path(world))


class Seed:
    """All variants of one seed, in one run folder: equal work has one fingerprint, and so it is
    done once."""

    def __init__(
        self, file: str, overrides: Sequence[str], config: RunConfig, store: Store, world: Path
    ) -> None:
        self._file, self._overrides, self._world = file, overrides, world
        self._config, self._store = config, store
        self._shards = ingest(config, store)
        self._raw = plan_round(config, 0, self._shards, {}, str(world), {})
        self._label(self._raw)

    def measure(self, variant: str) -> Figures:
        """Do what the variant still needs, and read what it is worth."""
        tasks = self.tasks(variant)
        records = {task.name: self._do(task) for task in tasks}
        value, _ = self._metrics(records["evaluate"])
        facts, counts = self._metrics(records["audit"])
        trained = self._store.read_json(payload(records["pretrain"], "data.json").path)["pairs"]
        texts, synthetic = counts["wrong_after"], counts["wrong_after_synthetic"]
        return {
            **{name: value[name] for name in MEASURES},
            **{name: facts[name] for name in FACTS},
            "texts": texts,
            "synthetic_share": synthetic / texts if texts else math.nan,
            "synthetic_share_with_human": synthetic / trained,
            "synthetic_right": 1 - facts["wrong_after_synthetic"],
        }

    def tasks(self, variant: str) -> list[DatasetTask]:
        """What the variant alone does, in order, from dedup or select to the audit."""
        if variant == "raw":
            return self._measured([*self._raw.curation, self._raw.task("pretrain")], self._raw)
        plan = self._bootstrapped(variant)
        if variant == "replicated":
            return self._replicated(plan)
        pretrain = plan.task("pretrain")
        if variant == "continued":
            pretrain = _again(pretrain, init=made_here(self._raw.task("pretrain").record, "med"))
        return self._measured([*plan.curation, pretrain], plan)

    def _bootstrapped(self, variant: str) -> RoundPlan:
        """A round 1 whose shards are labelled."""
        config = load(self._file, [*self._overrides, *VARIANTS[variant]])
        config = substitute(config, self._world)
        models = self._models(variant == "shared")
        plan = plan_round(config, 1, self._shards, models, str(self._world), {})
        self._label(plan)
        return plan

    def _replicated(self, plan: RoundPlan) -> list[DatasetTask]:
        """The raw round again, over as many texts as ``plan`` keeps."""
        raw, bootstrapped = self._raw, plan.task("assemble")
        for task in (*raw.curation, *plan.curation):
            self._do(task)
        config = ReplicateConfig(seed=self._config.seed)
        replicate = dataset_task(
            ReplicateStage(config),
            config,
            1,
            {
                "pairs": Published((raw.task("select").record,), _PAIRS),
                "index": Published((bootstrapped.record,), _INDEX),
            },
        )
        pairs = Published((replicate.record,), _PAIRS)
        assemble = _again(raw.task("assemble"), pairs=pairs)
        pretrain = _again(raw.task("pretrain"), train=Published((assemble.record,), _TARS))
        audit = _again(raw.task("audit"), pairs=pairs)
        return [replicate, assemble, pretrain, self._evaluate(pretrain), audit]

    def _measured(self, tasks: Sequence[DatasetTask], plan: RoundPlan) -> list[DatasetTask]:
        return [*tasks, self._evaluate(tasks[-1]), plan.task("audit")]

    def _evaluate(self, pretrain: DatasetTask) -> DatasetTask:
        """The test probe alone; the MED captions for itself, without a prompt as it was trained."""
        config = self._config.evaluate.model_copy(update={"prompt": ""})
        med = made_here(pretrain.record, "med")
        inputs = {"med": med, "captioner": med, "test": str(self._config.test)}
        return dataset_task(EvaluateStage(config), config, pretrain.round, inputs)

    def _models(self, shared: bool) -> dict[str, Model]:
        """Captioner, filter and embedder, fine-tuned from the raw MED."""
        pretrain, captioner, filter_ = self._raw.training
        for task in (*self._raw.curation, pretrain):
            self._do(task)
        embedder = _model(pretrain, "med")
        if shared:
            finetune = self._config.finetune
            values = finetune.filter.model_dump() | {"prompt": finetune.captioner.prompt}
            config = SharedFinetuneConfig.model_validate(values)
            task = dataset_task(SharedFinetune(config), config, 0, filter_.inputs, folder="models")
            self._do(task)
            both = _model(task, "med")
            return {"caption": both, "filter": both, "embed": embedder}
        self._do(captioner)
        self._do(filter_)
        return {
            "caption": _model(captioner, "captioner"),
            "filter": _model(filter_, "filter"),
            "embed": embedder,
        }

    def _label(self, plan: RoundPlan) -> None:
        """Bring every shard through the stages that it still needs."""
        stages: dict[str, ShardStage] = {}
        for job in plan.jobs(self._store.record_names()):
            for task in plan.shard_tasks:
                if task.name not in job.todo:
                    continue
                started = time.time()
                if task.name not in stages:
                    stages[task.name] = build(task, self._store)
                    stages[task.name].setup()
                inputs = load_inputs(task.name, job, self._store, {})
                publish(task, job, run_stage(stages[task.name], inputs), self._store, started)

    def _do(self, task: DatasetTask) -> Record:
        if self._store.exists(task.record):
            return self._store.read_record(task.record)
        started = time.time()
        with tempfile.TemporaryDirectory() as output:
            task.stage.run(open_inputs(task, self._store), Path(output), LocalContext())
            return publish_folder(task, self._store, Path(output), started)

    def _metrics(self, record: Record) -> tuple[Figures, dict[str, int]]:
        """Metric → value, and over how many items."""
        rows = self._store.read_table(payload(record, "metrics.parquet")).to_pylist()
        return (
            {row["metric"]: row["value"] for row in rows},
            {row["metric"]: row["n"] for row in rows},
        )


def _again(task: DatasetTask, **inputs: Published | str) -> DatasetTask:
    """The same stage over other inputs."""
    config = task.stage.config  # type: ignore[attr-defined]
    return dataset_task(task.stage, config, 1, {**task.inputs, **inputs})


def _model(task: DatasetTask, folder: str) -> Model:
    return Model(made_here(task.record, folder), print_of(task.record))
