"""What a token keeps from the forward pass for the backward pass, as the nodes of `models.training` keep it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lmesh_kernels.layers.recompute import Recompute
from lmesh_kernels.lora.sites import sites
from lmesh_kernels.models.config import ModelConfig

_FLOAT32 = 4  # bytes of what is kept in float32 whatever the dtype: norms' and attention's numbers a row
_INDEX = 8  # bytes of a token's place among those that count


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapted:
    """The adapters of a pass: numbers in their factors, 0 for none, and what makes them keep more."""

    trained: int = 0
    dora: bool = False  # composed of torch's own operations, whose inputs autograd keeps
    dropout: bool = False


def kept_bytes(config: ModelConfig, dtype: torch.dtype, policy: Recompute, adapted: Adapted) -> int:
    """Bytes a token that a pass keeps on its device until the backward pass begins.

    A little above what is kept: adapters are taken to be at every site, and their ranks to be as high as their numbers
    allow.
    """
    attention, feed_forward = _plain(config) if not adapted.dora else _composed(config, dropout=adapted.dropout)
    thin = _thin(config, adapted)
    rows = config.num_layers * 2 * _FLOAT32  # both norms of a layer
    heads = config.num_layers * _FLOAT32 * config.num_heads
    if config.qk_norm:
        heads += config.num_layers * _FLOAT32 * (config.num_heads + config.num_kv_heads)
    stream = config.hidden_size
    match policy:
        case Recompute.NONE:
            numbers, small = config.num_layers * (attention + feed_forward) + thin, rows + heads
        case Recompute.SELECTIVE:
            numbers, small = config.num_layers * (attention + stream) + thin, rows + heads
        case Recompute.FULL:
            numbers, small = config.num_layers * stream, 0
        case Recompute.OFFLOAD:
            numbers, small = 0, 0
    # The last norm's input, the gradient that the head has made by then, and the rotations.
    ends = 2 * stream * dtype.itemsize + _FLOAT32 * (1 + config.head_dim) + _INDEX
    return numbers * dtype.itemsize + small + ends


def _plain(config: ModelConfig) -> tuple[int, int]:
    """Numbers that the fused nodes of one layer keep: (attention, feed-forward), without the adapters' thin products.

    A head norm keeps the qkv that it reads, and attention the one that it rotated.
    """
    stream, qkv = config.hidden_size, config.q_size + 2 * config.kv_size
    return stream + qkv * (2 if config.qk_norm else 1) + config.q_size, stream + 2 * config.intermediate_size


def _composed(config: ModelConfig, *, dropout: bool) -> tuple[int, int]:
    """As `_plain`, of DoRA: besides, of every product its input, the base's product and the adapter's; with dropout of
    every site the mask and what it left of the input. The activation and its product with up are kept too.
    """
    stream, q, wide = config.hidden_size, config.q_size, config.intermediate_size
    qkv = q + 2 * config.kv_size
    attention, feed_forward = _plain(config)
    attention += stream + 2 * qkv + 2 * stream
    feed_forward += stream + 2 * 2 * wide + 2 * wide + 2 * stream
    if dropout:
        attention += 2 * (3 * stream + q)
        feed_forward += 2 * (2 * stream + wide)
    return attention, feed_forward


def _thin(config: ModelConfig, adapted: Adapted) -> int:
    """Numbers of all x @ a.T at most: a rank costs its site's inputs and outputs, and gives one number a token."""
    return adapted.trained // min(shape.inputs + shape.outputs for shape in sites(config).values())
