"""Sizes of MED and its parts, and how captions are decoded. Every worker reads these, those that
never open a model too, so nothing here imports torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.base import Config

INITIALIZER_STD = 0.02
TEMPERATURE_RANGE = (0.001, 0.5)


def _check_heads(width: int, heads: int) -> None:
    """Refuse a width that does not split into equal heads."""
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of heads {heads}")


class VisionConfig(Config):
    """Sizes of the image encoder; the defaults are ViT-B/16 at BLIP's pretraining resolution."""

    image_size: int = Field(default=224, ge=1)
    patch_size: int = Field(default=16, ge=1)
    width: int = Field(default=768, ge=1)
    layers: int = Field(default=12, ge=1)
    heads: int = Field(default=12, ge=1)
    mlp_width: int = Field(default=3072, ge=1)
    eps: float = Field(default=1e-6, gt=0)
    initializer_std: float = Field(default=INITIALIZER_STD, gt=0)
    """Of fresh weights. BLIP's 0.02 suits widths of about 768; narrow models that start from
    nothing learn much faster with about 0.6 / sqrt(width)."""
    position_std: float = Field(default=INITIALIZER_STD, gt=0)
    """Of fresh position embeddings. Far below the patches' own size, where things are is learned
    long after what they are."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth: in training, how likely a sample skips attention, or the MLP, of the last
    layer; linearly less towards the first one's 0. The original has 0.1 in ViT-L and none in ViT-B
    (models/blip.py, ``create_vit``). Model folders do not hold it."""

    @model_validator(mode="after")
    def _sizes_fit(self) -> VisionConfig:
        _check_heads(self.width, self.heads)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        return self

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class TextConfig(Config):
    """Sizes of the text stack; the defaults are BERT-base with BLIP's two extra tokens."""

    vocab_size: int = Field(default=30524, ge=1)
    width: int = Field(default=768, ge=1)
    layers: int = Field(default=12, ge=1)
    heads: int = Field(default=12, ge=1)
    mlp_width: int = Field(default=3072, ge=1)
    max_positions: int = Field(default=512, ge=1)
    vision_width: int = Field(default=768, ge=1)
    eps: float = Field(default=1e-12, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    initializer_std: float = Field(default=INITIALIZER_STD, gt=0)
    """Of fresh weights; see `VisionConfig.initializer_std`."""
    pad_token_id: int = Field(default=0, ge=0)
    cls_token_id: int = Field(default=101, ge=0)
    sep_token_id: int = Field(default=102, ge=0)
    dec_token_id: int = Field(default=30522, ge=0)
    enc_token_id: int = Field(default=30523, ge=0)

    @model_validator(mode="after")
    def _sizes_fit(self) -> TextConfig:
        _check_heads(self.width, self.heads)
        return self


class MedConfig(Config):
    """MED's sizes and the constants of its losses; the defaults are BLIP's with ViT-B/16."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    projection_dim: int = Field(default=256, ge=1)
    queue_size: int = Field(default=57_600, ge=1)
    momentum: float = Field(default=0.995, ge=0, le=1)
    temperature: float = Field(default=0.07, ge=TEMPERATURE_RANGE[0], le=TEMPERATURE_RANGE[1])
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    max_text_tokens: int = Field(default=30, ge=3)
    mask_same_image: bool = True

    @model_validator(mode="after")
    def _parts_fit(self) -> MedConfig:
        if self.text.vision_width != self.vision.width:
            raise ValueError(
                f"text.vision_width {self.text.vision_width} must equal vision.width "
                f"{self.vision.width}"
            )
        return self


class GenerationConfig(Config):
    """How captions are decoded; the defaults are CapFilt's (models/blip.py, ``generate``).

    ``min_tokens`` and ``max_tokens`` count the prompt and its [DEC], as the original does.
    ``top_k`` 0 is no limit. ``repetition_penalty`` None is the original's: 1.1 for nucleus
    sampling, none otherwise.
    """

    method: Literal["nucleus", "beam", "greedy"] = "nucleus"
    prompt: str = "a picture of "
    captions_per_image: int = Field(1, ge=1)
    min_tokens: int = Field(5, ge=1)
    max_tokens: int = Field(20, ge=2)
    top_p: float = Field(0.9, gt=0, le=1)
    top_k: int = Field(50, ge=0)
    repetition_penalty: float | None = Field(None, gt=0)
    num_beams: int = Field(3, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _fields_fit(self) -> GenerationConfig:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}")
        most = {"nucleus": self.captions_per_image, "beam": self.num_beams, "greedy": 1}
        if self.captions_per_image > most[self.method]:
            raise ValueError(
                f"captions_per_image {self.captions_per_image} needs method 'nucleus', "
                f"or 'beam' with as many num_beams"
            )
        return self

    @property
    def penalty(self) -> float:
        if self.repetition_penalty is None:
            return 1.1 if self.method == "nucleus" else 1.0
        return self.repetition_penalty
