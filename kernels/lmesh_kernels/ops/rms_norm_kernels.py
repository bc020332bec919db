"""The Triton form of `rms_norm`: a program a row, the residual's addition in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmesh_kernels.ops.linear_tiles import launch_options, takes_pdl


@triton.jit
def _rms_norm(
    x,
    residual,
    weight,
    out,
    total,
    size,
    x_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < size
    scale = tl.load(weight + column, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        wide += tl.load(residual + row * size + column, mask=inside, other=0.0).to(tl.float32)
        kept = wide.to(out.dtype.element_ty)
        tl.store(total + row * size + column, kept, mask=inside)
        wide = kept.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide) / size + eps)
    # Rounded before the weight, as the reference does.
    normed = (wide * rstd).to(out.dtype.element_ty)
    tl.store(
        out + row * size + column, (normed.to(tl.float32) * scale.to(tl.float32)).to(out.dtype.element_ty), mask=inside
    )


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `rms_norm.rms_norm`; the last dimension of x has stride 1."""
    size = x.shape[-1]
    flat = x.reshape(-1, size)
    out = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(out)
    if flat.shape[0]:
        block, pdl = triton.next_power_of_2(size), takes_pdl(x.device)
        _rms_norm[(flat.shape[0],)](
            flat,
            flat if residual is None else residual,
            weight,
            out,
            out if residual is None else total,
            size,
            flat.stride(0),
            eps,
            HAS_RESIDUAL=residual is not None,
            BLOCK=block,
            PDL=pdl,
            **launch_options(min(16, max(1, block // 512)), 3, pdl),
        )
    return out.view(x.shape), total.view(x.shape)
