"""Random weights in a model's shape, made on its device: for measuring speed, which does not depend on the values."""

from __future__ import annotations

import torch
from torch import Tensor

from lmesh_kernels.layers.linear import Linear
from lmesh_kernels.layers.norm import RMSNorm
from lmesh_kernels.models.decoder import Decoder

SEED = 0
STD = 0.02
"""Of all matrices: what models are initialised with, so that logits are finite and spread as in a young model."""


@torch.no_grad()
def fill_dummy(decoder: Decoder, *, seed: int = SEED) -> None:
    """Fills every slot: matrices and biases normal around 0 with `STD`, norms 1. No value passes through the host.

    The same seed gives the same values on one kind of device, in one dtype, under one version of torch; not across.
    """
    device = decoder.arena.device
    generator = torch.Generator(device).manual_seed(seed)
    decoder.arena.normal_(0.0, STD, generator=generator)
    for module in decoder.modules():
        if isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
        elif isinstance(module, Linear) and module.quantised is not None:
            module.quantised.put(0, _matrix(module, decoder.dtype, generator))


def _matrix(module: Linear, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """The whole of a quantised product at once: where its parts would meet changes no speed."""
    empty = torch.empty(module.outputs, module.inputs, dtype=dtype, device=generator.device)
    return empty.normal_(0.0, STD, generator=generator)
