"""A whole run as one YAML file: parsed into frozen models, unknown keys refused.

``load(path, ["select.threshold=0.4"])`` reads the file, applies dotted overrides and checks every
field. Each stage's own config lives beside the stage; this module only puts them together.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from pipeline.unique_keys import read_yaml
from stages.assemble import AssembleConfig
from stages.base import Config, Gpus, operational
from stages.caption import CaptionConfig
from stages.dedup import DedupConfig
from stages.download import DownloadConfig
from stages.embed import EmbedConfig
from stages.errors import ConfigError
from stages.evaluate import EvaluateConfig
from stages.filter import FilterConfig
from stages.gate import GateConfig
from stages.ingest import IngestConfig
from stages.readers import SourceConfig
from stages.scenes.config import WorldConfig
from stages.select import SelectConfig
from stages.training.config import CaptionerFinetuneConfig, FilterFinetuneConfig, PretrainConfig


class RoundsConfig(Config):
    """How often the loop goes round, and what a round does again."""

    count: int = operational(2, ge=0)
    """Bootstrapping rounds, not counting round 0 (pretraining on the raw pairs)."""
    relabel: Literal["all", "new"] = "all"
    """Promoted models recaption and rescore every image, or only those of new sources."""


class ScheduleConfig(Config):
    """When a firing of ``capfilt schedule`` goes round."""

    min_new_rows: int = operational(1, ge=1)
    """Rows of sources that no round has taken yet; with fewer, they wait for the next firing."""


class FinetuneConfigs(Config):
    """The two models that are fine-tuned, separately, from one MED."""

    captioner: CaptionerFinetuneConfig = CaptionerFinetuneConfig()
    filter: FilterFinetuneConfig = FilterFinetuneConfig()


def _with_cpus(resources: dict[str, float]) -> dict[str, float]:
    if resources.get("CPU", 0.0) <= 0:
        raise ValueError("name the CPUs too, which every stage takes: {CPU: 96, GPU: 8}")
    return resources


Grown = dict[Annotated[str, StringConstraints(pattern="^(CPU|GPU)$")], float]


class EngineConfig(Config):
    """Where the run happens. No fingerprint covers it; of all this, only another number of training
    workers changes a result, by the order of its sums and each worker's share of the data."""

    address: str | None = None
    """Ray cluster to join; None joins the one in RAY_ADDRESS, else starts a local one."""
    cpus: int | None = Field(None, ge=1)
    """CPUs of a local Ray; None takes all."""
    object_store_gb: float = Field(1.0, gt=0)
    """Shared memory of a local Ray, GiB."""
    grows_to: Annotated[Grown, AfterValidator(_with_cpus)] | None = None
    """What an autoscaler may bring the cluster to, all nodes together, as ``{CPU: 96, GPU: 8}``.
    Then the sum of all CPUs and GPUs is held against that, but neither memory, nor kinds of GPU,
    nor what fits on one node, which nobody tells us; without it, all is held against the nodes
    that are up."""
    train_workers: int = Field(1, ge=1)
    train_cpus: float = Field(1.0, gt=0)
    """CPUs of one training worker."""
    train_gpus: Gpus = 0.0
    """GPUs of one training worker."""
    train_memory_gb: float = Field(0.0, ge=0)
    """GiB of main memory to set aside for one training worker; 0 sets none aside."""
    train_accelerator: str | None = None
    """Train only on nodes with this accelerator, by Ray's name of it: H100, A100, L4…"""


class RunConfig(Config):
    """Everything that a run needs to know."""

    run: str
    """The run folder: a local path or an fsspec URL."""
    seed: int = Field(0, ge=0)
    world: WorldConfig | None = None
    """The embedded sample world; ``{world}`` in any path below stands for its folder."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    human: tuple[SourceConfig, ...] = ()
    dev: str | None = None
    """Probe folder on which the gate decides."""
    test: str | None = None
    """Probe folder that is only reported."""
    rounds: RoundsConfig = RoundsConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    ingest: IngestConfig = IngestConfig()
    download: DownloadConfig = DownloadConfig()
    caption: CaptionConfig = CaptionConfig()
    filter: FilterConfig = FilterConfig()
    embed: EmbedConfig = EmbedConfig()
    dedup: DedupConfig = DedupConfig()
    select: SelectConfig = SelectConfig()
    assemble: AssembleConfig = AssembleConfig()
    pretrain: PretrainConfig
    finetune: FinetuneConfigs = FinetuneConfigs()
    evaluate: EvaluateConfig = EvaluateConfig()
    gate: GateConfig = GateConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _starts_somewhere(self) -> RunConfig:
        if (self.caption.model is None) != (self.filter.model is None):
            raise ValueError(
                "caption.model and filter.model: give both, or neither to pretrain in round 0 first"
            )
        if not self.human:
            raise ValueError("human: at least one human-annotated source is needed to fine-tune on")
        if self.caption.model is not None and self.embed.model is None:
            raise ValueError("embed.model: needed when the run starts from released models")
        return self

    @model_validator(mode="after")
    def _languages_are_known(self) -> RunConfig:
        if self.select.texts.languages and not self.ingest.language:
            raise ValueError("select.texts.languages: needs ingest.language, which is false")
        return self

    @model_validator(mode="after")
    def _prompts_are_alike(self) -> RunConfig:
        prompt = self.finetune.captioner.prompt
        others = {
            "caption.generation": self.caption.generation.prompt,
            "evaluate": self.evaluate.prompt,
        }
        for name, other in others.items():
            if other != prompt:
                raise ValueError(
                    f"{name}.prompt: {other!r} is not finetune.captioner.prompt, {prompt!r}; "
                    "a captioner goes on from the prompt that it was fine-tuned with"
                )
        return self

    @model_validator(mode="after")
    def _images_have_whole_patches(self) -> RunConfig:
        patch = self.pretrain.model.vision.patch_size
        sizes = {"captioner": self.finetune.captioner, "filter": self.finetune.filter}
        for name, training in sizes.items():
            if self.pretrain.init is None and training.image_size % patch:
                raise ValueError(
                    f"finetune.{name}.image_size: {training.image_size} is no multiple of "
                    f"pretrain.model.vision.patch_size, {patch}"
                )
        return self

    @model_validator(mode="after")
    def _gpus_are_asked_for(self) -> RunConfig:
        for name in ("caption", "filter", "embed"):
            stage = getattr(self, name)
            if stage.device == "cuda" and not stage.resources.gpus:
                raise ValueError(
                    f"{name}.device: 'cuda' needs {name}.resources.gpus, which is 0: Ray hides all "
                    "GPUs then; give a share of one, e.g. 0.5, or device auto"
                )
        return self

    @model_validator(mode="after")
    def _batches_are_shared_out(self) -> RunConfig:
        trained = {
            "pretrain": self.pretrain,
            "finetune.captioner": self.finetune.captioner,
            "finetune.filter": self.finetune.filter,
        }
        for name, training in trained.items():
            uneven = training.uneven(self.engine.train_workers)
            if uneven is not None:
                raise ValueError(f"{name}.{uneven}")
        return self

    @model_validator(mode="after")
    def _a_world_is_there(self) -> RunConfig:
        if self.world is None:
            for field, text in _strings(self.model_dump()):
                if "{world}" in text:
                    raise ValueError(
                        f"{field}: {_short(text)} lies in the sample world's folder, and `world` "
                        "is not given; name what is yours"
                    )
        return self

    @property
    def first_round(self) -> int:
        """0 where the run starts from nothing, 1 where caption.model and filter.model are given."""
        return 0 if self.caption.model is None else 1


def load(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in the YAML file ``path``, with ``a.b=value`` overrides applied.

    Raises:
        ConfigError: no such file, not YAML, a key given twice, or a field that is unknown, missing
            or out of range; naming where the field was set, as `origin` does.
    """
    try:
        values = _unshared(read_yaml(Path(path).read_text(encoding="utf-8"), path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply, or an alias holds itself") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a mapping of settings, found {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return parse(values, path, overrides)


def parse(values: Mapping[str, Any], where: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Check plain values, which already hold the ``overrides``. ``where`` names their origin in
    the error. ``seed`` is passed on to every stage that does not name its own.

    Raises:
        ConfigError: naming the field, the value and what is allowed.
    """
    try:
        return RunConfig.model_validate(_seeded(values))
    except ValidationError as error:
        told = explain(error, RunConfig)
        raise ConfigError(f"{origin(told, where, overrides)}: {told}") from error


def origin(told: str, path: str, overrides: Sequence[str]) -> str:
    """Where the field was set with which the error ``told`` begins: by one of ``overrides``, in
    the file ``path``, or by both, where an override set a part of it."""
    field = told.partition(": ")[0]
    for override in reversed(overrides):
        key = override.partition("=")[0]
        if f"{field}.".startswith(f"{key}."):
            return f"override {_short(override)}"
        if key.startswith(f"{field}."):
            return f"{path} with {_short(override)}"
    return path


_SEEDED = ("caption.generation", "pretrain", "finetune.captioner", "finetune.filter")


def _seeded(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with the run's seed where a stage takes one and none is given."""
    filled: dict[str, Any] = _unshared(values)
    for path in (*_SEEDED, *(["world"] if "world" in filled else [])):
        node: Any = filled
        for part in path.split("."):
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node.setdefault("seed", filled.get("seed", 0))
    return filled


def _unshared(value: Any) -> Any:
    """A copy in which a YAML alias is a node of its own: a change stays where it is made."""
    if isinstance(value, Mapping):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def substitute(config: RunConfig, world: Path) -> RunConfig:
    """``config`` with ``{world}`` replaced by the sample world's folder, in every string."""

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace("{world}", str(world))
        if isinstance(value, Mapping):
            return {key: walk(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [walk(item) for item in value]
        return value

    return RunConfig.model_validate(walk(config.model_dump()))


def _strings(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Every string in nested values, with its dotted field."""
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _strings(item, f"{field}.{key}" if field else str(key))


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one dotted ``key=value`` in nested mappings, the value read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write key=value, e.g. select.threshold=0.4")
    try:
        value = read_yaml(text, f"override {_short(override)}")
    except yaml.YAMLError:
        value = text  # such as {world}/web.parquet
    *parents, last = key.split(".")
    node: Any = values
    for parent in parents:
        if isinstance(node, dict) and node.get(parent) is None:
            node[parent] = {}  # absent, or a heading with nothing below it
        node = node[parent] if isinstance(node, dict) else _index(node, parent, key)
    if isinstance(node, list):
        _index(node, last, key)
        node[int(last)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"override {override!r}: {'.'.join(parents)} holds no settings")


def _index(node: Any, part: str, key: str) -> Any:
    if not isinstance(node, list) or not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"override {key!r}: no element {part!r} there")
    return node[int(part)]


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem in one line: field, value, what is allowed.

    Unknown keys come first: a misspelt one is also the reason why another is missing.
    """
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    field = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        value = _short(first["input"])
        return f"{field}: {value}: unknown key{_nearest(first['loc'], model)}{more}"
    message = re.sub(r"^(Value error, |Input should be )", "", first["msg"])
    if first["type"] == "missing":
        return f"{field}: is missing{more}"
    if not field:
        return f"{message}{more}"
    return f"{field}: {_short(first['input'])} is not allowed: {message}{more}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(loc: tuple[int | str, ...], model: type[BaseModel]) -> str:
    """What may stand in place of an unknown key: the closest name, or all of them."""
    owner: Any = model
    for part in loc[:-1]:
        owner = _inner(owner, part)
    if owner is None:
        return ""
    names = sorted(owner.model_fields)
    close = difflib.get_close_matches(str(loc[-1]), names, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed are {', '.join(names)}"


def _inner(owner: Any, part: int | str) -> type[BaseModel] | None:
    """The config class below ``part`` of ``owner``; list indices stay at the same class."""
    if owner is None or isinstance(part, int):
        return owner  # type: ignore[no-any-return]
    field = owner.model_fields.get(part)
    if field is None:
        return None
    pending, found = [field.annotation], None
    while pending and found is None:
        candidate = pending.pop()
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            found = candidate
        pending.extend(getattr(candidate, "__args__", ()))
    return found
