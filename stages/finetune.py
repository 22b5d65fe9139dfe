"""Fine-tuning: one MED becomes a captioner and, separately, a filter, on the human pairs.

Sharing their weights would let the filter confirm what the captioner says (BLIP, Table 4).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stages.base import Context, DatasetStage
from stages.models.blocks import KeyValue, starting_with, take_rows
from stages.models.checkpoints import load_med, save_captioner, save_filter
from stages.models.losses import MedLosses
from stages.models.med import Med
from stages.models.text import load_tokenizer
from stages.models.workers import Workers
from stages.pretrain import write_log
from stages.training.config import CaptionerFinetuneConfig, FilterFinetuneConfig
from stages.training.data import Batch, Pairs
from stages.training.device import seeded
from stages.training.loop import Losses, train
from stages.training.swaps import Tokens, WordSwaps

if TYPE_CHECKING:
    from transformers import BertTokenizer


class CaptionerLosses(Losses):
    """LM behind a prompt of ``prompt_length`` positions, ``[DEC]`` included."""

    matching = False

    def __init__(self, med: Med, prompt_length: int) -> None:
        super().__init__(med)
        self.prompt_length = prompt_length

    def forward(self, batch: Batch, alpha: float, workers: Workers | None) -> MedLosses:
        losses: MedLosses = self.med(
            batch.pixel_values(),
            batch.input_ids,
            batch.attention_mask,
            workers=workers,
            matching=False,
            prompt_length=self.prompt_length,
        )
        return losses


class FilterLosses(Losses):
    """ITC + ITM, the latter with up to ``count`` near-miss texts a pair, drawn from ``swaps``.

    ITM stays one mean, as if the near misses had been in its batch, whose three rows a pair all
    count here, also those for which no negative was found.
    """

    def __init__(self, med: Med, swaps: WordSwaps | None, count: int, seed: int, rank: int) -> None:
        super().__init__(med)
        self.swaps, self.count = swaps, count
        self.seed, self.rank = seed, rank

    def forward(self, batch: Batch, alpha: float, workers: Workers | None) -> MedLosses:
        med, pixels = self.med, batch.pixel_values()
        tokens = med.vision_model(pixels)
        image_kv = med.text_encoder.cross_kv(tokens)
        itc, itm = med.contrastive_and_matching(
            pixels,
            tokens,
            image_kv,
            batch.input_ids,
            batch.attention_mask,
            alpha=alpha,
            image_ids=batch.image_ids,
            workers=workers,
        )
        if self.swaps is not None:
            shared = workers if workers is not None and workers.share else None
            itm = self._with_near_misses(itm, batch, image_kv, self.swaps, shared)
        return MedLosses(itc, itm, itc.new_zeros(()))

    def _with_near_misses(
        self,
        itm: Tensor,
        batch: Batch,
        image_kv: list[KeyValue],
        swaps: WordSwaps,
        shared: Workers | None,
    ) -> Tensor:
        ids, pairs, rank = batch.input_ids, len(batch.input_ids), self.rank
        if shared is not None:
            ids, rank = shared.gather_padded(ids), 0
        drawn = self._drawn(ids, batch.step, rank, swaps)
        if not drawn:
            return itm
        share = len(drawn) / (len(drawn) + 3 * len(ids))
        if shared is None:
            return itm * (1 - share) + self._rejected(batch, image_kv, drawn).mean() * share
        first = shared.own(pairs).start
        own = [(row - first, text) for row, text in drawn if 0 <= row - first < pairs]
        wrong = self._rejected(batch, image_kv, own).sum() if own else 0.0
        return itm * (1 - share) + wrong * shared.size / len(drawn) * share

    def _drawn(
        self, input_ids: Tensor, step: int, rank: int, swaps: WordSwaps
    ) -> list[tuple[int, Tokens]]:
        """Near misses with the rows whose images they miss."""
        random = np.random.Generator(
            np.random.Philox(np.random.SeedSequence((self.seed, step, rank)))
        )
        return [
            (row, text)
            for row, caption in enumerate(input_ids.cpu().numpy())
            for _ in range(self.count)
            if (text := swaps.swapped(caption, random)) is not None
        ]

    def _rejected(
        self, batch: Batch, image_kv: list[KeyValue], drawn: list[tuple[int, Tokens]]
    ) -> Tensor:
        """The loss of each near miss."""
        device, length = batch.input_ids.device, batch.input_ids.shape[1]
        own = torch.tensor([row for row, _ in drawn], device=device)
        # Texts gathered from other workers' may be padded further than ours.
        ids = torch.from_numpy(np.stack([text[:length] for _, text in drawn])).to(device)
        ids = starting_with(self.med.config.text.enc_token_id, ids)
        states = self.med.text_encoder(
            ids, batch.attention_mask[own], image_kv=take_rows(image_kv, own), first_only=True
        )
        labels = torch.zeros_like(own)
        return F.cross_entropy(self.med.itm_head(states[:, 0]), labels, reduction="none")


class _Finetune(DatasetStage):
    version = 3
    trained: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[str, ...]]
    """Modules of MED that the losses reach; the others take no part."""

    @abstractmethod
    def _losses(self, med: Med, tokenizer: BertTokenizer, pairs: Pairs, rank: int) -> Losses: ...

    @abstractmethod
    def _save(self, med: Med, tokenizer: BertTokenizer, output_dir: Path) -> None: ...

    def _run(
        self,
        config: CaptionerFinetuneConfig | FilterFinetuneConfig,
        prompt: str,
        inputs: Mapping[str, Sequence[Path]],
        output_dir: Path,
        ctx: Context,
    ) -> None:
        source = inputs["med"][0]
        with seeded(config.seed):
            med = load_med(source, config.med_config())
        train_only(med, self.parts)
        tokenizer = load_tokenizer(source)
        pairs = Pairs(
            inputs["train"],
            tokenizer,
            max_tokens=config.max_tokens,
            max_words=config.max_words,
            prompt=prompt,
        )
        losses = self._losses(med, tokenizer, pairs, ctx.rank)
        log = train(self.name, self.trained, losses, pairs, config, ctx)
        if ctx.rank == 0:
            self._save(med, tokenizer, output_dir)
            write_log(output_dir, log, pairs)


def train_only(med: Med, parts: Sequence[str]) -> None:
    """Freeze everything but the named modules, and the temperature where there is matching."""
    for parameter in med.parameters():
        parameter.requires_grad_(False)
    for part in parts:
        for parameter in med.get_submodule(part).parameters():
            parameter.requires_grad_(True)
    med.temp.requires_grad_("itm_head" in parts)


class CaptionerFinetune(_Finetune):
    """MED becomes a captioner (BLIP, section 5.2).

    Inputs: ``med``, a folder; ``train``, the human tars. Writes ``captioner/``, which
    `BlipForConditionalGeneration` opens, and `write_log`'s files.

    Raises:
        CheckpointError: the folder holds no MED.
        SourceError: no pair to train on.
        TrainingError: the loss is not finite or diverges.
    """

    name = "finetune_captioner"
    trained = ("lm",)
    parts = ("vision_model", "text_decoder")

    def __init__(self, config: CaptionerFinetuneConfig) -> None:
        self.config = config

    def run(self, inputs: Mapping[str, Sequence[Path]], output_dir: Path, ctx: Context) -> None:
        self._run(self.config, self.config.prompt, inputs, output_dir, ctx)

    def _losses(self, med: Med, tokenizer: BertTokenizer, pairs: Pairs, rank: int) -> Losses:
        prompt = tokenizer.encode(self.config.prompt, add_special_tokens=False)
        return CaptionerLosses(med, prompt_length=1 + len(prompt))

    def _save(self, med: Med, tokenizer: BertTokenizer, output_dir: Path) -> None:
        save_captioner(med, tokenizer, output_dir / "captioner")


class FilterFinetune(_Finetune):
    """MED becomes a filter, by ITC and ITM (BLIP, sections 4.2 and 5.1).

    Inputs: ``med``, a folder; ``train``, the human tars. Writes ``filter/``, which
    `BlipForImageTextRetrieval` opens, and `write_log`'s files.

    Raises:
        CheckpointError: the folder holds no MED.
        SourceError: no pair to train on.
        TrainingError: the loss is not finite or diverges.
    """

    name = "finetune_filter"
    trained = ("itc", "itm")
    parts = ("vision_model", "text_encoder", "vision_proj", "text_proj", "itm_head")

    def __init__(self, config: FilterFinetuneConfig) -> None:
        self.config = config

    def run(self, inputs: Mapping[str, Sequence[Path]], output_dir: Path, ctx: Context) -> None:
        self._run(self.config, "", inputs, output_dir, ctx)

    def _losses(self, med: Med, tokenizer: BertTokenizer, pairs: Pairs, rank: int) -> Losses:
        count = self.config.text_negatives
        swaps = _swaps(pairs, tokenizer) if count else None
        return FilterLosses(med, swaps, count, self.config.seed, rank)

    def _save(self, med: Med, tokenizer: BertTokenizer, output_dir: Path) -> None:
        save_filter(med, tokenizer, output_dir / "filter")


def _swaps(pairs: Pairs, tokenizer: BertTokenizer) -> WordSwaps:
    lengths = zip(pairs.tokens, pairs.lengths, strict=True)
    captions = [ids[:length].astype(np.int64) for ids, length in lengths]
    inner = [i for word, i in tokenizer.get_vocab().items() if word.startswith("##")]
    return WordSwaps(
        captions,
        pairs.image_of.tolist(),
        special=frozenset(tokenizer.all_special_ids),
        inner=frozenset(inner),
    )
