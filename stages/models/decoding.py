"""Decoding steps over buffers that stay in place; on a GPU each step is one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from stages.models.blocks import Cache, ImageKV, KeyValue, LMHead, TextStack


class Decoding:
    """The decoder's state for a batch of images: ``width`` consecutive rows for each."""

    def __init__(
        self,
        decoder: TextStack,
        head: LMHead,
        image_kv: ImageKV,
        width: int,
        capacity: int,
    ) -> None:
        """``image_kv``: as `TextStack` takes it, overwritten here; ``capacity``: most tokens."""
        self.decoder, self.head, self.width = decoder, head, width
        self.image_kv, self.images = image_kv, len(_tensors(image_kv)[0])
        self.cache: Cache = decoder.new_cache(self.images * width, capacity)

    def start(self, prompt: Tensor) -> Tensor:
        """Logits (images x width, V) float32 behind the prompt, computed once for each image."""
        logits = self._logits(prompt.expand(self.images, -1), self.images)
        rows = torch.arange(self.images, device=prompt.device).repeat_interleave(self.width)
        self.reorder(rows)
        return logits[rows]

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (images x width, V) float32 behind one more token for each row."""
        return self._logits(tokens[:, None], self.images)

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from what row ``rows[i]`` has seen."""
        if self.width > 1:
            self.cache.reorder(rows)

    def keep(self, order: Tensor) -> None:
        """Go on with images ``order`` alone, an order from `compacted`.

        Only the images that move are copied: what cross-attention reads is large.
        """
        slots = torch.arange(len(order), device=order.device)
        moved = order != slots
        holes, movers = slots[moved], order[moved]
        for kept in _tensors(self.image_kv):
            kept[holes] = kept[movers]
        columns = torch.arange(self.width, device=order.device)
        self.cache.reorder((order[:, None] * self.width + columns).flatten())
        self.images = len(order)

    def _logits(self, ids: Tensor, images: int) -> Tensor:
        image_kv = _first(self.image_kv, images)
        states = self.decoder(ids, causal=True, image_kv=image_kv, cache=self.cache)
        return cast(Tensor, self.head(states[:, -1])).float()


class GraphedDecoding(Decoding):
    """The same steps as CUDA graphs, captured where first needed and replayed in later batches.

    A graph belongs to one number of tokens and one size: a batch of n images runs in the smallest
    of ``slots``, ``slots`` / 2, ``slots`` / 4, … that holds it, the rows beyond it being nobody's.
    On a CPU the steps run as they are, so that tests reach all but the capture.
    """

    def __init__(
        self, decoder: TextStack, head: LMHead, slots: int, width: int, capacity: int
    ) -> None:
        like, text = decoder.embeddings.position_embeddings.weight, decoder.config
        self.decoder, self.head, self.width = decoder, head, width
        self.slots, self.capacity, self.images = slots, capacity, 0
        self.image_kv: list[KeyValue] = []
        self.cache = decoder.new_cache(slots * width, capacity)
        self.tokens = torch.zeros(slots * width, dtype=torch.int64, device=like.device)
        self.logits = torch.zeros(slots * width, text.vocab_size, device=like.device)
        self._steps: dict[tuple[int, int], Callable[[], None]] = {}
        self._pool: Any = None
        self._side: Any = None

    def begin(self, image_kv: list[KeyValue]) -> None:
        """Take up a new batch of at most ``slots`` images."""
        self.images, self.cache.length = len(image_kv[0][0]), 0
        if not self.image_kv:
            self.image_kv = [
                (
                    key.new_zeros(self.slots, *key.shape[1:]),
                    value.new_zeros(self.slots, *value.shape[1:]),
                )
                for key, value in image_kv
            ]
        for kept, new in zip(self.image_kv, image_kv, strict=True):
            kept[0][: self.images], kept[1][: self.images] = new

    def step(self, tokens: Tensor) -> Tensor:
        rows = self.images * self.width
        self.tokens[:rows] = tokens
        key = self._bucket(), self.cache.length
        if key not in self._steps:
            self._steps[key] = self._captured(*key)
        self._steps[key]()
        self.cache.length += 1
        return self.logits[:rows]

    def _bucket(self) -> int:
        size = self.slots
        while (size + 1) // 2 >= self.images and size > 1:
            size = (size + 1) // 2
        return size

    def _captured(self, images: int, length: int) -> Callable[[], None]:
        rows = images * self.width

        def run() -> None:
            self.cache.length = length
            self.logits[:rows] = self._logits(self.tokens[:rows, None], images)
            self.cache.length = length

        if self.tokens.device.type != "cuda":
            return run
        # Captures record a stream of the current device, which may be another than the model's.
        with torch.cuda.device(self.tokens.device):
            return self._captured_here(run)

    def _captured_here(self, run: Callable[[], None]) -> Callable[[], None]:
        # Libraries set themselves up at their first call, which a capture would not survive. The
        # step writes what it will write again.
        if self._side is None:
            # Ours, since the stream that torch keeps for captures is of the device that captured
            # first; one for all, since a pool's blocks are used again within one stream only.
            self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side = self._side
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # One pool for all: each step's intermediates are done with when the next one starts.
        with torch.cuda.graph(graph, pool=self._pool, stream=side):
            run()
        self._pool = graph.pool()
        return graph.replay


def _tensors(image_kv: ImageKV) -> list[Tensor]:
    """All that it holds, each (images, …)."""
    if isinstance(image_kv, Tensor):
        return [image_kv]
    return [tensor for pair in image_kv for tensor in pair]


def _first(image_kv: ImageKV, images: int) -> ImageKV:
    if isinstance(image_kv, Tensor):
        return image_kv[:images]
    return [(key[:images], value[:images]) for key, value in image_kv]


def compacted(going: Tensor) -> Tensor:
    """Indices of the true elements; those within the new length stay where they are."""
    order = torch.arange(int(going.sum()))
    holes = (~going[: len(order)]).nonzero()[:, 0]
    movers = going[len(order) :].nonzero()[:, 0] + len(order)
    order[holes] = movers
    return order
