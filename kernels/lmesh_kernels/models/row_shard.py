"""Rows of a slot that one rank holds; a checkpoint's tensors are put into it as into the whole slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowShard:
    """Rows first:first+len(local) of a slot of `shape`. `dtype` is what a pass reads; masters may be wider."""

    shape: torch.Size
    first: int
    local: Tensor
    dtype: torch.dtype

    def part(self, tensor: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
        """(rows of `tensor` that belong here, where they do), of a tensor that lies at row `start` of the slot."""
        low = max(start, self.first)
        high = max(low, min(start + len(tensor), self.first + len(self.local)))
        return tensor[low - start : high - start], self.local[low - self.first : high - self.first]

    def put(self, start: int, tensor: Tensor) -> None:
        """Copies what belongs here, rounded to what a pass reads: a model begins the same, however it is held."""
        found, place = self.part(tensor, start)
        place.copy_(found.to(self.dtype))

    def holds(self, tensor: Tensor) -> bool:
        """Whether these rows are those of a tensor of the whole slot's shape."""
        found, place = self.part(tensor)
        return torch.equal(found.to(self.dtype).to(place.dtype), place.to(found.device))
