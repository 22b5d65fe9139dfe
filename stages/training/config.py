"""How MED is pretrained and fine-tuned. Every worker reads these, those that never train too, so
nothing here imports torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stages.base import Config, operational
from stages.models.config import MedConfig, VisionConfig

Augmentation = Literal["none", "blip"]
Decay = Literal["step", "cosine", "epoch_cosine"]
Parallel = Literal["ddp", "fsdp2"]


class TrainingConfig(Config):
    """Optimiser, schedule and data order; subclasses set the paper's values of their stage."""

    batch_size: int = Field(2880, ge=1)
    """Pairs a step, over all workers and batches; must be divisible by their number."""
    accumulate: int = Field(1, ge=1)
    """Batches that a step's pairs are cut into, to save memory. ITC and ITM compare pairs within
    one batch and with the queue, which is filled after each; momentum copies move once a step. A
    loss is the mean of its batches' means: in LM a token weighs more where its batch has fewer."""
    global_negatives: bool = True
    """ITC's candidates and ITM's negatives come from all workers' pairs, and losses are means over
    all of them, as if one worker held the batch. False: each worker's own, as the original's
    pretraining does."""
    epochs: float = Field(20, gt=0)
    steps: int | None = Field(None, ge=1)
    """Optimiser steps; takes the place of ``epochs``."""
    lr: float = Field(3e-4, gt=0)
    min_lr: float = Field(1e-6, ge=0)
    warmup_lr: float = Field(1e-6, ge=0)
    warmup_steps: int = Field(0, ge=0)
    decay: Decay = "cosine"
    """See `stages.training.schedule.Schedule`."""
    decay_rate: float = Field(0.9, gt=0, le=1)
    weight_decay: float = Field(0.05, ge=0)
    muon_lr: float | None = Field(None, gt=0)
    """Learning rate of Muon for the matrices of hidden layers, on the same schedule; None leaves
    all to AdamW, as the paper does. See `stages.training.optimizer`."""
    alpha: float = Field(0.4, ge=0, le=1)
    """Weight of the momentum model's soft targets in ITC, after the ramp."""
    alpha_epochs: float = Field(2, ge=0)
    """Length of alpha's ramp from 0."""
    clip_grad_norm: float | None = Field(None, gt=0)
    """Largest gradient norm; None, as the original, does not clip."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast. The original trains in float32."""
    augmentation: Augmentation = "blip"
    """blip: random crop, flip, RandAugment. none: for texts that a flip would make wrong."""
    min_scale: float = Field(0.2, gt=0, le=1)
    """Smallest part of an image's area that a random crop keeps."""
    max_words: int = Field(30, ge=1)
    """Words of a text that are read."""
    seed: int = Field(0, ge=0)
    compile: bool = False
    """torch.compile the layers; needs a C compiler. Rounds differently."""
    parallel: Parallel = operational("ddp")
    """What several workers hold: ddp all of the model, fsdp2 a part each."""
    gradient_checkpointing: bool = operational(False)
    """Compute layers again in the backward pass instead of keeping what they computed."""
    checkpoint_every_steps: int = operational(500, ge=1)
    log_every: int = operational(50, ge=1)
    """Steps a line of the training log."""
    threads: int | None = operational(None, ge=1)
    """Threads of torch; None leaves them as they are. Other numbers may round differently."""
    data_threads: int = operational(2, ge=0)
    """Threads that prepare batches ahead; 0 prepares each when it is needed."""
    cache_mb: int = operational(1024, ge=0)
    """Memory for decoded images, MB a worker."""

    def uneven(self, workers: int) -> str | None:
        """What to say where a step's pairs cannot be shared out evenly among ``workers``."""
        parts = workers * self.accumulate
        if self.batch_size % parts == 0:
            return None
        return (
            f"batch_size: {self.batch_size} pairs cannot be shared out evenly among {workers} "
            f"workers in {self.accumulate} batches; give a multiple of {parts}"
        )

    @model_validator(mode="after")
    def _optimizer_fits(self) -> TrainingConfig:
        if self.muon_lr is not None and self.parallel == "fsdp2":
            raise ValueError("muon_lr needs whole matrices; parallel 'fsdp2' parts them, use 'ddp'")
        return self


class PretrainConfig(TrainingConfig):
    """The paper's pretraining at 14M images by default (configs/pretrain.yaml of the release)."""

    # Fingerprints cover the content of tokenizer and the inits, which are inputs of the stage.
    tokenizer: str = Field(json_schema_extra={"operational": True})
    """Folder or hub id of a BERT tokenizer; decides vocabulary size and token ids."""
    model: MedConfig = MedConfig()
    init: str | None = operational(None)
    """MED folder or hub id to go on from; None starts from scratch, the paper's best."""
    init_vision: str | None = operational(None)
    """ViT or DeiT, transformers folder or hub id, from which the image encoder starts; its sizes
    must be ``model.vision``'s, but for the image size. The paper: ImageNet weights."""
    init_text: str | None = operational(None)
    """BERT, folder or hub id, from which the text stack and the LM head start; its sizes must be
    ``model.text``'s and ``tokenizer`` its own. The paper: bert-base-uncased."""
    warmup_steps: int = Field(3000, ge=0)
    decay: Decay = "step"
    human_repeat: int = Field(1, ge=1)
    """How many times an epoch passes over each human pair."""

    @model_validator(mode="after")
    def _one_start(self) -> PretrainConfig:
        if self.init is not None and (self.init_vision or self.init_text):
            raise ValueError(
                "init is a whole MED; give it alone, or init_vision and init_text without it"
            )
        return self


class FinetuneConfig(TrainingConfig):
    """What captioner and filter have in common (configs/caption_coco.yaml, retrieval_coco.yaml)."""

    image_size: int = Field(384, ge=1)
    """Pixels; position embeddings are interpolated where MED was trained at another size."""
    dropout: float = Field(0.1, ge=0, lt=1)
    drop_path: float = Field(0.0, ge=0, lt=1)
    """See `VisionConfig.drop_path`: of the image encoder, 0.1 where it is the original's ViT-L."""
    batch_size: int = Field(256, ge=1)
    lr: float = Field(1e-5, gt=0)
    min_lr: float = Field(0.0, ge=0)
    decay: Decay = "epoch_cosine"
    min_scale: float = Field(0.5, gt=0, le=1)

    def med_config(self) -> MedConfig:
        """What `load_med` reads of it: image size, dropout and stochastic depth."""
        config = MedConfig()
        # The folder decides the patch size, so it is not validated against ours.
        ours = {"image_size": self.image_size, "drop_path": self.drop_path}
        vision = VisionConfig().model_copy(update=ours)
        text = config.text.model_copy(update={"dropout": self.dropout})
        return config.model_copy(update={"vision": vision, "text": text})


class CaptionerFinetuneConfig(FinetuneConfig):
    """The paper's captioner: LM on COCO."""

    epochs: float = Field(5, gt=0)
    prompt: str = "a picture of "
    """Stands before every text and carries no loss. Captioning needs the same."""
    max_tokens: int = Field(40, ge=3)
    label_smoothing: float = Field(0.1, ge=0, lt=1)

    def med_config(self) -> MedConfig:
        # Nothing is queued: the smallest queue takes the least memory.
        update = {"label_smoothing": self.label_smoothing, "queue_size": 1}
        return super().med_config().model_copy(update=update)


class FilterFinetuneConfig(FinetuneConfig):
    """The paper's filter: retrieval fine-tuning with ITC and ITM on COCO."""

    epochs: float = Field(6, gt=0)
    alpha_epochs: float = Field(1, ge=0)
    max_tokens: int = Field(35, ge=3)
    queue_size: int = Field(57_600, ge=1)
    momentum: float = Field(0.995, ge=0, le=1)
    text_negatives: int = Field(0, ge=0)
    """Near-miss texts of each pair: its caption with one word exchanged for another that human
    captions have in the same place (`stages.training.swaps`). Sharpens ITM
    beyond the paper, and lowers its probabilities, since fewer of its rows match."""

    def med_config(self) -> MedConfig:
        update = {"queue_size": self.queue_size, "momentum": self.momentum}
        return super().med_config().model_copy(update=update)
