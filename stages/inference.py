"""What caption, filter and embed share: where their model runs, and images in whole batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow as pa
from PIL import Image
from pydantic import Field

from stages.base import Config, Resources, operational
from stages.errors import ConfigError
from stages.models.images import DecodeError, decode


class InferenceConfig(Config):
    """A model, and the machine it runs on."""

    model: str | None = operational(None)
    """Folder in transformers' format, or hub id; None where the run makes its own. Fingerprints
    cover the hash of its weights instead of its place."""
    batch_size: int = Field(16, ge=1)
    """Images at once. Float sums differ between batch shapes in the last bit, so it counts as part
    of the result."""
    device: Literal["auto", "cpu", "cuda"] = operational("auto")
    """``auto`` is the GPU where there is one."""
    threads: int = operational(1, ge=1)
    """CPU threads of torch, for each replica."""
    resources: Resources = operational(Resources())


@dataclass(frozen=True)
class Opened:
    """Where a stage's weights are, what they are, and the device they go to."""

    folder: Path
    weights: str
    """Hash of the weights, for the ``model`` column."""
    device: str


def open_model(stage: str, config: InferenceConfig) -> Opened:
    """Find the model of ``config`` and set torch's threads.

    Raises:
        ConfigError: no model is given, or a GPU is asked for where there is none.
        CheckpointError: there is no model where ``model`` says.
    """
    import torch

    from stages.models.checkpoints import weights_hash
    from stages.models.folders import ModelFolder

    if config.model is None:
        raise ConfigError(f"{stage}.model: none given; give a model folder or a hub id")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{stage}.device: 'cuda', but torch sees no GPU; use auto or cpu")
    torch.set_num_threads(config.threads)
    device = "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"
    folder = ModelFolder.open(config.model).path
    return Opened(folder, weights_hash(folder), device)


@dataclass
class Batch:
    """Images that decoded: their rows in the table, and their pixels."""

    rows: list[int] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)


def batches(table: pa.Table, size: int, broken: dict[int, str]) -> Iterator[Batch]:
    """The images of an IMAGES or IMAGES_WITH_TEXTS table, ``size`` at a time, in row order.

    A row whose image cannot be decoded goes to ``broken`` with the reason; the next one takes its
    place, so that only the last batch is short. Only one batch is decoded at a time.
    """
    batch = Batch()
    for row, data in enumerate(table["image"]):
        try:
            batch.images.append(decode(data.as_py() or b""))
        except DecodeError as error:
            broken[row] = str(error)
            continue
        batch.rows.append(row)
        if len(batch.rows) == size:
            yield batch
            batch = Batch()
    if batch.rows:
        yield batch


def from_rows(rows: Sequence[dict[str, object]], schema: pa.Schema) -> pa.Table:
    """Rows as a table of ``schema``; columns that a row leaves out are null."""
    return pa.table(
        {
            name: pa.array([row.get(name) for row in rows], schema.field(name).type)
            for name in schema.names
        },
        schema=schema,
    )
