"""The gate of a SwiGLU MLP: silu(gate) * up."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lmesh_kernels.ops.backend import takes_triton


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2 * I], gate first; returns [..., I]. May overwrite gate_up."""
    if takes_triton(gate_up):
        from lmesh_kernels.ops.silu_mul_kernels import silu_mul_triton

        return silu_mul_triton(gate_up)
    return silu_mul_reference(gate_up)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """As `silu_mul`, in plain torch; the product is formed in place of the activated gate."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
