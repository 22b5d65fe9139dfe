"""The pure arithmetic of BLIP's three pretraining losses (models/blip_pretrain.py of the release).

Nothing here holds weights: features and scores in, a scalar or indices out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_FLOOR, _FLOOR_BATCH = 1e-4, 75

IGNORED = -100


class MedLosses(NamedTuple):
    """The three losses of a step, scalars; a loss that was not asked for is zero."""

    itc: Tensor
    itm: Tensor
    lm: Tensor

    @property
    def total(self) -> Tensor:
        """The plain sum that BLIP minimises."""
        return self.itc + self.itm + self.lm


class Negatives(NamedTuple):
    """Hard negatives within a batch of B pairs, each (B,) int64, and where there was none."""

    image_index: Tensor
    """For each text, the image that it does not describe."""
    text_index: Tensor
    """For each image, the text that does not describe it."""
    none_for_text: Tensor | None = None
    """(B,) bool: no other image could be drawn for this text."""
    none_for_image: Tensor | None = None


def same_pair(batch: int, image_ids: Tensor | None, device: torch.device) -> Tensor:
    """(B, B) bool: pairs that are no negatives of each other.

    The pair itself; with ``image_ids``, (B,) int64, also every pair of the same image.
    """
    if image_ids is None:
        return torch.eye(batch, dtype=torch.bool, device=device)
    return image_ids[:, None] == image_ids[None, :]


def contrastive_targets(positives: Tensor, momentum_scores: Tensor, alpha: float) -> Tensor:
    """Soft ITC targets: alpha · softmax(momentum scores) + (1 - alpha) · positives.

    ``positives``: (B, C) bool over the candidates, spread evenly where a row has several.
    ``momentum_scores``: (B, C), already divided by the temperature. ALBEF, section 3.2.
    """
    hard = positives.to(momentum_scores.dtype)
    hard = hard / hard.sum(1, keepdim=True)
    return torch.lerp(hard, F.softmax(momentum_scores, dim=1), alpha)


def negative_floor(candidates: int) -> float:
    """What pretraining adds to the hard negatives' probabilities, so that every pair can be drawn.

    The original's 1e-4 goes over the 75 pairs of one of its workers. Over more, as where all
    workers' pairs are candidates, it is less by as much: in all they stay as likely to be drawn.
    """
    return _FLOOR * min(1.0, _FLOOR_BATCH / candidates)


@torch.no_grad()
def draw_negatives(
    scores_i2t: Tensor,
    scores_t2i: Tensor,
    excluded: Tensor,
    generator: torch.Generator | None,
    floor: float = 0.0,
) -> Negatives:
    """One hard negative per text and per image, likelier the more similar (ALBEF, section 3.2).

    ``scores_*``: (B, B) similarities within the batch, divided by the temperature; ``excluded``:
    (B, B) bool, symmetric. ``floor``: added to the probabilities; see `negative_floor`. A row
    without any candidate gets an arbitrary one and is marked; one whose scores are not finite
    draws from its candidates alike, so that the loss, not the draw, tells that they are not.
    """
    image_index, none_for_text = _draw(scores_t2i, excluded, generator, floor)
    text_index, none_for_image = _draw(scores_i2t, excluded, generator, floor)
    return Negatives(image_index, text_index, none_for_text, none_for_image)


def _draw(
    scores: Tensor, excluded: Tensor, generator: torch.Generator | None, floor: float
) -> tuple[Tensor, Tensor]:
    scores = scores.float()
    if not floor:
        # Before the softmax: beside a right pair that is far more similar, all others would come
        # to zero. With a floor they do not, and the original's floor counts after the softmax.
        scores = scores.masked_fill(excluded, -torch.inf)
    weights = (F.softmax(scores, dim=1) + floor).nan_to_num_().masked_fill_(excluded, 0)
    none = excluded.all(1, keepdim=True)
    lost = weights.sum(1, keepdim=True) == 0
    weights.masked_fill_(lost & (none | ~excluded), 1)
    return torch.multinomial(weights, 1, generator=generator).squeeze(1), none.squeeze(1)


def matching_labels(batch: int, negatives: Negatives, device: torch.device) -> Tensor:
    """(3B,) int64 for B positives, B texts with a wrong image, B images with a wrong text.

    Rows for which no negative could be drawn are ignored.
    """
    labels = torch.zeros(3, batch, dtype=torch.int64, device=device)
    labels[0] = 1
    if negatives.none_for_text is not None:
        labels[1].masked_fill_(negatives.none_for_text, IGNORED)
    if negatives.none_for_image is not None:
        labels[2].masked_fill_(negatives.none_for_image, IGNORED)
    return labels.flatten()
