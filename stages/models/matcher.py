"""BLIP's filter: how well texts match an image, by the matching head and by the contrastive one.

    from PIL import Image
    from stages.models.matcher import Matcher

    matcher = Matcher("Salesforce/blip-itm-base-coco")
    print(matcher.match([Image.open("cat.jpg")], [["a cat", "two dogs"]]))

Each image is encoded once, and its cross-attention keys and values computed once for all of its
texts. As BLIP trains it, and unlike transformers' forward, the matching head sees ``[ENC]`` at
position 0, the contrastive head ``[CLS]``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from stages.errors import ConfigError
from stages.models.base import InferenceModel
from stages.models.blocks import TextStack, starting_with, trimmed, unit
from stages.models.folders import ModelFolder
from stages.models.text import clean_caption, encode_texts, fitted_to
from stages.models.vision import VisionTransformer

MATCH = 1  # index of "matches" among the two outputs of the matching head
TEXTS_AN_IMAGE = 4  # at once, for each image of a batch: texts are that much smaller


@dataclass(frozen=True)
class Images:
    """Encoded images: ``tokens`` (N, T, D) in the model's dtype, ``features`` (N, E) float32 of
    length 1; both on the model's device."""

    tokens: Tensor
    features: Tensor

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True)
class Texts:
    """Encoded texts: ``input_ids`` and ``mask`` (N, L) int64, ``[CLS]`` at position 0, and
    ``features`` (N, E) float32 of length 1; all on the model's device."""

    input_ids: Tensor
    mask: Tensor
    features: Tensor

    def __len__(self) -> int:
        return len(self.features)


class Matcher(InferenceModel):
    """An image-text matcher over a `BlipForImageTextRetrieval` folder or hub id.

    ``max_tokens`` counts [CLS] and [SEP]; longer texts are cut (35: models/blip_retrieval.py).
    Raises `CheckpointError` where the folder holds no BLIP matcher.
    """

    def __init__(
        self,
        model: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
        int8: bool = False,
        max_tokens: int = 35,
    ) -> None:
        super().__init__(device, dtype, batch_size, int8)
        folder = ModelFolder.open(model)
        parts = ("vision_model.", "text_encoder.", "vision_proj.", "text_proj.", "itm_head.")
        folder.require("blip", parts, "a BLIP matcher (BlipForImageTextRetrieval)")
        vision, text, width = folder.blip()
        if not 3 <= max_tokens <= text.max_positions:
            raise ConfigError(
                f"max_tokens {max_tokens} is not between 3 and the {text.max_positions} positions "
                f"of {model}"
            )
        self.tokenizer = folder.tokenizer()
        self.preprocessing = folder.preprocessing(vision.image_size, crop=False)
        self.max_tokens = max_tokens
        text = fitted_to(text, self.tokenizer)
        encoder = folder.part(lambda: TextStack(text), "text_encoder.", ignored=("pooler.",))
        self.vision = self.place(folder.part(lambda: VisionTransformer(vision), "vision_model."))
        self.encoder = self.place(encoder)
        self.vision_proj = folder.linear("vision_proj.", vision.width, width).to(self.device)
        self.text_proj = folder.linear("text_proj.", text.width, width).to(self.device)
        self.itm_head = folder.linear("itm_head.", text.width, 2).to(self.device)

    @torch.inference_mode()
    def match(
        self, images: Sequence[Image.Image] | Tensor, texts: Sequence[Sequence[str]]
    ) -> list[list[tuple[float, float]]]:
        """(ITM probability, ITC cosine) of each text with its image, in order.

        ``images``: any mode and size, turned as their EXIF says; or what `preprocessing` makes of
        them. ``texts``: for each image any number of texts, none included; they are cleaned here,
        as BLIP's training texts are, and scored even where nothing is left of them, which the
        filter stage gives a status instead. The probability is softmax(ITM)[match] in [0, 1],
        CapFilt's score; the cosine lies in [-1, 1]. Raises `ValueError` where there are not as
        many lists of texts as images.
        """
        if len(images) != len(texts):
            raise ValueError(
                f"{len(texts)} lists of texts for {len(images)} images; give one for each"
            )
        batches = self.over(images, lambda pixels, part: self._match_batch(pixels, texts[part]))
        return [scores for batch in batches for scores in batch]

    __call__ = match

    def _match_batch(
        self, pixels: Tensor, texts: Sequence[Sequence[str]]
    ) -> list[list[tuple[float, float]]]:
        owners = [image for image, own in enumerate(texts) for _ in own]
        if not owners:
            return [[] for _ in texts]
        encoded = self.encode_images(pixels)
        words = self.encode_texts([text for own in texts for text in own])
        rows = torch.tensor(owners)
        logits = self.itm_logits(encoded, words, torch.stack([rows, torch.arange(len(rows))], 1))
        matching = logits.softmax(dim=-1)[:, MATCH].tolist()
        cosines = (encoded.features[rows.to(self.device)] * words.features).sum(dim=-1).tolist()
        pairs = iter(zip(matching, cosines, strict=True))
        return [[next(pairs) for _ in own] for own in texts]

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image] | Tensor) -> Images:
        """Image tokens and contrastive features, ``batch_size`` images at a time; at least one."""
        whole = torch.cat(list(self.over(images, lambda pixels, _: self.vision(pixels))))
        return Images(whole, unit(self.vision_proj(whole[:, 0].float())))

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Texts:
        """Token ids and contrastive features of ``texts``, cleaned; at least one."""
        cleaned = [clean_caption(text) for text in texts]
        ids, mask = encode_texts(self.tokenizer, cleaned, self.max_tokens)
        self.tokens += int(mask.sum())
        ids, mask = ids.to(self.device), mask.to(self.device)

        def run(part: slice) -> Tensor:
            own, seen = trimmed(ids[part], mask[part])
            states = self.encoder(own, seen, first_only=True)
            return unit(self.text_proj(states[:, 0].float()))

        features = self.batches(len(texts), run, each=TEXTS_AN_IMAGE)
        return Texts(ids, mask, torch.cat(list(features)))

    def has_tokens(self, texts: Sequence[str]) -> list[bool]:
        """Of each text, whether the model reads anything between [CLS] and [SEP]: cleaning leaves
        invisible characters, which are no tokens."""
        _, mask = encode_texts(self.tokenizer, [clean_caption(text) for text in texts], 3)
        return (mask.sum(dim=1) > 2).tolist() if texts else []

    @torch.inference_mode()
    def itm_logits(self, images: Images, texts: Texts, pairs: Tensor) -> Tensor:
        """The matching head's two outputs for each pair, (M, 2) float32, index `MATCH` = match.

        ``pairs``: (M, 2) int64 of (image, text) indices, in any order. Pairs are worked through
        image by image, so that an image's keys and values are computed once, or once for each
        4 x ``batch_size`` of its texts.
        """
        pairs = pairs.to(self.device)
        counts = pairs[:, 0].bincount()
        # Images with as many texts stand together: their keys and values then serve without copies.
        order = (counts[pairs[:, 0]] * len(counts) + pairs[:, 0]).argsort(stable=True)
        own, sizes = pairs[order], counts[pairs[order, 0]].tolist()
        blocks = self.batches(
            len(pairs),
            lambda block: self._itm_block(images, texts, own[block]),
            each=TEXTS_AN_IMAGE,
            cut=lambda start: self._block_end(sizes, start),
        )
        logits = torch.empty(len(pairs), 2, device=self.device)
        logits[order] = torch.cat([logits[:0], *blocks])
        return logits

    def _block_end(self, sizes: Sequence[int], start: int) -> int:
        """Where a block of images with equally many pairs ends: ``sizes`` are each pair's image's
        number of pairs, ascending.

        A block has 4 x ``batch_size`` pairs at most; an image with more is cut up.
        """
        most, count = TEXTS_AN_IMAGE * self.batch_size, sizes[start]
        if count > most:
            inside = (start - bisect_left(sizes, count)) % count
            return min(start + most, start - inside + count)
        return min(start + most // count * count, bisect_right(sizes, count))

    def _itm_block(self, images: Images, texts: Texts, pairs: Tensor) -> Tensor:
        owners = cast(Tensor, torch.unique_consecutive(pairs[:, 0]))
        image_kv = self.encoder.cross_kv(images.tokens[owners])
        ids, mask = trimmed(texts.input_ids[pairs[:, 1]], texts.mask[pairs[:, 1]])
        ids = starting_with(self.encoder.config.enc_token_id, ids)
        states = self.encoder(ids, mask, image_kv=image_kv, first_only=True)
        return cast(Tensor, self.itm_head(states[:, 0].float()))
