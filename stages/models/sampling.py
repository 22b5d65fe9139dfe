"""How the next token is chosen: score filters, nucleus sampling without a generator, beam search.

The filters give the distributions of transformers' logits processors, in `generate`'s order:
repetition penalty, minimum length, then (sampling only) top-k and top-p. Noise comes from
`uniforms`, fixed before decoding starts, so a caption depends on its image and the seed alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NOT_FINITE = -1
"""Fills the ids of a caption during which the model's logits became infinite or no numbers."""

_NEVER = -1.0e9  # transformers' stand-in for a score of minus infinity in beam search


def uniforms(
    seed: int, keys: Sequence[bytes], captions: int, steps: int
) -> npt.NDArray[np.float64]:
    """Noise in [0, 1) of shape (images, ``captions``, ``steps``).

    Element (i, c, t) is a function of (``seed``, ``keys[i]``, c, t) alone: one Philox stream
    (Salmon et al. 2011), keyed by the seed and the image's sha256, counted by c and t. More
    captions or steps leave the earlier numbers as they are.
    """
    noise = np.empty((len(keys), captions, steps), dtype=np.float64)
    for image, key in enumerate(keys):
        digest = hashlib.blake2b(key, digest_size=16, key=str(seed).encode()).digest()
        philox_key = int.from_bytes(digest, "little")
        for caption in range(captions):
            # The raw words are a documented constant of Philox; Generator's methods may change.
            raw = np.random.Philox(key=philox_key, counter=[0, 0, caption, 0]).random_raw(steps)
            noise[image, caption] = (raw >> np.uint64(11)) * 2.0**-53
    return noise


def penalise_repeats(scores: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Scores of tokens in ``ids`` moved down: divided by ``penalty`` if positive, else multiplied.

    ``scores`` (N, V) float32, ``ids`` (N, L) int64, prompt included. CTRL (Keskar et al. 2019),
    section 4.1. Returns ``scores`` itself where the penalty is 1.
    """
    if penalty == 1.0:
        return scores
    seen = scores.gather(1, ids)
    return scores.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))


def forbid(scores: Tensor, token: int) -> Tensor:
    """``scores`` (N, V) with ``token`` made impossible."""
    scores = scores.clone()
    scores[:, token] = -torch.inf
    return scores


def nucleus(scores: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """The distribution that nucleus sampling draws from (Holtzman et al. 2020).

    ``scores`` (N, V) float32. Of the ``top_k`` best tokens (0 = all), keeps the smallest set whose
    probability reaches ``top_p``. Returns (probabilities, token ids), both (N, K), best first;
    tokens outside the set have probability 0.
    """
    size = scores.shape[-1]
    best, tokens = scores.topk(min(top_k, size) if top_k else size, dim=-1)
    # Summed from the least probable, as transformers does: the same roundings at the border.
    tail = best.softmax(dim=-1).flip(-1).cumsum(dim=-1).flip(-1)
    outside = tail <= 1 - top_p
    outside[:, 0] = False
    return best.masked_fill(outside, -torch.inf).softmax(dim=-1), tokens


def draw(probabilities: Tensor, tokens: Tensor, noise: Tensor) -> Tensor:
    """One token for each row by inverting the cumulative distribution at ``noise``.

    ``probabilities`` and ``tokens`` (N, K) from `nucleus`; ``noise`` (N,) float64 in [0, 1).
    Returns (N,) int64. Never a token of probability 0; any token of a row that is not finite.
    """
    cumulative = probabilities.double().cumsum(dim=-1)
    point = noise[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, point, right=True)
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    return tokens.gather(1, torch.minimum(index, last).clamp(min=0))[:, 0]


@dataclass(frozen=True)
class Rules:
    """What every method obeys. Lengths count the prompt."""

    min_tokens: int
    max_tokens: int
    penalty: float
    eos: int
    pad: int

    def apply(self, scores: Tensor, ids: Tensor) -> Tensor:
        """Scores (N, V) float32 of the token that follows ``ids`` (N, L), filtered."""
        scores = penalise_repeats(scores, ids, self.penalty)
        return forbid(scores, self.eos) if ids.shape[1] < self.min_tokens else scores


class Samples:
    """Captions that grow each for itself: nucleus sampling, or the best token where greedy."""

    def __init__(
        self,
        prompt: Tensor,
        noise: Tensor,
        rules: Rules,
        *,
        nucleus: tuple[int, float] | None,
    ) -> None:
        """``prompt`` (P,) int64; ``noise`` (images, captions, ``max_tokens``) float64 in [0, 1),
        on the same device; ``nucleus``: top_k and top_p, None = greedy."""
        self.rules, self.noise, self.nucleus = rules, noise, nucleus
        self.length = len(prompt)
        self.ids = prompt.new_full((*noise.shape[:2], rules.max_tokens), rules.pad)
        self.ids[..., : self.length] = prompt
        self._ended = torch.zeros(noise.shape[:2], dtype=torch.bool, device=prompt.device)
        self._lost = self._ended.clone()

    @property
    def going(self) -> Tensor:
        """(images,) bool: which images have captions that are not finished."""
        return ~self._ended.all(dim=1) & (self.length < self.rules.max_tokens)

    @property
    def last(self) -> Tensor:
        """(images x captions,) the tokens that were chosen last."""
        return self.ids[:, :, self.length - 1].flatten()

    def results(self) -> Tensor:
        """(images, captions, ``max_tokens``) int64; captions that are lost hold `NOT_FINITE`."""
        return self.ids.masked_fill(self._lost[..., None], NOT_FINITE)

    def keep(self, order: Tensor) -> None:
        """Go on with images ``order`` (M,) int64 alone, in that order."""
        for name in ("ids", "noise", "_ended", "_lost"):
            setattr(self, name, getattr(self, name)[order])

    def step(self, logits: Tensor) -> None:
        """Extend every caption by one token; ``logits`` (images x captions, V) float32."""
        scores = self.rules.apply(logits, self.ids[..., : self.length].flatten(0, 1))
        if self.nucleus is None:
            best, chosen = scores.max(dim=-1)
        else:
            probabilities, tokens = nucleus(scores, *self.nucleus)
            best = probabilities[:, 0]
            chosen = draw(probabilities, tokens, self.noise[..., self.length].flatten())
        chosen = chosen.view_as(self._ended).masked_fill(self._ended, self.rules.pad)
        self.ids[:, :, self.length] = chosen
        # What is no number counts as the largest, so the best tells of the whole row.
        lost = ~best.isfinite().view_as(self._ended) & ~self._ended
        self._lost = self._lost | lost
        self._ended = self._ended | lost | (chosen == self.rules.eos)
        self.length += 1


class Beams:
    """Beam search over a batch of images, step for step transformers' ``_beam_search``.

    Length penalty 1, ``early_stopping=False``. An image may leave as soon as it is not `going`:
    from then on transformers would change nothing of its result.
    """

    def __init__(self, prompt: Tensor, images: int, beams: int, rules: Rules) -> None:
        """``prompt`` (P,) int64, on the device of the search."""
        device = prompt.device
        self.rules = rules
        self.prompt_length = self.length = len(prompt)
        self.ids = prompt.new_full((images, beams, rules.max_tokens), rules.pad)
        self.ids[..., : self.length] = prompt
        self._scores = torch.zeros(images, beams, device=device)
        self._scores[:, 1:] = _NEVER  # all beams start equal: only the first may branch
        self._best_ids = self.ids.clone()
        self._best_scores = torch.full((images, beams), _NEVER, device=device)
        self._finished = torch.zeros(images, beams, dtype=torch.bool, device=device)
        self._open = torch.ones(images, dtype=torch.bool, device=device)
        self._lost = ~self._open

    @property
    def going(self) -> Tensor:
        """(images,) bool: for which images a better caption is possible."""
        return self._open & (self.length < self.rules.max_tokens)

    @property
    def last(self) -> Tensor:
        """(images x beams,) the last token of each running beam."""
        return self.ids[:, :, self.length - 1].flatten()

    def results(self) -> Tensor:
        """(images, beams, ``max_tokens``) int64, the best caption first; those of an image that is
        lost hold `NOT_FINITE`."""
        return self._best_ids.masked_fill(self._lost[:, None, None], NOT_FINITE)

    def keep(self, order: Tensor) -> None:
        """Go on with images ``order`` (M,) int64 alone, in that order."""
        names = "ids", "_scores", "_best_ids", "_best_scores", "_finished", "_open", "_lost"
        for name in names:
            setattr(self, name, getattr(self, name)[order])

    def step(self, logits: Tensor) -> Tensor:
        """Extend every beam by one token; ``logits`` (images x beams, V) float32.

        Returns (images x beams,) int64: the row whose decoder state each new beam continues.
        """
        images, beams = self._scores.shape
        size = logits.shape[-1]
        ids = self.ids[..., : self.length].flatten(0, 1)
        log_probs = logits.log_softmax(dim=-1)
        # One logit that is not finite makes NaN of its whole row.
        lost = log_probs[:, 0].isnan().view(images, beams).any(dim=1)
        self._lost, self._open = self._lost | lost, self._open & ~lost
        log_probs = self.rules.apply(log_probs, ids)
        total = log_probs.view(images, beams, -1) + self._scores[:, :, None]
        scores, index = total.flatten(1).topk(2 * beams, dim=-1)
        source, tokens = index // size, index % size
        extended = _take(self.ids, source)
        extended[:, :, self.length] = tokens
        ended = (tokens == self.rules.eos) | (self.length + 1 >= self.rules.max_tokens)
        self._finish(extended, scores, ended)
        running = scores + ended.float() * _NEVER
        chosen = running.topk(beams, dim=-1)[1]
        self.ids, self._scores = _take(extended, chosen), running.gather(1, chosen)
        self.length += 1
        self._close()
        offset = torch.arange(images, device=source.device)[:, None] * beams
        return (source.gather(1, chosen) + offset).flatten()

    def _finish(self, ids: Tensor, scores: Tensor, ended: Tensor) -> None:
        beams = self._scores.shape[1]
        ended = ended & (torch.arange(ended.shape[1], device=ended.device) < beams)
        scores = scores / (self.length + 1 - self.prompt_length)
        scores = scores + (~self._open[:, None]).float() * _NEVER + (~ended).float() * _NEVER
        merged = torch.cat([self._best_scores, scores], dim=1)
        self._best_scores, index = merged.topk(beams, dim=-1)
        self._best_ids = _take(torch.cat([self._best_ids, ids], dim=1), index)
        self._finished = torch.cat([self._finished, ended], dim=1).gather(1, index)

    def _close(self) -> None:
        possible = self._scores[:, :1] / (self.length - self.prompt_length)
        worst = self._best_scores.amin(dim=1, keepdim=True)
        worst = torch.where(self._finished, worst, _NEVER)
        self._open = self._open & (possible > worst).any(dim=1)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """(B, N, L) rows picked by (B, M) indices along the second axis."""
    return rows.gather(1, index[:, :, None].expand(-1, -1, rows.shape[-1]))
