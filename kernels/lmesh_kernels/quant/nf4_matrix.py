"""A fused weight whose parts are quantised one by one, as checkpoints have them: q, k and v, or gate and up."""

from __future__ import annotations

import torch
from torch import Tensor

from lmesh_kernels.quant.nf4 import Nf4Tensor, dequantise, quantise


class Nf4Matrix:
    """Weights [outputs, inputs] in NF4, row slices put in one after the other; `dense` unfolds them for a product.

    A part may stay as it came, in the dtype of the pass: checkpoints leave out what quantising would hurt.
    """

    def __init__(self, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = (outputs, inputs)
        self.dtype, self.device = dtype, device
        self._parts: dict[int, Nf4Tensor | Tensor] = {}

    def put(self, start: int, rows: Tensor | Nf4Tensor, *, keep: bool = False) -> None:
        """Rows start.. of the matrix: quantised here unless they are already, or `keep` says to take them as they are.

        ValueError for rows of another width, or not finite.
        """
        if len(rows.shape) != 2 or rows.shape[1] != self.shape[1]:
            raise ValueError(f"rows of shape {tuple(rows.shape)} are no part of {self.shape}")
        if isinstance(rows, Tensor):
            rows = rows.to(self.device, self.dtype) if keep else quantise(rows.to(self.device))
        else:
            rows = rows.to(self.device)
        self._parts[start] = rows

    def dense(self) -> Tensor:
        """The weights [outputs, inputs] in the dtype of the pass, a new tensor."""
        parts = [self._parts[start] for start in sorted(self._parts)]
        unfolded = [dequantise(part, self.dtype) if isinstance(part, Nf4Tensor) else part for part in parts]
        return unfolded[0] if len(unfolded) == 1 else torch.cat(unfolded)

    @property
    def nbytes(self) -> int:
        """Of all parts."""
        return sum(part.nbytes for part in self._parts.values())

    @staticmethod
    def planned_bytes(outputs: int, inputs: int) -> int:
        """Bytes of a matrix of that shape, all of it quantised."""
        elements = outputs * inputs
        blocks = -(-elements // 64)
        return -(-elements // 2) + blocks + 4 * -(-blocks // 256) + 3 * 8
