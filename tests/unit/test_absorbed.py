"""Attention without keys and values against projections and attention, in double precision."""

import pytest
import torch
from torch import nn

from stages.models.absorbed import Absorbed, few_queries
from stages.models.config import TextConfig

HEADS, WIDTH, SEEN, TOKENS = 4, 32, 48, 17


@pytest.mark.parametrize("threads", [1, 3, 20])
@pytest.mark.parametrize("texts, length", [(1, 1), (3, 1), (1, 4), (2, 3)])
@torch.inference_mode()
def test_it_equals_attention_over_keys_and_values(
    texts: int, length: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    key, value = (nn.Linear(SEEN, WIDTH, dtype=torch.float64) for _ in range(2))
    images = torch.randn(2, TOKENS, SEEN, dtype=torch.float64)
    query = torch.randn(2 * texts, length, WIDTH, dtype=torch.float64)
    ours = Absorbed(key, value, HEADS)(query, images)

    of_heads = (2, -1, HEADS, WIDTH // HEADS)
    q, k, v = (x.reshape(of_heads).transpose(1, 2) for x in (query, key(images), value(images)))
    weights = (q @ k.transpose(2, 3) / (WIDTH // HEADS) ** 0.5).softmax(dim=-1)
    expected = (weights @ v).transpose(1, 2).reshape(query.shape)
    assert (ours - expected).abs().max() < 1e-12


def test_products_break_even_where_the_docstring_says() -> None:
    base = TextConfig()
    assert (base.width, base.vision_width, base.heads) == (768, 768, 12)
    assert 62 < few_queries(577, base) / 1.5 < 63
    assert few_queries(17, base) < few_queries(197, base) < few_queries(577, base)
