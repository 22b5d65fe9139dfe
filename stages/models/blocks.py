"""BLIP's building blocks: the vision transformer, the text stack and its language head.

Parameters carry the names that transformers gives to BLIP's parts, so a BLIP folder's tensors load
unchanged once the part's prefix is stripped:

    VisionTransformer   ``vision_model.``
    TextStack           ``text_encoder.`` or ``text_decoder.bert.`` (without ``pooler.``)
    LMHead              ``text_decoder.cls.predictions.``

Every part is exact: what is skipped (positions that nobody reads, image keys computed twice) does
not enter the result. Attention is torch's `scaled_dot_product_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stages.models.absorbed import Absorbed
from stages.models.config import TextConfig
from stages.models.linear import gelu_of
from stages.models.vision import initialise, run_layer, split_heads

KeyValue = tuple[Tensor, Tensor]
"""Keys and values of one layer, each (batch, heads, positions, head width)."""
ImageKV = Sequence[KeyValue] | Tensor
"""What cross-attention reads: each layer's keys and values, or the (B, T, Dv) image tokens."""


@dataclass
class Cache:
    """Self-attention's keys and values of all earlier positions, in buffers that stay in place."""

    layers: list[KeyValue]
    """Each (rows, heads, capacity, head width); a call may use fewer rows, the first ones."""
    length: int = 0
    """Positions that are filled."""

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on from what row ``rows[i]`` has seen; (M,) int64, M rows at most."""
        for pair in self.layers:
            for kept in pair:
                seen = kept[:, :, : self.length]
                seen[: len(rows)] = seen[rows]


class _TextEmbeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.width, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.eps)
        self.dropout = config.dropout

    def forward(self, input_ids: Tensor, start: int) -> Tensor:
        positions = self.position_embeddings.weight[start : start + input_ids.shape[1]]
        states = self.LayerNorm(self.word_embeddings(input_ids) + positions)
        return F.dropout(states, self.dropout, self.training) if self.dropout else states


class _Projections(nn.Module):
    def __init__(self, config: TextConfig, source_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(source_width, config.width)
        self.value = nn.Linear(source_width, config.width)


class _ResidualOutput(nn.Module):
    """Dense, dropout, then LayerNorm over the sum with the residual (BERT's post-norm)."""

    def __init__(self, config: TextConfig, source_width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(source_width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.eps)
        self.dropout = config.dropout

    def forward(self, states: Tensor, residual: Tensor) -> Tensor:
        states = self.dense(states)
        if self.dropout:
            states = F.dropout(states, self.dropout, self.training)
        return cast(Tensor, self.LayerNorm(states + residual))


class _Attention(nn.Module):
    def __init__(self, config: TextConfig, source_width: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.self = _Projections(config, source_width)
        self.output = _ResidualOutput(config, config.width)
        self.absorbed: Absorbed | None = None

    def key_value(self, source: Tensor) -> KeyValue:
        key, value = self.self.key(source), self.self.value(source)
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def forward(
        self,
        states: Tensor,
        key_value: KeyValue | Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        guests: KeyValue | None = None,
    ) -> Tensor:
        """``key_value`` may have fewer rows than ``states``: then each of its rows serves the same
        number of consecutive rows of ``states``, as if repeated, without the copies. The last rows
        of ``states`` use ``guests``, one row each, if there are any. A tensor is what keys and
        values are made of, for `Absorbed`, which masks nothing."""
        query = self.self.query(states)
        if guests is None:
            mixed = self._mix(query, key_value, mask, causal)
        else:
            split = len(query) - len(guests[0])
            parts = (query[:split], key_value), (query[split:], guests)
            mixed = torch.cat([self._mix(*part, mask, causal) for part in parts])
        return cast(Tensor, self.output(mixed, states))

    def _mix(
        self, query: Tensor, key_value: KeyValue | Tensor, mask: Tensor | None, causal: bool
    ) -> Tensor:
        if isinstance(key_value, Tensor):
            assert self.absorbed is not None and not self.training, "absorb() is for inference"
            return cast(Tensor, self.absorbed(query, key_value))
        key, value = key_value
        shape = query.shape
        if key.shape[0] != shape[0]:
            query = query.view(key.shape[0], -1, shape[-1])
        mixed = F.scaled_dot_product_attention(
            split_heads(query, self.heads),
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
        )
        return mixed.transpose(1, 2).reshape(shape)


class _Intermediate(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.mlp_width)

    def forward(self, states: Tensor) -> Tensor:
        return gelu_of(self.dense, states)


class _TextLayer(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.attention = _Attention(config, config.width)
        self.crossattention = _Attention(config, config.vision_width)
        self.intermediate = _Intermediate(config)
        self.output = _ResidualOutput(config, config.mlp_width)

    def self_attention(
        self,
        states: Tensor,
        mask: Tensor | None,
        causal: bool,
        past: tuple[KeyValue, int] | None,
        first_only: bool,
    ) -> Tensor:
        key, value = self.attention.key_value(states)
        if past is not None:
            (keys, values), start = past
            count, end = key.shape[0], start + key.shape[2]
            keys[:count, :, start:end], values[:count, :, start:end] = key, value
            key, value = keys[:count, :, :end], values[:count, :, :end]
        queries = states[:, :1] if first_only else states
        return cast(Tensor, self.attention(queries, (key, value), mask, causal))

    def forward(
        self,
        states: Tensor,
        mask: Tensor | None,
        causal: bool,
        past: tuple[KeyValue, int] | None,
        first_only: bool,
        rows: Tensor | None,
        image_kv: KeyValue | Tensor | None,
        guests: KeyValue | None,
    ) -> Tensor:
        states = self.self_attention(states, mask, causal, past, first_only)
        if rows is not None:
            states = states.index_select(0, rows)
        if image_kv is not None:
            states = self.crossattention(states, image_kv, guests=guests)
        return cast(Tensor, self.output(self.intermediate(states), states))


class _TextEncoder(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList([_TextLayer(config) for _ in range(config.layers)])


class TextStack(nn.Module):
    """Post-norm BERT stack with cross-attention, named as transformers' `BlipTextModel`.

    One stack is a text encoder (no ``image_kv``), an image-grounded encoder (``image_kv``) or an
    image-grounded decoder (``image_kv`` and ``causal``): BLIP, section 3.1.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        """See `run_layer`."""
        self.embeddings = _TextEmbeddings(config)
        self.encoder = _TextEncoder(config)
        initialise(self, config.initializer_std)

    def cross_kv(self, image_tokens: Tensor) -> list[KeyValue]:
        """Per layer, the cross-attention's keys and values of (B, T, Dv) image tokens.

        They depend on the image alone, so one call serves every text of an image and every
        decoding step. Each is (B, heads, T, head width).
        """
        return [layer.crossattention.key_value(image_tokens) for layer in self.layers]

    def absorb(self) -> None:
        """Let `forward` take image tokens as ``image_kv``: see `Absorbed`. For inference, before
        weights are rounded or laid out anew."""
        for layer in self.layers:
            attention = layer.crossattention
            attention.absorbed = Absorbed(attention.self.key, attention.self.value, attention.heads)

    def new_cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for step-wise decoding of up to ``capacity`` positions, which `forward`
        fills in place."""
        like, config = self.embeddings.position_embeddings.weight, self.config
        shape = rows, config.heads, capacity, config.width // config.heads
        return Cache([(like.new_zeros(shape), like.new_zeros(shape)) for _ in self.layers])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        causal: bool = False,
        image_kv: ImageKV | None = None,
        guests: Sequence[KeyValue] | None = None,
        cache: Cache | None = None,
        rows: Tensor | None = None,
        first_only: bool = False,
    ) -> Tensor:
        """Hidden states of the last layer, (N, L, D).

        - ``input_ids``: (N, L) int64. With ``cache``, the L tokens that follow the cached ones.
        - ``attention_mask``: (N, cached + L), nonzero on tokens, zero on padding; None = no
          padding. Under ``causal``, right-padded texts need none: no token sees a later one. The
          first position of a row must be a token.
        - ``image_kv``: from `cross_kv`, one row for each text; or N / k rows, each serving k
          consecutive texts; or the tokens that it is made of, after `absorb`. None = text encoder.
        - ``guests``: as ``image_kv``, one row for each of the last texts, which use it instead.
        - ``rows``: (M,) int64. The result has M rows, row i being text ``rows[i]``; what does not
          depend on the image is then computed once per text. ``image_kv`` counts M rows.
        - ``first_only``: only position 0 of the result, (N, 1, D). Not with ``causal``.
        """
        assert not (causal and first_only)
        past = cache.length if cache is not None else 0
        mask = _attention_mask(input_ids.shape[1], attention_mask, causal, past)
        # SDPA builds the plain causal mask itself, faster than it reads one.
        flag = causal and mask is None and input_ids.shape[1] > 1
        last = len(self.layers) - 1
        states = self.embeddings(input_ids, past)
        seen: Sequence[KeyValue | Tensor | None]
        if image_kv is None or isinstance(image_kv, Tensor):
            seen = [image_kv] * len(self.layers)
        else:
            seen = image_kv
        for index, layer in enumerate(self.layers):
            first = index == 0
            states = run_layer(
                layer,
                self.checkpointing,
                states,
                mask,
                flag,
                (cache.layers[index], past) if cache is not None else None,
                first_only and index == last,
                rows if first else None,
                seen[index],
                guests[index] if guests is not None else None,
            )
            if rows is not None and first and mask is not None and mask.shape[0] > 1:
                mask = mask.index_select(0, rows)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return cast(Tensor, states)

    @property
    def layers(self) -> list[_TextLayer]:
        return cast(list[_TextLayer], list(self.encoder.layer))


def trimmed(input_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both without the columns on the right that are padding in every row."""
    length = int(mask.sum(dim=1).max())
    return input_ids[:, :length], mask[:, :length]


def starting_with(token_id: int, input_ids: Tensor) -> Tensor:
    """A copy whose rows begin with ``token_id`` instead of [CLS]."""
    ids = input_ids.clone()
    ids[:, 0] = token_id
    return ids


def unit(features: Tensor) -> Tensor:
    """(N, E) vectors of length 1, at least in single precision."""
    half = features.dtype in (torch.bfloat16, torch.float16)
    return F.normalize(features.float() if half else features, dim=-1)


def take_rows(image_kv: Sequence[KeyValue], rows: Tensor) -> list[KeyValue]:
    """Keys and values of the images ``rows``, (M,) int64, one row for each."""

    def taken(heads: Tensor) -> Tensor:
        # Rows of (B, T, heads, …) lie in one piece; picking rows of the transposed view, and
        # adding up their gradients, is fifteen times slower.
        return heads.transpose(1, 2).index_select(0, rows).transpose(1, 2)

    return [(taken(key), taken(value)) for key, value in image_kv]


def _attention_mask(
    length: int, attention_mask: Tensor | None, causal: bool, past: int
) -> Tensor | None:
    """True where a query may look, broadcastable to (N, heads, length, past + length); or None."""
    if attention_mask is None and not (causal and past and length > 1):
        return None
    mask = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
    if not causal or length == 1:
        return mask
    device = attention_mask.device if attention_mask is not None else None
    triangle = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past)
    return triangle if mask is None else mask & triangle


class _HeadTransform(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=config.eps)


class LMHead(nn.Module):
    """Word scores from hidden states; named as transformers' ``cls.predictions``.

    The output matrix is the word embedding itself, and ``decoder.bias`` is ``bias``. Files may
    hold either name of a tied tensor, or both.
    """

    def __init__(self, config: TextConfig, word_embeddings: nn.Embedding) -> None:
        super().__init__()
        self.transform = _HeadTransform(config)
        self.decoder = nn.Linear(config.width, config.vocab_size, device="meta")
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.decoder.bias = self.bias
        initialise(self.transform, config.initializer_std)
        self.decoder.weight = word_embeddings.weight
        self.register_load_state_dict_pre_hook(_complete_tied)  # type: ignore[no-untyped-call]

    def forward(self, states: Tensor) -> Tensor:
        """(…, D) hidden states → (…, vocabulary) logits."""
        states = self.transform.LayerNorm(gelu_of(self.transform.dense, states))
        return cast(Tensor, self.decoder(states))


def _complete_tied(module: nn.Module, tensors: dict[str, Tensor], prefix: str, *_: object) -> None:
    head = cast(LMHead, module)
    bias = f"{prefix}bias", f"{prefix}decoder.bias"
    for name, other in (bias, bias[::-1]):
        if name in tensors:
            tensors.setdefault(other, tensors[name])
    # The embedding that this is tied to is loaded under its own name.
    tensors.setdefault(f"{prefix}decoder.weight", head.decoder.weight)
