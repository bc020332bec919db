"""The gate of a SwiGLU MLP: silu(gate) * up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmesh_kernels.ops.backend import takes_triton
from lmesh_kernels.ops.row_blocks import row_blocks


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2 * I], gate first; returns [..., I]. May overwrite gate_up."""
    if takes_triton(gate_up):
        from lmesh_kernels.ops.silu_mul_kernels import silu_mul_triton

        return silu_mul_triton(gate_up)
    return silu_mul_reference(gate_up)


def silu_mul_train(gate_up: Tensor) -> Tensor:
    """As `silu_mul`, a new tensor; gate_up stays as it is."""
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    for rows in row_blocks(out, 3):
        torch.ops.aten.silu.out(gate[rows], out=out[rows]).mul_(up[rows])
    return out


def silu_mul_backward_(dout: Tensor, gate_up: Tensor) -> Tensor:
    """Overwrites gate_up [T, 2 * I] by its gradient, and dout [T, I] by anything; returns what `silu_mul_train` gave.

    d up = silu(gate) * d; d gate = silu'(gate) * up * d.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    out = torch.empty_like(dout)
    for rows in row_blocks(out, 5):
        g, u, d, made = gate[rows], up[rows], dout[rows], out[rows]
        torch.ops.aten.silu.out(g, out=made)
        along = made * d
        d.mul_(u)
        made.mul_(u)
        u.copy_(along)
        torch.ops.aten.silu_backward.grad_input(d, g, grad_input=g)
    return out


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """As `silu_mul`, in plain torch; the product is formed in place of the activated gate."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
