"""MED, BLIP's multimodal mixture of encoder and decoder, and its training step in one pass.

The original runs the vision tower's output through the text stack four times, each time computing
the cross-attention's keys and values of every image and layer anew. Here they are computed once
for each image and layer, since encoder and decoder share their cross-attention, and every use
indexes them. The losses are the original's to rounding (BLIP, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.blocks import (
    KeyValue,
    LMHead,
    TextStack,
    starting_with,
    take_rows,
    trimmed,
    unit,
)
from stages.models.config import TEMPERATURE_RANGE, MedConfig, TextConfig
from stages.models.losses import (
    MedLosses,
    Negatives,
    contrastive_targets,
    draw_negatives,
    matching_labels,
    negative_floor,
    same_pair,
)
from stages.models.vision import VisionTransformer
from stages.models.workers import Workers, cross_entropy

NO_IMAGE_ID = -1


class _Features(NamedTuple):
    """Normalised features of a batch, each (B, projection_dim)."""

    image: Tensor
    text: Tensor


class _Candidates(NamedTuple):
    """What a batch is compared with besides the queue, C pairs; and what is to be queued."""

    image: Tensor
    text: Tensor
    """Momentum features, each (C, projection_dim)."""
    image_ids: Tensor
    """(C,) int64."""


class _Predictions(nn.Module):
    def __init__(self, config: TextConfig, bert: TextStack) -> None:
        super().__init__()
        self.predictions = LMHead(config, bert.embeddings.word_embeddings)


class _Decoder(nn.Module):
    """`BlipTextLMHeadModel`'s shape: ``bert`` and ``cls.predictions``."""

    def __init__(self, config: TextConfig, encoder: TextStack) -> None:
        super().__init__()
        self.bert = TextStack(config)
        share_all_but_self_attention(encoder, self.bert)
        self.cls = _Predictions(config, self.bert)


def share_all_but_self_attention(encoder: TextStack, decoder: TextStack) -> None:
    """Let ``decoder`` use the encoder's modules, except self-attention (BLIP, section 3.1).

    Shared are modules, not only tensors: no load, cast or copy can take them apart.
    """
    decoder.embeddings = encoder.embeddings
    for ours, theirs in zip(decoder.encoder.layer, encoder.encoder.layer, strict=True):
        ours.crossattention = theirs.crossattention
        ours.intermediate = theirs.intermediate
        ours.output = theirs.output


class Med(nn.Module):
    """BLIP's model with momentum copies (``*_m``) and feature queues.

    Parameters carry transformers' names. Momentum copies take part in no gradient and follow the
    module's train or eval mode, as in the original.
    """

    image_queue: Tensor
    text_queue: Tensor
    image_id_queue: Tensor
    queue_ptr: Tensor

    def __init__(self, config: MedConfig) -> None:
        super().__init__()
        self.config = config
        vision, text, size = config.vision, config.text, config.projection_dim
        self.vision_model = VisionTransformer(vision)
        self.text_encoder = TextStack(text)
        self.text_decoder = _Decoder(text, self.text_encoder)
        self.vision_proj = nn.Linear(vision.width, size)
        self.text_proj = nn.Linear(text.width, size)
        self.itm_head = nn.Linear(text.width, 2)
        self.temp = nn.Parameter(torch.tensor(config.temperature))
        self.vision_model_m = VisionTransformer(vision)
        self.text_encoder_m = TextStack(text)
        self.vision_proj_m = nn.Linear(vision.width, size)
        self.text_proj_m = nn.Linear(text.width, size)
        for name in ("image_queue", "text_queue"):
            queue = F.normalize(torch.randn(size, config.queue_size), dim=0)
            self.register_buffer(name, queue)
        self.register_buffer("image_id_queue", torch.full((config.queue_size,), NO_IMAGE_ID))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))
        self.reset_momentum()

    @torch.no_grad()
    def reset_momentum(self) -> None:
        """Make the momentum copies equal to the online weights, as at the start of training."""
        for online, copy in self._momentum_pairs():
            copy.requires_grad_(False)
            copy.copy_(online)

    @torch.no_grad()
    def begin_step(self) -> None:
        """Clamp the temperature and move the momentum copies on, once before each training step.

        Not part of `forward`: a step may have several batches, and sharded weights are whole only
        inside it.
        """
        self.temp.clamp_(*TEMPERATURE_RANGE)
        online, copies = map(list, zip(*self._momentum_pairs(), strict=True))
        torch._foreach_lerp_(copies, online, 1 - self.config.momentum)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        alpha: float = 0.0,
        *,
        image_ids: Tensor | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
        generator: torch.Generator | None = None,
        workers: Workers | None = None,
        matching: bool = True,
        language: bool = True,
        prompt_length: int = 0,
    ) -> MedLosses:
        """The losses of one batch, after `begin_step`; in train mode also fills the queues.

        - ``pixel_values``: (B, 3, S, S); ``input_ids``, ``attention_mask``: (B, L) int64, texts as
          tokenized, ``[CLS]`` first and ``[SEP]`` last; columns that are all padding are dropped.
        - ``alpha``: weight of the momentum model's soft targets, 0 to 1.
        - ``image_ids``: (B,) int64, not negative, equal for pairs of one image. Used if
          ``config.mask_same_image``.
        - ``negatives``: hard negatives to use instead of drawing them: the image index for each
          text, the text index for each image. ``generator`` draws them otherwise; where workers
          share the batch, theirs does, and indices count all workers' rows.
        - ``workers``: who else holds a part of the batch; their losses average to the whole's.
        - ``matching`` asks for ITC and ITM, ``language`` for LM; fine-tuning wants one of them.
        - ``prompt_length``: leading positions, ``[DEC]`` included, that carry no LM loss.
        """
        input_ids, attention_mask = trimmed(input_ids, attention_mask)
        tokens = self.vision_model(pixel_values)
        image_kv = self.text_encoder.cross_kv(tokens)
        itc = itm = lm = tokens.new_zeros(())
        if matching:
            itc, itm = self.contrastive_and_matching(
                pixel_values,
                tokens,
                image_kv,
                input_ids,
                attention_mask,
                alpha=alpha,
                image_ids=image_ids if self.config.mask_same_image else None,
                negatives=Negatives(*negatives) if negatives is not None else None,
                generator=generator,
                workers=workers,
                floored=True,
            )
        if language:
            lm = self.language_modelling(image_kv, input_ids, prompt_length, workers)
        return MedLosses(itc, itm, lm)

    def contrastive_and_matching(
        self,
        pixel_values: Tensor,
        tokens: Tensor,
        image_kv: list[KeyValue],
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        alpha: float = 0.0,
        image_ids: Tensor | None = None,
        negatives: Negatives | None = None,
        generator: torch.Generator | None = None,
        workers: Workers | None = None,
        floored: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """ITC and ITM from (B, T, Dv) image tokens and their `TextStack.cross_kv`.

        ``floored``: hard negatives are drawn with `negative_floor`, as in the original's
        pretraining (models/blip_pretrain.py), not without, as in its retrieval fine-tuning
        (models/blip_retrieval.py).
        """
        states = self.text_encoder(input_ids, attention_mask, first_only=True)
        online = _Features(unit(self.vision_proj(tokens[:, 0])), unit(self.text_proj(states[:, 0])))
        momentum = self._momentum_features(pixel_values, input_ids, attention_mask)
        own = _candidates(momentum, image_ids)
        shared = workers if workers is not None and workers.share else None
        everyone = own if workers is None else _Candidates(*map(workers.gather, own))
        candidates = own if shared is None else everyone
        rows = slice(None) if shared is None else shared.own(len(tokens))
        known = None if image_ids is None else candidates.image_ids
        same = same_pair(len(candidates.image), known, tokens.device)
        # Scores over a temperature of 0.07 and thousands of candidates want full precision.
        with torch.autocast(tokens.device.type, enabled=False):
            itc, i2t, t2i = self._contrastive(
                online, momentum, candidates, same[rows], image_ids, alpha
            )
        if self.training:
            self._enqueue(everyone)
        if shared is not None:
            i2t, t2i = shared.gather(i2t), shared.gather(t2i)
        if negatives is None:
            source = generator if shared is None else shared.generator
            floor = negative_floor(len(same)) if floored else 0.0
            negatives = draw_negatives(i2t, t2i, same, source, floor)
        itm = self._matching(image_kv, input_ids, attention_mask, negatives, shared)
        return itc, itm

    def language_modelling(
        self,
        image_kv: list[KeyValue],
        input_ids: Tensor,
        prompt_length: int = 0,
        workers: Workers | None = None,
    ) -> Tensor:
        """Mean next-token loss with label smoothing over the tokens that follow the prompt."""
        config = self.config.text
        # Position t predicts token t + 1, so the last one is not run; only positions with a target
        # reach the vocabulary.
        states: Tensor = self.text_decoder.bert(
            starting_with(config.dec_token_id, input_ids[:, :-1]), causal=True, image_kv=image_kv
        )
        wanted = input_ids[:, 1:] != config.pad_token_id
        wanted[:, : max(prompt_length - 1, 0)] = False
        places = wanted.flatten().nonzero().squeeze(1)
        shared = workers if workers is not None and workers.share else None
        if shared is None and not len(places):
            return states.sum() * 0
        logits = self.text_decoder.cls.predictions(states.flatten(0, 1).index_select(0, places))
        targets = input_ids[:, 1:].flatten()[places]
        return cross_entropy(logits, targets, shared, self.config.label_smoothing)

    @torch.no_grad()
    def _momentum_features(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor
    ) -> _Features:
        image = self.vision_model_m(pixel_values, first_only=True)[:, 0]
        text = self.text_encoder_m(input_ids, attention_mask, first_only=True)[:, 0]
        return _Features(unit(self.vision_proj_m(image)), unit(self.text_proj_m(text)))

    def _contrastive(
        self,
        online: _Features,
        momentum: _Features,
        candidates: _Candidates,
        positives: Tensor,
        image_ids: Tensor | None,
        alpha: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The ITC loss and the (B, C) scores of the candidates within the batch, both ways."""
        within = len(candidates.image)
        with torch.no_grad():
            images = torch.cat([candidates.image.T, self.image_queue], dim=1)
            texts = torch.cat([candidates.text.T, self.text_queue], dim=1)
            if image_ids is None:
                positives = F.pad(positives, (0, self.config.queue_size))
            else:
                queued = image_ids[:, None] == self.image_id_queue[None, :]
                positives = torch.cat([positives, queued], dim=1)
            targets_i2t = contrastive_targets(positives, momentum.image @ texts / self.temp, alpha)
            targets_t2i = contrastive_targets(positives, momentum.text @ images / self.temp, alpha)
        i2t, t2i = online.image @ texts / self.temp, online.text @ images / self.temp
        loss = (F.cross_entropy(i2t, targets_i2t) + F.cross_entropy(t2i, targets_t2i)) / 2
        return loss, i2t[:, :within].detach(), t2i[:, :within].detach()

    def _matching(
        self,
        image_kv: list[KeyValue],
        input_ids: Tensor,
        attention_mask: Tensor,
        negatives: Negatives,
        shared: Workers | None,
    ) -> Tensor:
        # An image's own text and its wrong one lie side by side, so that both use its keys and
        # values where they are; only the pairs of a text and a wrong image, last, need copies.
        batch = input_ids.shape[0]
        first = torch.arange(batch, device=input_ids.device)
        own, guests, images, wrong = first, first, *negatives[:2]
        if shared is not None:
            # A text is small: it comes to the worker that holds its image.
            input_ids = shared.gather_padded(input_ids)
            attention_mask = shared.gather_padded(attention_mask)
            rows = shared.own(batch)
            here = negatives.image_index - rows.start
            guests = ((here >= 0) & (here < batch)).nonzero().squeeze(1)
            own, images, wrong = first + rows.start, here[guests], wrong[rows]
        right, wrong_image, wrong_text = matching_labels(
            len(input_ids), negatives, input_ids.device
        ).view(3, -1)
        labels = torch.cat(
            [torch.stack([right[own], wrong_text[own]], 1).flatten(), wrong_image[guests]]
        )
        texts = torch.cat([torch.stack([own, wrong], 1).flatten(), guests])
        if shared is not None:
            needed, texts = torch.unique(texts, return_inverse=True)
            input_ids, attention_mask = input_ids[needed], attention_mask[needed]
        states = self.text_encoder(
            starting_with(self.config.text.enc_token_id, input_ids),
            attention_mask,
            image_kv=image_kv,
            guests=take_rows(image_kv, images) if len(images) else None,
            rows=texts,
            first_only=True,
        )
        return cross_entropy(self.itm_head(states[:, 0]), labels, shared)

    @torch.no_grad()
    def _enqueue(self, pairs: _Candidates) -> None:
        size = self.config.queue_size
        slots = torch.arange(min(len(pairs.image), size), device=self.queue_ptr.device)
        slots = (slots + self.queue_ptr) % size
        self.image_queue[:, slots] = pairs.image[-size:].T
        self.text_queue[:, slots] = pairs.text[-size:].T
        self.image_id_queue[slots] = pairs.image_ids[-size:]
        self.queue_ptr.add_(len(slots)).remainder_(size)

    def _momentum_pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        pairs = (
            (self.vision_model, self.vision_model_m),
            (self.vision_proj, self.vision_proj_m),
            (self.text_encoder, self.text_encoder_m),
            (self.text_proj, self.text_proj_m),
        )
        for online, copy in pairs:
            yield from zip(online.parameters(), copy.parameters(), strict=True)


def _candidates(momentum: _Features, image_ids: Tensor | None) -> _Candidates:
    if image_ids is None:
        count = len(momentum.image)
        image_ids = torch.full((count,), NO_IMAGE_ID, device=momentum.image.device)
    return _Candidates(*momentum, image_ids)
