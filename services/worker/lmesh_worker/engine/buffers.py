"""Where the columns of a step stand while a device reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from lmesh_kernels.platforms.platform import Platform
from numpy.typing import NDArray
from torch import Tensor

Column = NDArray[np.generic]
_WORDS = 16  # a column begins at a multiple of so many: what the widest loads ask for
_TORCH = {np.dtype(t): getattr(torch, t) for t in ("int32", "int64", "float32")}


def words(column: Column, capacity: int | None = None) -> int:
    """Places of 4 bytes that a column takes, or would with `capacity` rows."""
    return -(-_size(column, capacity) // _WORDS) * _WORDS


def _size(column: Column, capacity: int | None) -> int:
    """The same, not rounded up. Not by strides: those of no rows are 0."""
    rows = len(column) if capacity is None else capacity
    return rows * math.prod(column.shape[1:]) * column.itemsize // 4


Filled = tuple[Column, int | None, int]  # a column, the rows to fill it up to (None: as many as it has), with what


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where columns of one size stand, from the arena's beginning: found once, for steps of that size come often."""

    hosts: list[dict[str, Column]]  # by staging memory
    words: int
    held: list[dict[str, Column]]  # by staging memory: what stands there, if no other layout was there since


class Arena:
    """Columns end to end in pinned memory, and their twin on the device, filled by one copy.

    The device has one, whose addresses stay: a step's copy follows the step before on the same stream. The host has as
    many as steps may be in flight.
    """

    def __init__(self, platform: Platform, *, capacity: int, sets: int) -> None:
        self._staging = [platform.staging((capacity,), torch.int32) for _ in range(sets)]
        self._host = [staging.numpy() for staging in self._staging]
        self._device = torch.zeros(capacity, dtype=torch.int32, device=platform.device)
        self.capacity = capacity
        self._layouts: list[Layout | None] = [None] * sets  # whose columns stand in each staging memory
        self._turn = 0
        self._used = 0

    def begin(self) -> None:
        """Begins the columns of a step, in the staging memory that was longest unused."""
        self._turn = (self._turn + 1) % len(self._staging)
        self._used = 0

    def put(self, column: Column, capacity: int | None = None, fill: int = 0) -> Tensor:
        """Writes a column, and `fill` up to `capacity` rows; the device's view of it, valid after `upload`.

        ValueError where the arena is full.
        """
        place, size = self._used, words(column, capacity)
        if place + size > self.capacity:
            raise ValueError(f"a step's columns take more than {self.capacity} words")
        self._used += size
        if place == 0:
            self._layouts[self._turn] = None
        host = self._host[self._turn][place : place + size].view(column.dtype)
        flat = column.reshape(-1)
        host[: len(flat)] = flat
        if capacity is not None:
            host[len(flat) :] = fill
        rows = len(column) if capacity is None else capacity
        return self.view(place, (rows, *column.shape[1:]), column.dtype)

    def lay_out(self, columns: Mapping[str, Filled]) -> Layout:
        """Where `put`, one by one from the beginning, would write these."""
        hosts: list[dict[str, Column]] = [{} for _ in self._host]
        place = 0
        for name, (column, capacity, _) in columns.items():
            rows = len(column) if capacity is None else capacity
            shape, count = (rows, *column.shape[1:]), _size(column, capacity)
            for own, host in zip(hosts, self._host, strict=True):
                own[name] = host[place : place + count].view(column.dtype).reshape(shape)
            place += words(column, capacity)
        return Layout(hosts, place, [{} for _ in hosts])

    def fill(self, layout: Layout, columns: Mapping[str, Filled]) -> None:
        """As `put` of each, first thing after `begin`, for columns of a layout's size.

        An array that the layout's last filling of this staging memory wrote is taken to be the same and left there.
        """
        own, held = layout.hosts[self._turn], layout.held[self._turn]
        if self._layouts[self._turn] is not layout:
            held.clear()
            self._layouts[self._turn] = layout
        for name, (column, _, fill) in columns.items():
            if held.get(name) is column:
                continue
            room, count = own[name], len(column)
            room[:count] = column
            if count < len(room):
                room[count:] = fill
            held[name] = column
        self._used = layout.words

    def view(self, place: int, shape: Sequence[int], dtype: np.dtype[np.generic]) -> Tensor:
        """What stands at a place of the device's twin."""
        kind = _TORCH[dtype]
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize // 4
        return self._device[place : place + count].view(kind).view(*shape)

    def upload(self) -> None:
        """Starts the copy of what was put, on the stream that calls."""
        used = slice(0, self._used)
        self._device[used].copy_(self._staging[self._turn][used], non_blocking=True)
