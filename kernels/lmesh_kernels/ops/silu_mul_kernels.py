"""The Triton form of `silu_mul`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmesh_kernels.ops.linear_tiles import launch_options, takes_pdl

_BLOCK = 1024


@triton.jit
def _silu_mul(gate_up, out, size, stride, BLOCK: tl.constexpr, PDL: tl.constexpr) -> None:
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + size + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded between the two, as the reference does.
    active = (gate / (1.0 + tl.exp(-gate))).to(out.dtype.element_ty)
    tl.store(out + row * size + column, (active.to(tl.float32) * up).to(out.dtype.element_ty), mask=inside)


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    """As `silu_mul.silu_mul`; gate_up has rows of stride-1 elements."""
    size = gate_up.shape[-1] // 2
    flat = gate_up.reshape(-1, 2 * size)
    out = torch.empty(flat.shape[0], size, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel():
        pdl = takes_pdl(gate_up.device)
        _silu_mul[(flat.shape[0], triton.cdiv(size, _BLOCK))](
            flat, out, size, flat.stride(0), BLOCK=_BLOCK, PDL=pdl, **launch_options(4, 3, pdl)
        )
    return out.view(*gate_up.shape[:-1], size)
