"""Training batches as a function of (seed, step): nothing to save, nothing to replay.

All pairs are put in a new random order each epoch and cut into batches; a batch may span two
epochs, so no pair is ever dropped. Worker r of w takes its own part of every global batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stages.errors import SourceError
from stages.models.images import DecodeError, decode
from stages.models.preprocessing import CLIP_MEAN, CLIP_STD
from stages.models.text import clean_caption, encode_texts
from stages.training.augment import augmented
from stages.training.config import Augmentation
from stages.training.shards import Shards

if TYPE_CHECKING:
    from transformers import BertTokenizer

Pixels = npt.NDArray[np.uint8]
TokenIds = npt.NDArray[np.uint16] | npt.NDArray[np.int32]

_TEXTS_AT_ONCE = 10_000
_IDS_OF_TWO_BYTES = 1 << 16
_PREFETCH = 4


class Batch(NamedTuple):
    """B pairs of one worker at one step."""

    step: int
    pixels: Tensor
    """(B, S, S, 3) uint8."""
    input_ids: Tensor
    """(B, L) int64, padded to the longest."""
    attention_mask: Tensor
    """(B, L) int64."""
    image_ids: Tensor
    """(B,) int64, equal for pairs of one image."""

    def to(self, device: torch.device) -> Batch:
        return Batch(self.step, *(part.to(device, non_blocking=True) for part in self[1:]))

    def pixel_values(self) -> Tensor:
        """(B, 3, S, S) float32, normalised with CLIP's mean and deviation."""
        mean = torch.tensor(CLIP_MEAN, device=self.pixels.device)[:, None, None] * 255
        std = torch.tensor(CLIP_STD, device=self.pixels.device)[:, None, None] * 255
        return self.pixels.permute(0, 3, 1, 2).float().sub_(mean).div_(std)


class Pairs:
    """The (image, text) pairs of training tars, tokenized once.

    Texts are cleaned; those of which nothing is left are skipped and counted as ``empty``.
    """

    def __init__(
        self,
        tars: Sequence[Path],
        tokenizer: BertTokenizer,
        *,
        max_tokens: int,
        max_words: int,
        prompt: str = "",
    ) -> None:
        self.shards = Shards(tars)
        kept, self.tokens, self.lengths = _tokenized(
            tokenizer, self.shards.texts, prompt, max_tokens=max_tokens, max_words=max_words
        )
        if not len(self.tokens):
            found = ", ".join(tar.name for tar in tars) or "no tars"
            raise SourceError(f"training set: no image with a text in {found}; nothing to train on")
        self.skipped = self.shards.skipped
        self.skipped["empty"] += int((~kept).sum())
        self.image_of = self.shards.image_of_text[kept]
        """(pairs,): index of each pair's image."""
        self.is_human = self.shards.is_human[kept]
        self.pad = int(tokenizer.pad_token_id)

    def __len__(self) -> int:
        return len(self.image_of)


def _tokenized(
    tokenizer: BertTokenizer, texts: list[str], prompt: str, *, max_tokens: int, max_words: int
) -> tuple[npt.NDArray[np.bool_], TokenIds, npt.NDArray[np.int32]]:
    """Which of ``texts`` are not empty once cleaned, (texts,), and of these, behind ``prompt``,
    padded ids (N, L) and lengths (N,).

    Strings go as their ids come, since all of both at once is more than a worker need have:
    ``texts`` is left empty.
    """
    kind = np.uint16 if len(tokenizer) <= _IDS_OF_TWO_BYTES else np.int32
    tokens = np.empty((len(texts), max_tokens), dtype=kind)  # takes memory only where it is filled
    lengths = np.empty(len(texts), dtype=np.int32)
    kept = np.empty(len(texts), dtype=np.bool_)
    count = 0
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        part = slice(start, start + _TEXTS_AT_ONCE)
        cleaned = [clean_caption(text, max_words) for text in texts[part]]
        texts[part] = [""] * len(cleaned)
        kept[part] = [bool(text) for text in cleaned]
        ids, mask = encode_texts(tokenizer, [prompt + text for text in cleaned if text], max_tokens)
        rows, length = slice(count, count + len(ids)), ids.shape[1]
        tokens[rows, :length], tokens[rows, length:] = ids.numpy(), tokenizer.pad_token_id
        lengths[rows] = mask.sum(1).numpy()
        count += len(ids)
    texts.clear()
    return kept, tokens[:count, : int(lengths[:count].max(initial=0))], lengths[:count]


class Images:
    """Decoded images of the training set, kept in memory as far as ``cache_bytes`` reach."""

    def __init__(self, shards: Shards, size: int, augmentation: Augmentation, cache_bytes: int):
        self._shards, self._size, self._augmentation = shards, size, augmentation
        self._room = cache_bytes
        self._cache: dict[int, Pixels] = {}
        self.broken: set[int] = set()
        """Images that could not be decoded so far."""

    def get(self, image: int, min_scale: float, random_key: tuple[int, int]) -> Pixels | None:
        """(S, S, 3) uint8, or None where the image is broken. ``random_key`` seeds the
        augmentation."""
        pixels = self._cache.get(image)
        if pixels is None:
            pixels = self._decoded(image)
        if pixels is None or self._augmentation == "none":
            return pixels
        from PIL import Image

        random = np.random.Generator(np.random.Philox(key=random_key))
        return np.asarray(augmented(Image.fromarray(pixels), self._size, min_scale, random))

    def _decoded(self, image: int) -> Pixels | None:
        if image in self.broken:
            return None
        try:
            picture = decode(self._shards.read(image))
        except DecodeError:
            self.broken.add(image)
            return None
        if self._augmentation == "none":
            picture = picture.resize((self._size, self._size), 3)  # bicubic, as at inference
        pixels = np.array(picture)
        if pixels.nbytes <= self._room:
            self._room -= pixels.nbytes
            self._cache[image] = pixels
        return pixels


class Loader:
    """Batches by step.

    A pair whose image turns out to be broken gives its place to the next pair in the tars, so
    that batches stay full and the order does not hang on when the damage is found.
    """

    def __init__(
        self,
        pairs: Pairs,
        images: Images,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        human_repeat: int = 1,
        min_scale: float = 1.0,
    ) -> None:
        assert batch_size % world_size == 0
        self.pairs, self.images = pairs, images
        self._batch, self._seed, self._min_scale = batch_size, seed, min_scale
        self._rank, self._local = rank, batch_size // world_size
        human = np.flatnonzero(pairs.is_human)
        self._entries = np.concatenate([np.arange(len(pairs)), *[human] * (human_repeat - 1)])
        self._orders: dict[int, npt.NDArray[np.int64]] = {}

    @property
    def epoch_length(self) -> int:
        """Pairs an epoch, human ones counted as often as they are repeated."""
        return len(self._entries)

    def batch(self, step: int) -> Batch:
        """This worker's part of the batch of ``step``, from 0."""
        first = step * self._batch + self._rank * self._local
        rows, pixels = [], []
        for position in range(first, first + self._local):
            row, picture = self._pair(position)
            rows.append(row)
            pixels.append(picture)
        chosen = np.array(rows)
        lengths = self.pairs.lengths[chosen]
        ids = torch.from_numpy(self.pairs.tokens[chosen, : lengths.max()].astype(np.int64))
        mask = torch.arange(ids.shape[1])[None, :] < torch.from_numpy(lengths)[:, None]
        image_ids = self.pairs.shards.image_ids[self.pairs.image_of[chosen]]
        return Batch(
            step, torch.from_numpy(np.stack(pixels)), ids, mask.long(), torch.from_numpy(image_ids)
        )

    def _pair(self, position: int) -> tuple[int, Pixels]:
        row = self._row(position)
        for _ in range(len(self.pairs)):
            image = int(self.pairs.image_of[row])
            picture = self.images.get(image, self._min_scale, (self._seed, position))
            if picture is not None:
                return row, picture
            row = (row + 1) % len(self.pairs)
        raise SourceError("training set: no image can be decoded; run assemble again")

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, len(self._entries))
        order = self._orders.get(epoch)
        if order is None:
            random = np.random.Generator(np.random.Philox(key=(self._seed, epoch)))
            order = self._entries[random.permutation(len(self._entries))]
            # Other threads may still read the epoch before, so no dict is changed in place.
            before = {k: v for k, v in self._orders.items() if k == epoch - 1}
            self._orders = before | {epoch: order}
        return int(order[place])

    def batches(self, start: int, stop: int, threads: int) -> Iterator[Batch]:
        """Batches of steps ``start`` to ``stop``, prepared ahead by ``threads`` threads."""
        if threads == 0:
            yield from map(self.batch, range(start, stop))
            return
        with ThreadPoolExecutor(threads) as pool:
            ahead: deque[Future[Batch]] = deque()
            try:
                for step in range(start, stop):
                    while len(ahead) < max(_PREFETCH, threads) and step + len(ahead) < stop:
                        ahead.append(pool.submit(self.batch, step + len(ahead)))
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()
