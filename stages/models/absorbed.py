"""Cross-attention of a few queries over an image's tokens, without keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_FEW = 1.5
"""Queries of an image, in head widths. Below one it takes fewer products than keys and values do;
what these cost in memory moves the border, by measurement on two CPU cores."""


class Absorbed(nn.Module):
    """Attention whose key and value projections are absorbed into the queries and the results.

    With x an image's tokens, q·(K x) = (Kᵀ q)·x and Σ p (V x) = V (Σ p x): queries are projected
    instead of tokens, to as many scores and means (DeepSeek-V2, 2024, section 2.1.2, for caches).
    Keys and values cost 4·T·Dv·D an image and layer however few queries read them, and a decoding
    step then reads 2·T·D numbers of each layer; this costs 4·T·Dv·heads a query, and reads the same
    T·Dv numbers in all layers. The key's bias adds the same to all scores of a query, so softmax
    leaves nothing of it; what p multiplies sums to one, so the value's bias is added as it is.
    """

    key: Tensor
    value: Tensor
    bias: Tensor

    def __init__(self, key: nn.Linear, value: nn.Linear, heads: int) -> None:
        """Weights are shared with ``key`` and ``value``, until one of them moves."""
        super().__init__()
        of_heads = heads, -1, key.in_features
        self.register_buffer("key", key.weight.detach().view(of_heads), False)
        self.register_buffer("value", value.weight.detach().view(of_heads), False)
        self.register_buffer("bias", value.bias.detach(), False)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """(N, L, D) mixed values of (N, L, D) queries over (B, T, Dv) tokens, each of whose rows
        serves N / B consecutive rows of ``query``."""
        heads, head_width, _ = self.key.shape
        split = query.reshape(len(tokens), -1, heads, head_width)
        absorbed = torch.einsum("brhd,hdv->bhrv", split, self.key)
        # All queries of an image are queries of one head over its tokens.
        images = tokens[:, None]
        mixed = F.scaled_dot_product_attention(
            absorbed.flatten(1, 2)[:, None], images, images, scale=head_width**-0.5
        )
        values = torch.einsum("bhrv,hdv->brhd", mixed.view_as(absorbed), self.value)
        return values.reshape(query.shape) + self.bias


def few_queries(head_width: int) -> int:
    """The most queries of an image for which `Absorbed` takes less time than keys and values."""
    return int(_FEW * head_width)
