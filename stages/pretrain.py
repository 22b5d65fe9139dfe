"""Pretraining: MED with all three losses on a round's pairs, from scratch or going on.

Writes the folder ``med`` and ``log.parquet``. Nothing of it depends on Ray.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from stages.base import Context, DatasetStage
from stages.models.checkpoints import load_med, save_med
from stages.models.losses import MedLosses
from stages.models.med import Med
from stages.models.text import fitted_to, load_tokenizer
from stages.models.towers import start_towers
from stages.models.workers import Workers
from stages.training.config import PretrainConfig
from stages.training.data import Batch, Pairs
from stages.training.device import seeded
from stages.training.loop import Losses, train
from stages.training.tensorboard import write_events

if TYPE_CHECKING:
    from transformers import BertTokenizer


class PretrainLosses(Losses):
    """ITC + ITM + LM."""

    def forward(self, batch: Batch, alpha: float, workers: Workers | None) -> MedLosses:
        losses: MedLosses = self.med(
            batch.pixel_values(),
            batch.input_ids,
            batch.attention_mask,
            alpha,
            image_ids=batch.image_ids,
            workers=workers,
        )
        return losses


class PretrainStage(DatasetStage):
    """Inputs: ``train``, all training tars; ``tokenizer``, ``init``, ``init_vision`` and
    ``init_text``, a folder each, in place of what the config names, where the caller has brought
    them to this machine.

    Writes ``med/`` (`stages.models.checkpoints.save_med`), ``log.parquet`` (TRAINING_LOG),
    ``tensorboard/`` (the same, as an event file) and ``data.json``: how many pairs and images were
    trained on, how many were skipped and why.

    Raises:
        CheckpointError: an init is not the model that it should be, or there is no tokenizer.
        SourceError: no pair to train on.
        TrainingError: the loss is not finite or diverges.
    """

    name = "pretrain"
    version = 3

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config

    def run(self, inputs: Mapping[str, Sequence[Path]], output_dir: Path, ctx: Context) -> None:
        config = self.config
        med, tokenizer = self._start(inputs)
        pairs = Pairs(
            inputs["train"],
            tokenizer,
            max_tokens=med.config.max_text_tokens,
            max_words=config.max_words,
        )
        losses = PretrainLosses(med)
        trained = ("itc", "itm", "lm")
        log = train(self.name, trained, losses, pairs, config, ctx, config.human_repeat)
        if ctx.rank == 0:
            save_med(med, tokenizer, output_dir / "med")
            write_log(output_dir, log, pairs)

    def _start(self, inputs: Mapping[str, Sequence[Path]]) -> tuple[Med, BertTokenizer]:
        config = self.config
        given = {
            name: inputs[name][0] if name in inputs else getattr(config, name)
            for name in ("tokenizer", "init", "init_vision", "init_text")
        }
        with seeded(config.seed):
            if (init := given["init"]) is not None:
                return load_med(init, config.model), load_tokenizer(init)
            tokenizer = load_tokenizer(given["tokenizer"])
            text = fitted_to(config.model.text, tokenizer)
            med = Med(config.model.model_copy(update={"text": text}))
            start_towers(med, tokenizer, given["init_vision"], given["init_text"])
            return med, tokenizer


def write_log(output_dir: Path, log: pa.Table, pairs: Pairs) -> None:
    """``log.parquet``, ``tensorboard/`` and ``data.json`` of a training stage."""
    pq.write_table(log, output_dir / "log.parquet")
    write_events(output_dir / "tensorboard", log)
    facts = {
        "pairs": len(pairs),
        "images": pairs.shards.images,
        "skipped": {kind: count for kind, count in sorted(pairs.skipped.items()) if count},
    }
    text = json.dumps(facts, indent=2, sort_keys=True) + "\n"
    (output_dir / "data.json").write_text(text, encoding="utf-8")
