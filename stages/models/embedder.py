"""Images and texts as unit vectors of one space: CLIP's, or that of BLIP's contrastive head.

    from PIL import Image
    from stages.models.embedder import Embedder

    embedder = Embedder("openai/clip-vit-base-patch32")
    print(embedder.embed_images([Image.open("cat.jpg")]) @ embedder.embed_texts(["a cat"]).T)

Vectors have length 1, so that their products are cosines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from stages.errors import CheckpointError
from stages.models.base import InferenceModel
from stages.models.blocks import TextStack, trimmed, unit
from stages.models.folders import ModelFolder, config_errors, one_line
from stages.models.matcher import TEXTS_AN_IMAGE
from stages.models.preprocessing import Preprocessing
from stages.models.text import clean_caption, encodable, encode_texts, fitted_to
from stages.models.vision import VisionTransformer

if TYPE_CHECKING:
    from transformers import BertTokenizer, CLIPModel, CLIPTokenizer

_NEEDED = "a CLIP model (CLIPModel) or a BLIP model with a contrastive head (vision_proj)"
_MED_TEXT_TOKENS = 35  # as the matcher reads texts


class Embedder(InferenceModel):
    """An embedder of images and texts over a CLIP folder, a BLIP folder, or a hub id of either.

    ``config.json``'s model_type decides which. ``batch_size`` counts images; texts go four times
    as many at a time. Raises `CheckpointError` where the folder holds neither.
    """

    def __init__(
        self,
        model: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
        int8: bool = False,
    ) -> None:
        super().__init__(device, dtype, batch_size, int8)
        folder = ModelFolder.open(model)
        kinds: dict[str, Callable[[ModelFolder, InferenceModel], _Towers]] = {
            "clip": _Clip,
            "blip": _Med,
        }
        if folder.kind not in kinds:
            raise CheckpointError(
                f"{model}: found model_type '{folder.kind}', need {_NEEDED}; "
                "give its folder or hub id"
            )
        self.towers = kinds[folder.kind](folder, self)
        self.preprocessing = self.towers.preprocessing

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.towers.dim

    def embed_images(self, images: Sequence[Image.Image] | Tensor) -> npt.NDArray[np.float16]:
        """(N, D) float16 vectors of length 1 from images of any mode and size, turned as their EXIF
        says, or from what `preprocessing` makes of them."""
        return self.image_features(images).numpy().astype(np.float16)

    def embed_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float16]:
        """(N, D) float16 vectors of length 1; texts longer than the model reads are cut.

        BLIP's texts are cleaned as in its training, CLIP's taken as they are.
        """
        return self.text_features(texts).numpy().astype(np.float16)

    @torch.inference_mode()
    def image_features(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        """`embed_images` before rounding: (N, D) float32 on the CPU."""

        def run(pixels: Tensor, _: slice) -> Tensor:
            return unit(self.towers.images(pixels)).cpu()

        return torch.cat([torch.empty(0, self.dim), *self.over(images, run)])

    @torch.inference_mode()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """`embed_texts` before rounding: (N, D) float32 on the CPU."""

        def run(part: slice) -> Tensor:
            return unit(self.towers.texts(texts[part])).cpu()

        features = self.batches(len(texts), run, each=TEXTS_AN_IMAGE)
        return torch.cat([torch.empty(0, self.dim), *features])


class _Towers(Protocol):
    preprocessing: Preprocessing
    dim: int

    def images(self, pixels: Tensor) -> Tensor: ...
    def texts(self, texts: Sequence[str]) -> Tensor: ...


class _Clip:
    """transformers' CLIPModel, its attention being torch's SDPA."""

    def __init__(self, folder: ModelFolder, runs: InferenceModel) -> None:
        from transformers import CLIPConfig, CLIPModel

        folder.require("clip", ("vision_model.", "visual_projection."), _NEEDED)
        try:
            config = CLIPConfig.from_pretrained(folder.path)
            # Its random weights, replaced at once, must not advance the caller's generator.
            with torch.random.fork_rng(devices=[]):
                model = CLIPModel(config)  # attention is SDPA by default
        except config_errors() as error:
            raise CheckpointError(f"{folder.source}: config.json: {one_line(error)}") from error
        self.folder, self.device = folder, runs.device
        self.dim = int(cast(Any, config).projection_dim)
        vision, self.text_config = cast(Any, config.vision_config), cast(Any, config.text_config)
        self.preprocessing = folder.preprocessing(vision.image_size, crop=True)
        filled = cast(torch.nn.Module, folder.fill(model, ""))
        self.model = cast("CLIPModel", runs.place(filled))

    def images(self, pixels: Tensor) -> Tensor:
        pooled = self.model.vision_model(pixel_values=pixels).pooler_output
        return cast(Tensor, self.model.visual_projection(pooled))

    def texts(self, texts: Sequence[str]) -> Tensor:
        batch = self.tokenizer(
            [encodable(text) for text in texts],
            padding=True,
            truncation=True,
            max_length=self.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.device)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        pooled = self.model.text_model(**inputs).pooler_output
        return cast(Tensor, self.model.text_projection(pooled))

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        from transformers import CLIPTokenizer

        path = self.folder.path
        # Without files, transformers makes a tokenizer of three tokens and says nothing.
        if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise CheckpointError(
                f"{self.folder.source}: no tokenizer.json and no vocab.json; need CLIP's tokenizer "
                "to embed texts"
            )
        try:
            tokenizer = CLIPTokenizer.from_pretrained(path)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{self.folder.source}: tokenizer: {one_line(error)}") from error
        if len(tokenizer) > self.text_config.vocab_size:
            raise CheckpointError(
                f"{self.folder.source}: the tokenizer has {len(tokenizer)} tokens, config.json "
                f"says {self.text_config.vocab_size}; need the tokenizer of the same model"
            )
        return cast("CLIPTokenizer", tokenizer)


class _Med:
    """BLIP's vision tower and text encoder, each with its projection (BLIP, section 3.2, ITC)."""

    def __init__(self, folder: ModelFolder, runs: InferenceModel) -> None:
        folder.require("blip", ("vision_model.", "vision_proj."), _NEEDED)
        vision, self.text, self.dim = folder.blip()
        self.folder, self.runs = folder, runs
        self.preprocessing = folder.preprocessing(vision.image_size, crop=False)
        self.vision = runs.place(folder.part(lambda: VisionTransformer(vision), "vision_model."))
        vision_proj = folder.linear("vision_proj.", vision.width, self.dim)
        self.vision_proj = vision_proj.to(runs.device)

    def images(self, pixels: Tensor) -> Tensor:
        return cast(Tensor, self.vision_proj(self.vision(pixels, first_only=True)[:, 0].float()))

    def texts(self, texts: Sequence[str]) -> Tensor:
        cleaned = [clean_caption(text) for text in texts]
        most = min(_MED_TEXT_TOKENS, self._encoder.config.max_positions)
        ids, mask = trimmed(*encode_texts(self._tokenizer, cleaned, most))
        device = self.runs.device
        first = self._encoder(ids.to(device), mask.to(device), first_only=True)
        return cast(Tensor, self._text_proj(first[:, 0].float()))

    # Only those who embed texts pay for the text encoder.
    @cached_property
    def _tokenizer(self) -> BertTokenizer:
        self.folder.require("blip", ("text_encoder.", "text_proj."), _NEEDED)
        return self.folder.tokenizer()

    @cached_property
    def _encoder(self) -> TextStack:
        text = fitted_to(self.text, self._tokenizer)
        encoder = self.folder.part(lambda: TextStack(text), "text_encoder.", ignored=("pooler.",))
        return self.runs.place(encoder)

    @cached_property
    def _text_proj(self) -> torch.nn.Linear:
        text_proj = self.folder.linear("text_proj.", self.text.width, self.dim)
        return text_proj.to(self.runs.device)
