"""What `tests.bench.capfilt` compares: ours, transformers', and data-juicer's operators."""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoProcessor,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
)

from stages.models.captioner import Captioner
from stages.models.config import GenerationConfig
from stages.models.feeding import ahead
from stages.models.matcher import Matcher
from tests.bench import blip

NEW_TOKENS = 20
Images = Sequence[Image.Image]
Inputs = dict[str, Tensor]
Run = Callable[[Images], object]


@dataclass(frozen=True)
class Setting:
    """What every contender is given."""

    folder: Path
    device: str
    dtype: torch.dtype
    batch: int
    threads: int
    int8: bool = False
    resize_threads: int = 1
    """Threads that resize pictures ahead of the model; a loop over single images has none."""

    @property
    def captioner(self) -> Path:
        return self.folder / "captioner"

    @property
    def matcher(self) -> Path:
        return self.folder / "matcher"


def generation(prompt_tokens: int) -> GenerationConfig:
    """Exactly `NEW_TOKENS` tokens behind the prompt."""
    length = prompt_tokens + NEW_TOKENS
    return GenerationConfig(min_tokens=length, max_tokens=length)


def our_captions(setting: Setting) -> Run:
    captioner = Captioner(
        setting.captioner, setting.device, setting.dtype, setting.batch, int8=setting.int8
    )
    captioner.threads = setting.resize_threads
    config = generation(len(captioner.prompt_ids(GenerationConfig())))
    # The sha256 of an image's file, which download has made.
    return lambda images: captioner(images, [bytes([n % 256]) for n in range(len(images))], config)


def our_scores(setting: Setting) -> Run:
    matcher = Matcher(
        setting.matcher, setting.device, setting.dtype, setting.batch, int8=setting.int8
    )
    matcher.threads = setting.resize_threads
    return lambda images: matcher.match(images, blip.texts(len(images)))


def their_captions(setting: Setting) -> Run:
    processor = AutoProcessor.from_pretrained(setting.captioner)
    model: Any = BlipForConditionalGeneration.from_pretrained(
        setting.captioner, dtype=setting.dtype
    )
    model = model.to(setting.device).eval()

    def prepare(images: Images) -> Inputs:
        text = ["a picture of"] * len(images)
        return processor(images=list(images), text=text, return_tensors="pt")

    def run(inputs: Inputs) -> object:
        ids = model.generate(
            **inputs, do_sample=True, top_p=0.9, top_k=50, repetition_penalty=1.1,
            min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS,
        )  # fmt: skip
        return processor.batch_decode(ids, skip_special_tokens=True)

    return batched(setting, prepare, run)


def their_scores(setting: Setting) -> Run:
    processor = AutoProcessor.from_pretrained(setting.matcher)
    model: Any = BlipForImageTextRetrieval.from_pretrained(setting.matcher, dtype=setting.dtype)
    model = model.to(setting.device).eval()

    def prepare(images: Images, texts: Sequence[Sequence[str]]) -> Inputs:
        flat = [text for own in texts for text in own]
        return dict(processor(images=list(images), text=flat, padding=True, return_tensors="pt"))

    def run(inputs: Inputs) -> object:
        pixels = inputs["pixel_values"]
        each = len(inputs["input_ids"]) // len(pixels)
        inputs["pixel_values"] = pixels.repeat_interleave(each, dim=0)
        return model(**inputs).itm_score.softmax(dim=-1)[:, 1].tolist()

    @torch.inference_mode()
    def one_at_a_time(images: Images) -> object:
        texts = blip.texts(1)[0]
        return [
            run(placed(prepare([image], [[text]]), setting)) for image in images for text in texts
        ]

    if setting.batch == 1:
        return one_at_a_time
    return batched(setting, lambda images: prepare(images, blip.texts(len(images))), run)


def batched(
    setting: Setting, prepare: Callable[[Images], Inputs], run: Callable[[Inputs], object]
) -> Run:
    """``run`` over batches that ``prepare`` makes in threads ahead, in page-locked memory where
    there is a GPU, as a data loader does; single images it takes as they come."""

    def prepared(images: Images) -> Inputs:
        gpu = setting.device == "cuda"
        return {n: t.pin_memory() if gpu else t for n, t in prepare(images).items()}

    @torch.inference_mode()
    def over(images: Images) -> object:
        size, threads = setting.batch, setting.resize_threads
        parts = [images[at : at + size] for at in range(0, len(images), size)]
        ready = ahead(prepared, parts, threads, threads) if size > 1 else map(prepare, parts)
        return [run(placed(inputs, setting)) for inputs in ready]

    return over


def placed(inputs: Inputs, setting: Setting) -> Inputs:
    moved = {n: t.to(setting.device, non_blocking=True) for n, t in inputs.items()}
    return {n: t.to(setting.dtype) if t.is_floating_point() else t for n, t in moved.items()}


def by_batches(size: int, run: Run) -> Run:
    return lambda images: [run(images[at : at + size]) for at in range(0, len(images), size)]


def juicer(kind: str) -> Callable[[Setting], Run]:
    """data-juicer's operator for ``kind``, its model and batch size being the setting's; its
    methods are called as version 1.6.1 names them."""

    def build(setting: Setting) -> Run:
        import data_juicer.ops.filter as filters
        import data_juicer.ops.mapper as mappers

        kept = Path(tempfile.mkdtemp())
        if kind == "captions":
            operator: Any = mappers.ImageCaptioningMapper(hf_img2seq=str(setting.captioner))
        else:
            operator = filters.ImageTextMatchingFilter(hf_blip=str(setting.matcher))
        torch.set_num_threads(setting.threads)  # some versions set one thread when imported

        def run(images: Images) -> object:
            files = [kept / f"{index}.png" for index in range(len(images))]
            for file, image in zip(files, images, strict=True):
                image.save(file)
            texts = [["a picture"]] if kind == "captions" else blip.texts(len(images))
            rows = [
                {"images": [str(file)], "text": f"<__dj__image> {text} <|__dj__eoc|>",
                 "__dj__stats__": {}}
                for file, own in zip(files, itertools.cycle(texts), strict=False)
                for text in own
            ]  # fmt: skip
            if kind == "scores":
                return [operator.compute_stats_single(row) for row in rows]
            return operator.process_batched({key: [row[key] for row in rows] for key in rows[0]})

        return by_batches(setting.batch, run)

    return build


def contenders(kind: str) -> dict[str, Callable[[Setting], Run]]:
    ours, theirs = (
        (our_captions, their_captions) if kind == "captions" else (our_scores, their_scores)
    )
    found = {"ours": ours, "transformers": theirs}
    if find_spec("data_juicer"):
        found[f"data-juicer {version('py-data-juicer')}"] = juicer(kind)
    return found


def decoded(count: int, quick: bool) -> list[Image.Image]:
    files = blip.pictures(count, (64, 48) if quick else (640, 480))
    return [Image.open(io.BytesIO(data)).convert("RGB") for data in files]
