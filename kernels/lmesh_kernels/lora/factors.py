"""An adapter in memory: two thin factors a site, in one form for training and for serving."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

import torch
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


def merged(weight: Tensor, factors: Factors) -> Tensor:
    """The weight [outputs, inputs] that does what the base's and the adapter's do together, float32."""
    both = weight.float() + factors.scale * (factors.b.float() @ factors.a.float())
    if factors.magnitude is None:
        return both
    norms: Tensor = torch.linalg.vector_norm(both, dim=1)
    return both * (factors.magnitude.float() / norms).unsqueeze(1)


def content_digest(adapter: Adapter) -> str:
    """Hex sha256 of what an adapter computes: sites, scales, and the tensors' types, shapes and bytes.

    Files that hold the same adapter in another order, or with other notes beside it, have the same digest.
    """
    digest = sha256()
    for site in sorted(adapter):
        factors = adapter[site]
        digest.update(f"{site.theirs}\n".encode() + struct.pack("<d", factors.scale))
        for name, tensor in (("a", factors.a), ("b", factors.b), ("magnitude", factors.magnitude)):
            if tensor is not None:
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
