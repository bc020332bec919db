"""NF4 with double quantisation: QLoRA's 4-bit weights (Dettmers et al. 2023, arXiv 2305.14314), as in bitsandbytes.

A tensor is flattened and cut into blocks of 64. Each value is the nearest of 16 levels, quantiles of a normal
distribution, times its block's largest magnitude; two values a byte, the first in the high half. The largest
magnitudes, less their mean, are themselves 8-bit codes in blocks of 256: 4.127 bits a weight in all. Tensors that are
computed together, such as q, k and v, are quantised one by one, for each has a mean of its own.

On an H100 beside bitsandbytes 0.50.2, tensors of 8.4 M weights: at most one code and one statistic of each differ,
where two levels are equally near. Its CPU build looks statistics up in a coarse table, and about 2 in 1,000 are not the
nearest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Appendix E of the paper, to the last bit of float32.
_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_ZERO = 7  # the code of 0
BLOCK = 64
STATISTICS_BLOCK = 256
_DECADES = 7  # of the codes of the statistics


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Nf4Statistics:
    """Largest magnitude of each block: scales[i // block] * levels[codes[i]] + mean."""

    codes: Tensor  # [blocks] uint8
    levels: Tensor  # [256] float32, ascending
    scales: Tensor  # [ceil(blocks / block)] float32
    mean: Tensor  # [] float32
    block: int = STATISTICS_BLOCK


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Nf4Tensor:
    """A quantised tensor of `shape`. `statistics` is [blocks] float32 where they were not quantised themselves."""

    codes: Tensor  # [ceil(elements / 2)] uint8
    levels: Tensor  # [16] float32, ascending
    statistics: Nf4Statistics | Tensor
    shape: tuple[int, ...]
    block: int = BLOCK

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, the 272 levels apart, which all tensors share."""
        statistics = self.statistics
        if isinstance(statistics, Tensor):
            return self.codes.nbytes + statistics.nbytes
        return self.codes.nbytes + statistics.codes.nbytes + statistics.scales.nbytes + statistics.mean.nbytes

    def to(self, device: torch.device) -> Nf4Tensor:
        """The same tensor there."""
        statistics = self.statistics
        if isinstance(statistics, Tensor):
            moved: Nf4Statistics | Tensor = statistics.to(device)
        else:
            fields = {name: getattr(statistics, name).to(device) for name in ("codes", "levels", "scales", "mean")}
            moved = replace(statistics, **fields)
        return replace(self, codes=self.codes.to(device), levels=self.levels.to(device), statistics=moved)


def nf4_levels(device: torch.device | None = None) -> Tensor:
    """The 16 levels, [16] float32, ascending."""
    return torch.tensor(_LEVELS, dtype=torch.float32, device=device)


def dynamic_levels(device: torch.device | None = None) -> Tensor:
    """The 256 levels of the statistics, float32, ascending: seven decades, each with twice as many as the one below.

    Dynamic tree quantisation (Dettmers 2016, arXiv 1511.04561): the middles of 2^d equal parts of [0.1, 1], times
    10^(d - 6), of both signs; and 0 and 1.
    """
    positive = []
    for decade in range(_DECADES):
        borders = torch.linspace(0.1, 1.0, 2**decade + 1, dtype=torch.float32)
        positive.append(10.0 ** (decade - _DECADES + 1) * ((borders[:-1] + borders[1:]) / 2.0))
    above = torch.cat(positive)
    levels = torch.cat((above, -above, torch.tensor([0.0, 1.0])))
    return levels.sort().values.to(device)


def quantise(weight: Tensor) -> Nf4Tensor:
    """Quantises a floating-point tensor of any shape; its device's arithmetic is float32. ValueError if not finite."""
    if not weight.is_floating_point():
        raise ValueError(f"NF4 is made of floating-point weights, not of {weight.dtype}")
    if not bool(weight.isfinite().all()):
        raise ValueError("a weight that is not finite cannot be quantised")
    levels = nf4_levels(weight.device)
    blocks, largest = _in_blocks(weight.float().flatten(), BLOCK)
    codes = _nearest(_scaled(blocks, largest), levels).flatten()[: weight.numel()]
    if codes.numel() % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=_ZERO)
    packed = (codes[0::2] << 4) | codes[1::2]
    return Nf4Tensor(codes=packed, levels=levels, statistics=_quantise_statistics(largest), shape=tuple(weight.shape))


def _quantise_statistics(largest: Tensor) -> Nf4Statistics:
    mean, levels = largest.mean(), dynamic_levels(largest.device)
    blocks, scales = _in_blocks(largest - mean, STATISTICS_BLOCK)
    codes = _nearest(_scaled(blocks, scales), levels).flatten()[: largest.numel()]
    return Nf4Statistics(codes=codes, levels=levels, scales=scales, mean=mean)


def _in_blocks(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """[blocks, size], zeros after the end, and the largest magnitude of each, [blocks]."""
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % size)).view(-1, size)
    return blocks, blocks.abs().amax(dim=1)


def _scaled(blocks: Tensor, largest: Tensor) -> Tensor:
    """Into [-1, 1]; a block of zeros stays one."""
    return torch.where(largest > 0, 1.0 / largest, 0.0).unsqueeze(1) * blocks


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Index of the nearest level, uint8."""
    borders = (levels[:-1] + levels[1:]) / 2.0
    return torch.bucketize(values, borders).to(torch.uint8)


def block_scales(tensor: Nf4Tensor) -> Tensor:
    """Largest magnitude of each block, [blocks] float32."""
    statistics = tensor.statistics
    if isinstance(statistics, Tensor):
        return statistics
    scales = statistics.scales.repeat_interleave(statistics.block)[: statistics.codes.numel()]
    return statistics.levels[statistics.codes.long()] * scales + statistics.mean


def dequantise(tensor: Nf4Tensor, dtype: torch.dtype) -> Tensor:
    """The weights, of `tensor.shape`, computed in float32 and rounded to `dtype` once."""
    elements = math.prod(tensor.shape)
    codes = torch.stack((tensor.codes >> 4, tensor.codes & 15), dim=1).flatten()[:elements]
    scales = block_scales(tensor).repeat_interleave(tensor.block)[:elements]
    return (tensor.levels[codes.long()] * scales).to(dtype).view(tensor.shape)
