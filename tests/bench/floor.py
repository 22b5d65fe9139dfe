"""The least time that the hardware needs, with the counting written out.

FLOPs are those of the matrix products (a multiply-add is two); bytes are the weights that each
decoding step must read again and what each step reads of the image: its keys and values, or its
tokens where these are cheaper (`stages.models.absorbed`). Norms, GELU, softmax and sampling count
as free. Work comes in phases that must follow each other: an image is encoded before its caption is
decoded. A phase takes FLOPs / matrix rate or bytes / copy bandwidth, whichever is longer, as if the
shorter one hid behind it; the floor is the sum over the phases. Both rates are measured here, on
the same machine and in the same run. That two batches could overlap, one being encoded while
another is decoded, is not counted: nobody here does it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import BlipConfig

from stages.models.linear import Int8Linear, multiplies_bfloat16


@dataclass(frozen=True)
class Work:
    """One phase of one image: ``linear`` and ``attention`` FLOPs, and ``bytes`` to read."""

    linear: float
    attention: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(
            self.linear + other.linear,
            self.attention + other.attention,
            self.bytes + other.bytes,
        )


def vision_work(config: BlipConfig) -> Work:
    """One image through the vision tower.

    Patches: 2·P·(3·p²)·D. A layer, T = P + 1 tokens: 2·T·(4·D² + 2·D·M) and attention 4·T²·D.
    """
    v = config.vision_config
    patches = (v.image_size // v.patch_size) ** 2
    tokens, width = patches + 1, v.hidden_size
    layer = 2 * tokens * (4 * width**2 + 2 * width * v.intermediate_size)
    first = 2 * patches * 3 * v.patch_size**2 * width
    return Work(first + v.num_hidden_layers * layer, v.num_hidden_layers * 4 * tokens**2 * width, 0)


def image_keys_work(config: BlipConfig) -> Work:
    """Cross-attention's keys and values of one image, once: 2·T·2·Dv·D a layer."""
    t = config.text_config
    return Work(
        t.num_hidden_layers
        * 4
        * _tokens(config)
        * config.vision_config.hidden_size
        * t.hidden_size,
        0,
        0,
    )


def text_work(config: BlipConfig, tokens: int, *, grounded: bool) -> Work:
    """``tokens`` tokens of one text: 2·(4·D² + 2·D·M) a token and layer, 2·2·D² more and attention
    4·T·D over the image where ``grounded``; among themselves 4·D a pair of tokens."""
    t = config.text_config
    width, layers = t.hidden_size, t.num_hidden_layers
    linear = 2 * tokens * (4 * width**2 + 2 * width * t.intermediate_size)
    attention = 4 * width * tokens * tokens
    if grounded:
        linear += 2 * tokens * 2 * width**2
        attention += 4 * width * tokens * _tokens(config)
    return Work(layers * linear, layers * attention, 0)


def caption_work(
    config: BlipConfig,
    prompt: int,
    new: int,
    batch: int,
    itemsize: int,
    image_itemsize: int,
    *,
    absorbed: bool = False,
) -> tuple[Work, Work]:
    """One image captioned with ``new`` tokens behind ``prompt`` ones, in a batch of ``batch``: its
    encoding, and its decoding.

    The last token is chosen, not fed: prompt + new - 1 go through the decoder, ``new`` through the
    language head, 2·(D² + D·V) each. Each of the ``new`` steps reads all weights of decoder and
    head once for the batch, ``itemsize`` bytes each, and the image's keys and values, 2·T·D a
    layer of ``image_itemsize`` bytes, once. With ``absorbed``, as `stages.models.absorbed` has it,
    nobody makes keys and values: a token costs `absorbed_work` instead, and a step reads 2·D·Dv
    weights more a layer, and the image's tokens, T·Dv, once.
    """
    t, seen = config.text_config, config.vision_config.hidden_size
    width, layers = t.hidden_size, t.num_hidden_layers
    head = width**2 + width * t.vocab_size
    weights = layers * (6 * width**2 + 2 * width * t.intermediate_size) + head
    read = layers * 2 * _tokens(config) * width
    encoded, decoded = vision_work(config), Work(2 * new * head, 0, 0)
    if absorbed:
        weights += layers * 2 * width * seen
        read = _tokens(config) * seen
        decoded += absorbed_work(config, prompt + new - 1)
    else:
        encoded += image_keys_work(config)
        decoded += text_work(config, prompt + new - 1, grounded=True)
    return encoded, decoded + Work(0, 0, new * (itemsize * weights / batch + image_itemsize * read))


def absorbed_work(config: BlipConfig, tokens: int) -> Work:
    """``tokens`` tokens of one text over an image without keys and values: `text_work` with
    attention 4·T·Dv·heads a token and layer over the image, and 4·D·Dv more."""
    t, seen = config.text_config, config.vision_config.hidden_size
    layers, width = t.num_hidden_layers, t.hidden_size
    over_image = 4 * _tokens(config) * (seen * t.num_attention_heads - width)
    return text_work(config, tokens, grounded=True) + Work(
        layers * tokens * 4 * width * seen, layers * tokens * over_image, 0
    )


def filter_work(config: BlipConfig, lengths: tuple[int, ...]) -> tuple[Work]:
    """One image with a text of each of ``lengths`` tokens: ITM and ITC of each."""
    work = vision_work(config) + image_keys_work(config)
    for tokens in lengths:
        work += text_work(config, tokens, grounded=True)
        work += text_work(config, tokens, grounded=False)
    return (work,)


def _tokens(config: BlipConfig) -> int:
    v = config.vision_config
    return int((v.image_size // v.patch_size) ** 2 + 1)


@dataclass(frozen=True)
class Machine:
    """What the device does at its best: FLOP/s of matrix products, in float and as the linear
    layers run (int8 or the same), and bytes read and written a second by a large copy."""

    rate: float
    linear_rate: float
    bandwidth: float

    def floor(self, phases: Sequence[Work]) -> float:
        """Seconds an image."""
        return sum(
            max(work.linear / self.linear_rate + work.attention / self.rate,
                work.bytes / self.bandwidth)
            for work in phases
        )  # fmt: skip


def measure(device: str, dtype: torch.dtype, int8: bool, *, quick: bool = False) -> Machine:
    """The best of several tries at BLIP-base's own shapes. A GPU does a call of that size in some
    20 us, no longer than it takes to start one: there the products are sixteen times as large, and
    calls are timed in a row."""
    rows, inner = (256, 256) if quick else (4096, 3072)
    rows *= 16 if device == "cuda" else 1
    products = 2.0 * rows * 768 * inner
    # Attention over images is in bfloat16 beside int8 layers, where that is fast.
    halved = int8 and multiplies_bfloat16()
    a = torch.randn(rows, 768, device=device, dtype=torch.bfloat16 if halved else dtype)
    b = torch.randn(768, inner, device=device, dtype=a.dtype)
    out = a @ b
    rate = products / _best(lambda: torch.mm(a, b, out=out), device)
    linear_rate = rate
    if int8:
        layer, levels = Int8Linear(nn.Linear(768, inner)), torch.full((rows, 768), 127.0)
        linear_rate = products / _best(lambda: layer.products(levels), device)
    source = torch.ones((1 if quick else 256) * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Machine(rate, linear_rate, 2 * len(source) / _best(lambda: target.copy_(source), device))


def _best(run: Callable[[], object], device: str, tries: int = 10) -> float:
    """Seconds of one call."""
    calls = 20 if device == "cuda" else 1
    seconds = []
    for _ in range(tries + 2):
        started = time.perf_counter()
        for _ in range(calls):
            run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - started) / calls)
    return min(seconds[2:])
