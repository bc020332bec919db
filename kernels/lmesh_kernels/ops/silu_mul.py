"""The gate of a SwiGLU MLP: silu(gate) * up."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2 * I], gate first; returns [..., I]. May overwrite gate_up."""
    return silu_mul_reference(gate_up)


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    """As `silu_mul`, in plain torch; the product is formed in place of the activated gate."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
