"""Dropout whose mask is a function of (seed, step, row, position, site, element): nothing is stored or replayed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmesh_kernels.ops.noise import row_keys, uniforms


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dropout:
    """One step's dropout over T tokens."""

    rate: float  # in [0, 1)
    keys: Tensor  # [T] int64, see `dropout_keys`

    def apply(self, x: Tensor, site: int) -> Tensor:
        """x [T, D] with elements of a share `rate` set to 0 and the others divided by 1 - rate; a new tensor."""
        return x * self.mask(x, site)

    def mask(self, x: Tensor, site: int) -> Tensor:
        """The factors of x at a site: 0 or 1 / (1 - rate), in x's dtype."""
        columns = torch.arange(x.shape[1], dtype=torch.int32, device=x.device)
        number = torch.full_like(self.keys, site)
        keep = uniforms(row_keys(self.keys, number, torch.zeros_like(number)), columns) >= self.rate
        return keep.to(x.dtype).mul_(1.0 / (1.0 - self.rate))


def dropout_keys(seed: int, step: int, rows: Tensor, positions: Tensor) -> Tensor:
    """Keys [T] int64 of a step's tokens; rows and positions [T] int64. `seed` is the job's, any 63-bit number."""
    start = torch.full_like(rows, seed)
    return row_keys(row_keys(start, torch.full_like(rows, step), rows), positions, torch.zeros_like(rows))
