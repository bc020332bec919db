"""Rotary position embedding: frequencies under every supported stretch, the cos|sin table, and the rotation.

Halves are paired (dimension i with i + head_dim / 2), as in the checkpoints on the hub.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmesh_kernels.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Radians a position turns each pair by, [head_dim / 2] float32 on the CPU, and the scale of cos and sin.

    Computed in float32 as the checkpoints' own code does: at long positions the rounding is part of the model.
    """
    base = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.frequency_divisors:
        base = base / torch.tensor(rope.frequency_divisors, dtype=torch.float32)
    if rope.type == "linear":
        return base / rope.factor, 1.0
    if rope.type == "llama3":
        return _llama3(base, rope), 1.0
    if rope.type == "yarn":
        return _yarn(base, rope, head_dim), _yarn_attention_factor(rope)
    return base, 1.0


def _llama3(base: Tensor, rope: RopeConfig) -> Tensor:
    """Long wavelengths divided by the factor, short ones kept, those between blended by how often they turn."""
    turns = rope.original_max_position * base / (2 * math.pi)
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - keep) * base / rope.factor + keep * base


def _yarn(base: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """Fast pairs kept, slow ones interpolated by the factor, a linear ramp over the dimensions between."""
    low = _yarn_dimension(rope.beta_fast, rope, head_dim)
    high = _yarn_dimension(rope.beta_slow, rope, head_dim)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001  # an empty ramp is a step
    slow = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return slow * base / rope.factor + (1 - slow) * base


def _yarn_dimension(turns: float, rope: RopeConfig, head_dim: int) -> float:
    """The (fractional) pair that makes `turns` turns over the original context."""
    return head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_scale(rope.factor, rope.mscale) / _yarn_scale(rope.factor, rope.mscale_all_dim)
    return _yarn_scale(rope.factor, 1.0)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_table(rope: RopeConfig, head_dim: int, num_positions: int) -> Tensor:
    """cos|sin of every position, [num_positions, head_dim] float32 on the CPU: cosines first, then sines."""
    frequencies, scale = inverse_frequencies(rope, head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies
    return torch.cat([angles.cos() * scale, angles.sin() * scale], dim=-1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn heads x [T, heads, head_dim] by rotation [T, head_dim] (rows of `rope_table`); returns a new tensor."""
    return rotate_reference(x, rotation)


def rotate_reference(x: Tensor, rotation: Tensor) -> Tensor:
    """As `rotate`, in plain torch, in float32 whatever x's dtype."""
    cos, sin = rotation[:, None].chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
