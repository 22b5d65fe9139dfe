"""Cross-attention of a few queries over an image's tokens, without keys and values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.config import TextConfig

_GAIN = 1.5
"""What not writing and reading keys and values is worth, in products; by measurement on two CPU
cores at BLIP-base's size."""


class Absorbed(nn.Module):
    """Attention whose key and value projections are absorbed into the queries and the results.

    With x an image's tokens, q·(K x) = (Kᵀ q)·x and Σ p (V x) = V (Σ p x): instead of T tokens,
    only the queries are projected, and what they have gathered (as DeepSeek-V2, 2024, section
    2.1.2, does with its cache). The key's bias adds the same to all scores of a query, so softmax
    leaves nothing of it; the weights p sum to one, so the value's bias is added as it is.

    All layers read the same T·Dv numbers, where a decoding step reads 2·T·D of each layer's keys
    and values. A query takes more products, and a token none: see `few_queries`.
    """

    key: Tensor
    value: Tensor
    bias: Tensor

    def __init__(self, key: nn.Linear, value: nn.Linear, heads: int) -> None:
        """Takes the weights of ``key`` and ``value``, which stay in memory for it when these are
        laid out anew: 54 MiB for the twelve layers of BLIP-base."""
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
        # To torch, all queries of an image are queries of one head, or of as few as keep every
        # thread busy: the fewer, the larger the products.
        groups = _groups(len(tokens), heads)
        images = tokens[:, None].expand(-1, groups, -1, -1)
        mixed = F.scaled_dot_product_attention(
            absorbed.reshape(len(tokens), groups, -1, tokens.shape[-1]),
            images,
            images,
            scale=head_width**-0.5,
        )
        values = torch.einsum("bhrv,hdv->brhd", mixed.reshape(absorbed.shape), self.value)
        return values.reshape(query.shape) + self.bias


def _groups(images: int, heads: int) -> int:
    """The smallest divisor of ``heads`` that gives each thread an image or a part of one."""
    threads = torch.get_num_threads()
    return next((n for n in range(1, heads) if heads % n == 0 and n * images >= threads), heads)


def few_queries(tokens: int, text: TextConfig) -> float:
    """The most queries of an image of ``tokens`` tokens for which `Absorbed` takes less time.

    FLOPs of a layer: keys and values 4·T·Dv·D an image and 4·T·D a query; absorbed, 4·T·Dv·heads
    and 4·D·Dv a query. At BLIP-base's size, 384 pixels, products break even at 62 queries.
    """
    width, seen = text.width, text.vision_width
    more = tokens * seen * text.heads + width * seen - tokens * width
    return _GAIN * tokens * seen * width / more
