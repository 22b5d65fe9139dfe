"""What caption, filter and embed share: where their model runs, and images decoded ahead of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Generic, Literal, TypeVar

import pyarrow as pa
from pydantic import Field, model_validator

from stages.base import Config, Resources, ShardStage, operational
from stages.errors import ConfigError
from stages.models.images import DecodeError, decode

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stages.models.base import InferenceModel
    from stages.models.feeding import Batch, Pixels
    from stages.models.preprocessing import Preprocessing


class InferenceConfig(Config):
    """A model, and the machine it runs on."""

    model: str | None = operational(None)
    """Folder in transformers' format, or hub id; None where the run makes its own. Fingerprints
    cover the hash of its weights instead of its place."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 16
    """Images at once. Float sums differ between batch shapes in the last bit, so it counts as part
    of the result. ``auto`` grows it until a GPU's memory, of which it takes ``resources.gpus`` at
    most, or its speed stops it, and is the default's number on a CPU; what is found belongs to
    the shard, see `ModelStage.choices`."""
    precision: Literal["float32", "bfloat16", "int8"] = "float32"
    """``bfloat16`` is what GPUs are fast in; ``int8`` rounds the linear layers on a CPU, and is
    faster than floats on one with AVX-512 VNNI; see `stages.models.linear.in_int8`."""
    device: Literal["auto", "cpu", "cuda"] = operational("auto")
    """``auto`` is the GPU where there is one."""
    threads: int = operational(1, ge=1)
    """CPU threads of torch, for each replica."""
    decode_threads: int = operational(1, ge=1)
    """Threads that decode and resize images ahead of the model, for each replica."""
    resources: Resources = operational(Resources())

    @model_validator(mode="after")
    def _int8_runs_on_a_cpu(self) -> InferenceConfig:
        if self.precision == "int8" and (self.device == "cuda" or self.resources.gpus):
            raise ValueError(
                "precision: 'int8' runs on a CPU; use bfloat16, or device cpu and resources.gpus 0"
            )
        return self


C = TypeVar("C", bound=InferenceConfig)
M = TypeVar("M", bound="InferenceModel")


@dataclass(frozen=True)
class Opened:
    """Where a stage's weights are, what they are, and how they will run."""

    folder: Path
    weights: str
    """Hash of the weights, for the ``model`` column."""
    device: str
    dtype: torch.dtype
    batch_size: int
    int8: bool

    @property
    def arguments(self) -> tuple[Path, str, torch.dtype, int, bool]:
        """The first arguments of `Captioner`, `Matcher` and `Embedder`."""
        return self.folder, self.device, self.dtype, self.batch_size, self.int8


def open_model(stage: str, config: InferenceConfig) -> Opened:
    """Find the model of ``config`` and set torch's threads.

    Raises:
        ConfigError: no model is given, a GPU is asked for where there is none, or int8 on a GPU.
        CheckpointError: there is no model where ``model`` says.
    """
    import torch

    from stages.models.checkpoints import weights_hash
    from stages.models.folders import ModelFolder

    if config.model is None:
        raise ConfigError(f"{stage}.model: none given; give a model folder or a hub id")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{stage}.device: 'cuda', but torch sees no GPU; use auto or cpu")
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    int8 = config.precision == "int8"
    if int8 and device == "cuda":
        raise ConfigError(f"{stage}.precision: 'int8' runs on a CPU; use bfloat16, or device cpu")
    torch.set_num_threads(config.threads)
    folder = ModelFolder.open(config.model).path
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    size = config.batch_size
    if size == "auto":
        size = type(config).model_fields["batch_size"].default
    return Opened(folder, weights_hash(folder), device, dtype, size, int8)


class ModelStage(ShardStage, Generic[C, M]):
    """A shard stage around one model; its batch size is fixed shard by shard.

    Row-for-row equality is promised for equal batch size, device and thread count.
    """

    model: M
    weights: str

    def __init__(self, config: C) -> None:
        self.config = config

    @property
    def resources(self) -> Resources:
        return self.config.resources

    @abstractmethod
    def load(self, opened: Opened) -> M:
        """The model itself."""

    @abstractmethod
    def trial(self, pixels: Tensor) -> object:
        """The most work that images ``pixels``, (B, S, S, 3) uint8, may ordinarily take."""

    def setup(self) -> None:
        opened = open_model(self.name, self.config)
        self.weights, self.model = opened.weights, self.load(opened)
        if self.config.batch_size == "auto":
            self._find_batch_size()
        self._found = self._size = self._started_with = self.model.batch_size
        self._tokens_before = self.model.tokens

    def _find_batch_size(self) -> None:
        import torch

        edge = self.model.preprocessing.size
        gpus = self.config.resources.gpus
        self.model.grow(
            lambda count: self.trial(torch.zeros(count, edge, edge, 3, dtype=torch.uint8)),
            share=gpus if 0 < gpus < 1 else 1.0,
        )

    def choices(self) -> dict[str, int]:
        """The batch size, where it is ``auto``."""
        return {"batch_size": self._found} if self.config.batch_size == "auto" else {}

    def choose(self, choices: Mapping[str, int]) -> None:
        self._size = choices["batch_size"]

    def facts(self) -> dict[str, str]:
        """Of the last table: ``batch_size``, "32", or "32, 16" where memory ran out on the way; and
        ``tokens`` of the texts that it wrote or read, if any."""
        sizes = dict.fromkeys((self._started_with, self.model.batch_size))
        tokens = self.model.tokens - self._tokens_before
        told = {"tokens": str(tokens)} if tokens else {}
        return {"batch_size": ", ".join(map(str, sizes))} | told

    def batches(self, table: pa.Table, broken: dict[int, str]) -> Iterator[Batch]:
        """`batches` of ``table`` for the model, on its device before it asks for them. Where memory
        ran out over an earlier table is forgotten: results must not depend on a worker's past."""
        self._started_with = size = self.model.batch_size = self._size
        self._tokens_before = self.model.tokens
        model, threads = self.model, self.config.decode_threads
        return batches(table, size, model.preprocessing, broken, threads, model.device)


def batches(
    table: pa.Table,
    size: int,
    preprocessing: Preprocessing,
    broken: dict[int, str],
    threads: int,
    device: torch.device,
) -> Iterator[Batch]:
    """The images of an IMAGES or IMAGES_WITH_TEXTS table, ``size`` at a time, in row order.

    A row whose image cannot be decoded goes to ``broken`` with the reason; the next one takes its
    place, so that only the last batch is short. ``threads`` decode ahead, a batch at most; on a
    GPU one batch more is gathered, and one copied, while the model works.
    """
    from stages.models.feeding import ahead, batched

    def prepare(data: pa.Scalar) -> Pixels | str:
        try:
            image = decode(data.as_py() or b"", cover=preprocessing.covered)
        except DecodeError as error:
            return str(error)
        return preprocessing.resized(image)

    def whole() -> Iterator[tuple[int, Pixels]]:
        for row, pixels in enumerate(ahead(prepare, table["image"], threads, size)):
            if isinstance(pixels, str):
                broken[row] = pixels
            else:
                yield row, pixels

    return batched(whole(), size, device)


def from_rows(rows: Sequence[dict[str, object]], schema: pa.Schema) -> pa.Table:
    """Rows as a table of ``schema``; columns that a row leaves out are null."""
    return pa.table(
        {
            name: pa.array([row.get(name) for row in rows], schema.field(name).type)
            for name in schema.names
        },
        schema=schema,
    )
