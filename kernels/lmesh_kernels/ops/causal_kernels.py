"""Causal attention of one row, and of packed rows at once, forward and backward: what each device has for it.

The operators are those behind torch's own scaled dot product attention; called here, they need no graph of autograd's
for each row, and write where they should.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

aten = torch.ops.aten

# One row: q, k, v [kv_heads, group, n, head_dim].


def row_forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(output as q, what `row_backward` needs besides it)."""
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        return out, lse
    return scaled_dot_product_attention(q, k, v, is_causal=True), q.new_empty(0)


def row_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each [kv_heads, group, n, head_dim]."""
    if q.device.type == "cpu":
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, kept, 0.0, True)
        return dq, dk, dv
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        again = scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], is_causal=True)
        dq, dk, dv = torch.autograd.grad(again, leaves, dout)
    return dq, dk, dv


# All rows: q [T, heads, head_dim], k and v [T, kv_heads, head_dim], heads a multiple of kv_heads.


def packs(q: Tensor) -> bool:
    """Whether the device has one kernel for rows of different lengths in this dtype."""
    return q.device.type == "cuda" and q.dtype in (torch.float16, torch.bfloat16)


def packed_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> tuple[Tensor, list[Tensor]]:
    """(output as q, what `packed_backward` needs besides it)."""
    out, lse, state, unused, _ = aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, True, False
    )
    return out, [lse, state, unused]


def packed_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, kept: list[Tensor], cu_seqlens: Tensor, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in their shapes."""
    lse, state, unused = kept
    dq, dk, dv = aten._flash_attention_backward(
        dout, q, k, v, out, lse, cu_seqlens, cu_seqlens, longest, longest, 0.0, True, state, unused
    )
    return dq, dk, dv
