"""Which tile a product with a weight matrix runs on, from its shape alone: nothing is tuned while serving.

Few tiles, so that few kernels are compiled at start. Figures: one H200, bfloat16, in a CUDA graph over weights of more
than the cache, microseconds, cuBLAS' in brackets (benchmarks/linear.py; the device copies at 4.26 TB/s).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# From here on products are bound by arithmetic, and torch's own are ahead.
MOST_ROWS = 128
_MOST_GATED_ROWS = 256
# Wider rows have their norm in a launch of its own: a program holds a row and its weights in registers, and from here
# on too few programs find room (products of a layer of Qwen3-14B, hidden size 5,120: 237 us with it, 161 without).
MOST_NORMED = 4096
NORM_WARPS = 4  # of a program that makes it
_FIRST_WAVE = 0.7  # of a gated product's steps


class DeviceFacts(NamedTuple):
    """What tiles depend on: multiprocessors, shared memory a program may have, whether launches may overlap (PDL)."""

    processors: int
    shared_bytes: int
    pdl: bool


class RowTile(NamedTuple):
    """One row's product: `rows` of the weights a program, `block` inputs at a time."""

    rows: int
    block: int
    warps: int


class NormTile(NamedTuple):
    """One row's product with its norm: `rows` of the weights a program and step.

    The first `wave` programs run `steps` steps each, those that follow take what is left, `later` steps each.
    """

    rows: int
    wave: int
    steps: int
    later: int


class ProductTile(NamedTuple):
    """A tile of block_m rows by block_n outputs, block_k inputs at a time; swapped: weights are the left factor."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    swapped: bool = False


@cache
def device_facts(device: torch.device) -> DeviceFacts:
    """Of a CUDA (or ROCm) device."""
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block
    pdl = torch.version.hip is None and (properties.major, properties.minor) >= (9, 0)
    return DeviceFacts(properties.multi_processor_count, shared, pdl)


def takes_pdl(device: torch.device) -> bool:
    """Whether launches on a device may overlap the one ahead of them."""
    return device.type == "cuda" and device_facts(device).pdl


def suits(x: Tensor, weight: Tensor, out: Tensor | None = None) -> bool:
    """Whether the Triton products take these: x [T, inputs] and weight [outputs, inputs] on one CUDA device, 16 bits.

    Rows of both must begin at 16 bytes, and nothing of it may want a gradient.
    """
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or x.dtype != weight.dtype or x.dim() != 2:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if out is not None and out.stride(1) != 1:
        return False
    return len(x) > 0 and weight.is_contiguous() and _aligned(x) and _aligned(weight)


WANTED = "bfloat16 or float16 on a CUDA device, rows that begin at 16 bytes, no gradient"


def describe(t: Tensor) -> str:
    """For messages: dtype, shape, strides and device."""
    return f"{t.dtype} {list(t.shape)} strides {list(t.stride())} on {t.device}"


def _aligned(t: Tensor) -> bool:
    return t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0


def launch_options(warps: int, stages: int, pdl: bool) -> dict[str, Any]:
    """A launch's keywords; `launch_pdl` only where the backend has it."""
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
    if pdl:
        options["launch_pdl"] = True
    return options


def row_tile(outputs: int, inputs: int) -> RowTile:
    """For one row: as much of the weights under way at once as there is, best in one wave of programs.

    Figures are a whole layer's products in one graph, beside the tile that was next (8 rows by 1024 where not said).
    """
    if inputs < 2048:
        return RowTile(4, 512, 4)  # alone: 4096 x 1024 3.5 (5.9), 151936 x 1024 71.6 (75.0)
    if outputs <= 2048:
        # 2048 x 8192 34.6 (4 rows by 1024: 35.3), 2048 x 2048 within 0.2 us of each other
        return RowTile(4, 1024, 4) if inputs == 2048 else RowTile(8, 1024, 8)
    if 4096 <= outputs <= 5120:
        return RowTile(8, 512, 4)  # 4096 x 4096 107.0 (108.2), 4096 x 14336 104.5 (105.1), 5120 x 17408 161 (166)
    return RowTile(4, 1024, 4)  # 3072 x 8192 54.4 (56.0), 10240 x 5120 258 (260), 34816 x 5120 177 (183)


def norm_tile(outputs: int, inputs: int, device: DeviceFacts, *, gated: bool) -> NormTile:
    """For one row with its norm, four programs a multiprocessor at once.

    The norm costs nothing beside the weights: 6144 x 4096 13.8 (17.7), 3072 x 2048 4.2 (6.1), gated 28672 x 4096 54.5
    (56.6), gated 16384 x 2048 17.0 (18.1), without a launch for the norm or for silu * mul.
    Processors do not get on alike: in llama-8b's steps the kernel behind one wave of programs over gated 28672 x 4096
    found room 19 us before the last of them was done. So the first wave takes most of a gated product, and programs of
    two steps the rest, each where there is room: a step of the model takes 3,955 us with 20 of 27 steps in the first
    wave, 3,963 with 18, 4,033 with 22, 4,277 with all; in another run 3,989, with four waves alike 4,092, and 4,062
    where programs of one step follow, for they make the norm too often. Of less than 8 steps only an uneven end is left
    to those (llama-1b by two rows a step, 7.75 steps: 787, one wave 795). Products that are not gated gain nothing.
    """
    width = 1 << (inputs - 1).bit_length()
    rows = max(1, 2048 // width) if gated else max(2, 4096 // width)
    wave = 4 * device.processors
    share = (outputs // 2 if gated else outputs) / (rows * wave)
    if not gated or share < 2:
        return NormTile(rows, wave, max(1, math.ceil(share)), 1)
    if share < 8:
        return NormTile(rows, wave, int(share), 1)
    return NormTile(rows, wave, int(_FIRST_WAVE * share), 2)


def product_tile(rows: int, outputs: int, device: DeviceFacts, *, always: bool = False) -> ProductTile | None:
    """For 2 rows or more; None where torch's own product is as fast, unless a tile is wanted `always`.

    Rows that a tile has and the batch has not are dear: the copy engine fills them slowly (16 rows on 64: 4096 x 14336
    64 us, not 29), so batches padded to 16, 32, 64 or 128 rows are the fastest. No tile splits the inputs: narrow tiles
    fill the device as well (16 rows: 2048 x 8192 11.0 split in four, 12.1 in whole (13.7); 2048 x 2048 5.1, 4.6 (6.0)),
    and a row's sums are then made in one order by all of them.
    """
    if rows <= 16:
        tile = ProductTile(16, 64, 256, 4, 5, swapped=True)  # 4096 x 4096 9.7 (13.4), 28672 x 4096 57.6 (61.3)
    elif rows <= 32:
        tile = ProductTile(32, 64, 256, 4, 4, swapped=True)  # 4096 x 4096 10.6 (13.7), 28672 x 4096 59.5 (61.9)
    elif rows <= 64 and outputs <= 4096:
        tile = ProductTile(64, 32, 256, 4, 4)  # 64 rows: 2048 x 2048 4.8 (6.2), 4096 x 14336 32.1 (36.0)
    elif rows <= 64 and outputs > 8192:
        tile = ProductTile(64, 128, 128, 4, 4)  # 64 rows: 16384 x 2048 18.7 (19.3), 128256 x 4096 249 (271)
    elif rows <= 64 or (rows <= MOST_ROWS and outputs <= 4096):
        tile = ProductTile(64, 64, 128, 4, 5)  # 64: 6144 x 4096 16.7 (16.5); 128: 2048 x 2048 5.9 (6.6)
    elif not always:
        return None
    elif (rows <= 512 and outputs <= 4096) or (rows <= MOST_ROWS and outputs <= 8192):
        tile = ProductTile(128, 64, 128, 4, 4)  # 256 rows: 4096 x 4096 16.2 (16.7), 2048 x 8192 26.3 (20.6)
    else:
        tile = ProductTile(128, 128, 64, 4, 4)  # 2048 rows: 6144 x 4096 150 (141), 28672 x 4096 706 (606)
    return _fitted(tile, device, factors=1)


def gated_tile(rows: int, outputs: int, device: DeviceFacts, *, always: bool = False) -> ProductTile | None:
    """As `product_tile`, where a program makes both the gate and the value of its outputs.

    In brackets cuBLAS' product alone, which a launch of silu * mul would follow.
    """
    if rows <= 16:
        tile = ProductTile(16, 64, 128, 4, 4, swapped=True)  # 8192 x 2048 17.5 (18.4), 14336 x 4096 58.3 (61.3)
    elif rows <= 32:
        tile = ProductTile(32, 64, 128, 4, 4, swapped=True)  # 8192 x 2048 17.9 (18.8), 14336 x 4096 58.5 (61.9)
    elif rows <= 64 or (rows <= MOST_ROWS and outputs <= 4096):
        tile = ProductTile(64, 64, 128, 4, 4)  # 64 rows: 8192 x 2048 18.7 (19.3), 14336 x 4096 60.5 (61.2)
    elif rows <= MOST_ROWS:
        tile = ProductTile(128, 64, 64, 4, 5)  # 128 rows: 8192 x 2048 20.5 (21.1), 14336 x 4096 66.9 (65.8)
    elif always or (rows <= _MOST_GATED_ROWS and outputs >= 8192):
        tile = ProductTile(128, 128, 64, 8, 4)  # 256 rows: 8192 x 2048 27.0 (25.7), 14336 x 4096 99.6 (91.6)
    else:
        return None
    return _fitted(tile, device, factors=2)


def _fitted(tile: ProductTile, device: DeviceFacts, *, factors: int) -> ProductTile:
    """The tile with no more stages, and if need be no more inputs, than the device has shared memory for."""
    while True:
        stage = 2 * tile.block_k * (tile.block_m + factors * tile.block_n)
        stages = min(tile.stages, (device.shared_bytes - 1024) // stage)
        if stages >= 2 or tile.block_k <= 32:
            return tile._replace(stages=max(stages, 1))
        tile = tile._replace(block_k=tile.block_k // 2)
