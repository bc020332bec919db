"""silu(gate) * up in the product against float64, with and without the norm, interpreted and on a device."""

from __future__ import annotations

import pytest
import torch
from lmesh_kernels.ops.gated_linear import (
    gated_linear,
    gated_linear_reference,
    norm_gated_linear,
    norm_gated_linear_reference,
)
from lmesh_kernels.ops.linear_tiles import DeviceFacts, NormTile, ProductTile, norm_tile

from tests.kernels.product_bounds import Bounded, draw, exactly, gated, norm, poison, product

EPS = 1e-5
SMALL = [(1, 4), (5, 8), (70, 68)]
LARGE = [(504, 520), (3072, 1024), (8192, 2048), (14336, 4096), (1000, 5120)]


def bounded(x: Bounded, weight: torch.Tensor, bias: torch.Tensor | None, *, stored: bool) -> Bounded:
    """`stored`: gate and up are rounded to the weight's dtype, and silu(gate) as well, as the plain ops do."""
    both = product(x, weight, bias)
    if not stored:
        return gated(both).stored(weight.dtype)
    result = gated(both.stored(weight.dtype))
    return Bounded(result.value, result.error).stored(weight.dtype).stored(weight.dtype)


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_kernels_interpreted(shape: tuple[int, int], biased: bool) -> None:
    from lmesh_kernels.ops.linear_row_kernels import normed_row_product
    from lmesh_kernels.ops.linear_tile_kernels import tile_product

    outputs, inputs = shape
    weight = draw(2 * outputs, inputs, dtype=torch.float32, device="cpu", seed=1)
    bias = draw(2 * outputs, dtype=torch.float32, device="cpu", seed=2) if biased else None
    for rows in (1, 7, 65):
        x = draw(rows, inputs, dtype=torch.float32, device="cpu", seed=rows)
        wanted = bounded(exactly(x), weight, bias, stored=False)
        for tile in (ProductTile(32, 32, 32, 4, 3), ProductTile(16, 64, 32, 4, 2, swapped=True)):
            out = poison(rows, outputs, like=x)
            tile_product(x, weight, bias, out, tile, gated=True, pdl=False)
            assert wanted.admits(out)
    x, residual = (draw(1, inputs, dtype=torch.float32, device="cpu", seed=i) for i in (3, 4))
    scale = draw(inputs, dtype=torch.float32, device="cpu", seed=5)
    for waves in (NormTile(1, 2, 20, 2), NormTile(1, 3, 40, 1), NormTile(4, 1000, 1, 1)):
        out, total = poison(1, outputs, like=x), poison(1, inputs, like=x)
        normed_row_product(x, residual, scale, EPS, weight, bias, out, total, waves, gated=True, pdl=False)
        assert torch.equal(total, x + residual)
        assert bounded(norm(total, scale, EPS), weight, bias, stored=False).admits(out)


@pytest.mark.parametrize("outputs", [8, 140, 300])  # one wave, an uneven end after it, most of it in the first
def test_tiles_for_the_norm_interpreted(outputs: int) -> None:
    from lmesh_kernels.ops.linear_row_kernels import normed_row_product

    tile = norm_tile(2 * outputs, 200, DeviceFacts(1, 1 << 16, False), gated=True)
    assert (tile.steps, tile.later) == {8: (1, 1), 140: (4, 1), 300: (6, 2)}[outputs]
    x, residual = (draw(1, 200, dtype=torch.float32, device="cpu", seed=i) for i in (3, 4))
    scale = draw(200, dtype=torch.float32, device="cpu", seed=5)
    weight = draw(2 * outputs, 200, dtype=torch.float32, device="cpu", seed=1)
    out, total = poison(1, outputs, like=x), poison(1, 200, like=x)
    normed_row_product(x, residual, scale, EPS, weight, None, out, total, tile, gated=True, pdl=False)
    assert bounded(norm(total, scale, EPS), weight, None, stored=False).admits(out)


def test_on_a_cpu_is_the_reference() -> None:
    x, residual = (draw(3, 8, dtype=torch.float32, device="cpu", seed=i) for i in (1, 2))
    scale, weight = (draw(*size, dtype=torch.float32, device="cpu", seed=3) for size in ((8,), (12, 8)))
    out, total = poison(3, 6, like=x), poison(3, 8, like=x)
    assert torch.equal(gated_linear(x, weight, out=out), gated_linear_reference(x, weight))
    found = norm_gated_linear(x, residual, scale, EPS, weight, out=out, total=total)
    assert found[0] is out and found[1] is total
    for ours, theirs in zip(found, norm_gated_linear_reference(x, residual, scale, EPS, weight), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="no batch-invariant product"):
        gated_linear(x, weight, batch_invariant=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_on_a_device(shape: tuple[int, int], biased: bool, dtype: torch.dtype) -> None:
    outputs, inputs = shape
    # Sums of the size that a model's have: float16 ends at 65,504.
    weight = draw(2 * outputs, inputs, dtype=dtype, device="cuda", seed=1) * inputs**-0.5
    bias = draw(2 * outputs, dtype=dtype, device="cuda", seed=2) if biased else None
    scale = draw(inputs, dtype=dtype, device="cuda", seed=3)
    for rows in (1, 7, 17, 33, 64, 65, 128, 200, 300):
        x, residual = (draw(rows, inputs, dtype=dtype, device="cuda", seed=rows + i) for i in (0, 1))
        wanted = bounded(exactly(x), weight, bias, stored=True)
        for invariant in (False, True):
            out = poison(rows, outputs, like=x)
            assert wanted.admits(gated_linear(x, weight, bias, out=out, batch_invariant=invariant))
        out, total = poison(rows, outputs, like=x), poison(rows, inputs, like=x)
        norm_gated_linear(x, residual, scale, EPS, weight, bias, out=out, total=total)
        assert torch.equal(total, x + residual)
        assert bounded(norm(total, scale, EPS), weight, bias, stored=True).admits(out)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_batch_invariant_rows_are_equal(shape: tuple[int, int]) -> None:
    outputs, inputs = shape
    weight = draw(2 * outputs, inputs, dtype=torch.bfloat16, device="cuda", seed=1) * inputs**-0.5
    x = draw(300, inputs, dtype=torch.bfloat16, device="cuda", seed=2)
    together = gated_linear(x, weight, batch_invariant=True)
    for rows in (1, 2, 16, 17, 64, 65, 128, 129, 256):
        for first in (0, 300 - rows):
            some = slice(first, first + rows)
            assert torch.equal(gated_linear(x[some], weight, batch_invariant=True), together[some])
