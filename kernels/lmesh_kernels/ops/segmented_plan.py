"""What the Triton form of `segmented_lora` reads: each adapter's directory, and a batch's tiles."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmesh_kernels.ops.low_rank import LowRank
from lmesh_kernels.ops.trained import value

MOST_PARTS = 3  # q, k and v
PART = 7  # b's address, its rank, first rank, first column, columns, scale's float32 bits, DoRA's factors' address
ENTRY = 2 + MOST_PARTS * PART  # a's address, and its ranks: 0 where the adapter has nothing there
_SMALL, _LARGE = 16, 64  # rows of a tile: one token a sequence, or prompts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SegmentPlan:
    """A batch's rows that run with adapters, for all of its products. All of it may be longer than is needed.

    A tile of no rows is nobody's; `order` and `directories` are read as far as tiles say.
    """

    numbers: Mapping[str, int]  # a product's name -> its row in each directory
    order: Tensor  # [num_rows] int32: the rows, those of one adapter together
    tiles: Tensor  # [num_tiles, 3] int32: adapter, first place in `order`, rows
    directories: Tensor  # [adapters] int64: addresses
    height: int  # most rows of a tile
    most_ranks: int  # of any product of any of these adapters, or more

    @property
    def num_rows(self) -> int:
        """Rows that run with an adapter."""
        return self.order.shape[0]

    @property
    def num_tiles(self) -> int:
        """All of them."""
        return self.tiles.shape[0]


def directory_of(
    products: Mapping[str, tuple[LowRank, Sequence[Tensor | None]]], numbers: Mapping[str, int], device: torch.device
) -> Tensor:
    """[products, ENTRY] int64 on the device; the tensors must stay where they are for as long as it is used."""
    table = np.zeros((len(numbers), ENTRY), dtype=np.int64)
    for name, (low, factors) in products.items():
        entry = table[numbers[name]]
        a = value(low.a)
        entry[:2] = a.data_ptr(), a.shape[0]
        for index, (part, factor) in enumerate(zip(low.parts, factors, strict=True)):
            b = value(part.b)
            bits = struct.unpack("<i", struct.pack("<f", part.scale))[0]
            told = (b.data_ptr(), b.shape[1], part.first, part.start, b.shape[0], bits)
            entry[2 + index * PART : 2 + (index + 1) * PART] = *told, 0 if factor is None else factor.data_ptr()
    return torch.from_numpy(table).to(device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SegmentTables:
    """The same on the host, before it is sent."""

    order: np.ndarray
    tiles: np.ndarray
    directories: np.ndarray
    height: int
    most_ranks: int


def cut_segments(rows: Sequence[np.ndarray], directories: Sequence[Tensor], most_ranks: int) -> SegmentTables:
    """Cuts each adapter's rows into tiles; `rows[i]` are those of `directories[i]`."""
    height = _SMALL if max(len(own) for own in rows) <= _SMALL else _LARGE
    tiles, first = [], 0
    for adapter, own in enumerate(rows):
        tiles += [(adapter, first + at, min(height, len(own) - at)) for at in range(0, len(own), height)]
        first += len(own)
    return SegmentTables(
        order=np.concatenate(rows).astype(np.int32),
        tiles=np.asarray(tiles, dtype=np.int32),
        directories=np.asarray([directory.data_ptr() for directory in directories], dtype=np.int64),
        height=height,
        most_ranks=most_ranks,
    )
