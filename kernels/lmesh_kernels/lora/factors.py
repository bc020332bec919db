"""An adapter in memory: two thin factors a site, in one form for training and for serving."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lmesh_kernels.lora.sites import Site


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factors:
    """y += scale * (x @ a.T) @ b.T at one site (Hu et al. 2021, arXiv 2106.09685).

    `magnitude` is DoRA's (Liu et al. 2024, arXiv 2402.09353): the row norms that weight + scale * b @ a is given.
    """

    a: Tensor  # [rank, inputs]
    b: Tensor  # [outputs, rank]
    scale: float
    magnitude: Tensor | None = None  # [outputs]

    @property
    def rank(self) -> int:
        """Of the product."""
        return self.a.shape[0]


Adapter = Mapping[Site, Factors]
"""Sites that are absent are the base's alone; ranks may differ from site to site."""
