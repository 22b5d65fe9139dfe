"""BLIP's image encoder, and what it has in common with the text stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from stages.models.config import VisionConfig
from stages.models.linear import gelu_of


def split_heads(states: Tensor, heads: int) -> Tensor:
    """(B, L, D) → (B, heads, L, D / heads), a view."""
    return states.view(*states.shape[:-1], heads, -1).transpose(1, 2)


def run_layer(layer: nn.Module, checkpointing: bool, *arguments: object) -> Tensor:
    """``layer(*arguments)``; with ``checkpointing``, what its gradients need is computed again in
    the backward pass instead of being kept. The results are the same, bit for bit on a CPU."""
    if checkpointing and torch.is_grad_enabled():
        return cast(Tensor, checkpoint(layer, *arguments, use_reentrant=False))
    return cast(Tensor, layer(*arguments))


def initialise(module: nn.Module, std: float) -> None:
    """BERT's start: normal weights, zero biases, a zero padding embedding."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear | nn.Conv2d) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            with torch.no_grad():
                part.weight[part.padding_idx].zero_()


@contextmanager
def shapes_only() -> Iterator[None]:
    """Modules made inside have shapes and no weights: no memory or time goes into random numbers,
    and no global generator advances."""
    with torch.device("meta"), _NotNormal():
        yield


class _NotNormal(TorchFunctionMode):
    """Leaves out `nn.init.normal_`, for which torch imports its whole compiler on the meta device:
    two seconds, and 70 MiB of every worker's memory."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        return named["tensor"] if func is nn.init.normal_ else func(*args, **named)


class _PatchEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(1, 1, config.width))
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + config.patches, config.width))
        patch = config.patch_size
        self.patch_embedding = nn.Conv2d(3, config.width, kernel_size=patch, stride=patch)
        nn.init.trunc_normal_(self.class_embedding, std=config.initializer_std)
        nn.init.normal_(self.position_embedding, std=config.position_std)

    def forward(self, pixel_values: Tensor) -> Tensor:
        # A convolution whose stride is its kernel is one matrix product over flattened patches.
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        size = weight.shape[-1]
        batch, channels, height, width = pixel_values.shape
        patches = pixel_values.reshape(
            batch, channels, height // size, size, width // size, size
        ).permute(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(batch, -1, channels * size * size)
        embedded = F.linear(patches.to(weight.dtype), weight.flatten(1), bias)
        first = self.class_embedding.expand(embedded.shape[0], -1, -1).to(embedded.dtype)
        return torch.cat([first, embedded], dim=1) + self.position_embedding


class _VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.projection = nn.Linear(config.width, config.width)

    def forward(self, states: Tensor, first_only: bool) -> Tensor:
        query, key, value = self.qkv(states).chunk(3, dim=-1)
        if first_only:
            query = query[:, :1]
        mixed = F.scaled_dot_product_attention(
            split_heads(query, self.heads),
            split_heads(key, self.heads),
            split_heads(value, self.heads),
        )
        return cast(Tensor, self.projection(mixed.transpose(1, 2).flatten(2)))


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, states: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(gelu_of(self.fc1, states)))


class _VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.layer_norm1 = nn.LayerNorm(config.width, eps=config.eps)
        self.self_attn = _VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = _MLP(config.width, config.mlp_width)

    def forward(self, states: Tensor, first_only: bool = False) -> Tensor:
        residual = states[:, :1] if first_only else states
        states = residual + self._dropped(self.self_attn(self.layer_norm1(states), first_only))
        return states + self._dropped(self.mlp(self.layer_norm2(states)))

    def _dropped(self, change: Tensor) -> Tensor:
        """``change``, (B, L, D), zero for the samples that skip it and larger by as much for the
        others: dropout, with one random number a sample."""
        if not self.drop_path or not self.training:
            return change
        return change * F.dropout(change.new_ones(len(change), 1, 1), self.drop_path)


class _VisionEncoder(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        last = max(config.layers - 1, 1)
        rates = [config.drop_path * index / last for index in range(config.layers)]
        self.layers = nn.ModuleList([_VisionLayer(config, rate) for rate in rates])


class VisionTransformer(nn.Module):
    """Pre-norm ViT with a class token; parameters named as in transformers' `BlipVisionModel`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        """See `run_layer`."""
        self.embeddings = _PatchEmbeddings(config)
        self.encoder = _VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.width, eps=config.eps)
        initialise(self, config.initializer_std)

    @property
    def layers(self) -> list[_VisionLayer]:
        return cast(list[_VisionLayer], list(self.encoder.layers))

    def forward(self, pixel_values: Tensor, *, first_only: bool = False) -> Tensor:
        """Image tokens after the last LayerNorm.

        ``pixel_values``: (B, 3, S, S), float, normalised. Returns (B, 1 + P, D), the class token
        first; with ``first_only`` the class token alone, (B, 1, D), without computing the last
        layer elsewhere.
        """
        states = self.embeddings(pixel_values)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            states = run_layer(layer, self.checkpointing, states, first_only and index == last)
        return cast(Tensor, self.post_layernorm(states))
