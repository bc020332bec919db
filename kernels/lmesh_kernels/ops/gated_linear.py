"""The first product of a SwiGLU MLP, with silu(gate) * up made before anything is written, and the norm ahead of it."""

from __future__ import annotations

from torch import Tensor

from lmesh_kernels.ops.linear import linear, linear_reference, placed
from lmesh_kernels.ops.linear_tiles import WANTED, describe, device_facts, gated_tile, suits
from lmesh_kernels.ops.norm_linear import fused, normed_row
from lmesh_kernels.ops.rms_norm import rms_norm, rms_norm_reference
from lmesh_kernels.ops.silu_mul import silu_mul, silu_mul_reference


def gated_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    packed: Tensor | None = None,
    *,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """silu(x @ gate.T) * (x @ up.T) of x [T, inputs]; weight [2 * I, inputs] has the gate's rows first.

    bias [2 * I]. Returns [T, I], `out` if given. `packed` and `batch_invariant` are as in `linear`. Where a tile
    takes them (`gated_tile`; not one row) gate and up stay in float32 until their product is rounded.
    """
    if not suits(x, weight, out):
        if batch_invariant:
            raise ValueError(f"no batch-invariant product for {describe(x)} and {describe(weight)}: {WANTED}")
        return placed(silu_mul(linear(x, weight, bias, packed)), out)
    device = device_facts(x.device)
    outputs = len(weight) // 2
    # One row: in a layer of Qwen3-14B the tile takes 10 us more, of some 180.
    alone = len(x) == 1 and not batch_invariant
    tile = None if alone else gated_tile(len(x), outputs, device, always=batch_invariant)
    if tile is None:
        return placed(silu_mul(linear(x, weight, bias)), out)
    from lmesh_kernels.ops.linear_tile_kernels import tile_product  # needs triton, which CPUs do without

    y = x.new_empty(len(x), outputs) if out is None else out
    tile_product(x, weight, bias, y, tile, gated=True, pdl=device.pdl)
    return y


def gated_linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `gated_linear`, in plain torch."""
    return silu_mul_reference(linear_reference(x, weight, bias))


def norm_gated_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    packed: Tensor | None = None,
    *,
    out: Tensor | None = None,
    total: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """`gated_linear` of norm(x + residual); arguments and the second result are as `norm_linear` has them."""
    if not fused(x, residual, weight, out, total) or batch_invariant:
        normed, stream = rms_norm(x, norm_weight, eps, residual)
        y = gated_linear(normed, weight, bias, packed, out=out, batch_invariant=batch_invariant)
        return y, stream if residual is None or total is None else total.copy_(stream)
    return normed_row(x, residual, norm_weight, eps, weight, bias, out, total, gated=True)


def norm_gated_linear_reference(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `norm_gated_linear`, in plain torch."""
    normed, stream = rms_norm_reference(x, norm_weight, eps, residual)
    return gated_linear_reference(normed, weight, bias), stream
