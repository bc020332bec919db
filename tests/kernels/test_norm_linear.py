"""The product with its norm ahead of it against float64, interpreted and on a device."""

from __future__ import annotations

import pytest
import torch
from lmesh_kernels.ops.linear_tiles import MOST_NORMED, NormTile
from lmesh_kernels.ops.norm_linear import fused, norm_linear, norm_linear_reference

from tests.kernels.product_bounds import draw, norm, poison, product

EPS = 1e-5
# All in one wave, an even and an odd rest after it (of 70 rows), and more programs than rows.
TILES = [NormTile(1, 2, 35, 1), NormTile(4, 3, 2, 2), NormTile(2, 5, 2, 2), NormTile(2, 1000, 1, 1)]
SMALL = [(1, 4), (5, 7), (70, 200)]
LARGE = [(1, 8), (1003, 520), (3072, 2048), (6144, 4096), (4096, 1024), (1000, 8192), (152, 5120)]


def operands(
    rows: int, shape: tuple[int, int], dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, residual, the norm's weight, the weight and a bias."""
    outputs, inputs = shape
    sizes = ((rows, inputs), (rows, inputs), (inputs,), (outputs, inputs), (outputs,))
    x, residual, scale, weight, bias = (
        draw(*size, dtype=dtype, device=device, seed=rows + i) for i, size in enumerate(sizes)
    )
    return x, residual, scale, weight, bias


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_kernel_interpreted(shape: tuple[int, int], tile: NormTile, residual: bool) -> None:
    from lmesh_kernels.ops.linear_row_kernels import normed_row_product

    x, before, scale, weight, bias = operands(1, shape, torch.float32, "cpu")
    total = x + before if residual else x
    found = poison(1, shape[1], like=x) if residual else None
    for own in (None, bias):
        out = poison(1, shape[0], like=x)
        normed_row_product(
            x, before if residual else None, scale, EPS, weight, own, out, found, tile, gated=False, pdl=False
        )
        assert product(norm(total, scale, EPS), weight, own).stored(torch.float32).admits(out)
        assert found is None or torch.equal(found, total)


def test_on_a_cpu_is_the_reference() -> None:
    x, residual, scale, weight, bias = operands(3, (16, 8), torch.float32, "cpu")
    wanted = norm_linear_reference(x, residual, scale, EPS, weight, bias)
    out, total = poison(3, 16, like=x), poison(3, 8, like=x)
    found = norm_linear(x, residual, scale, EPS, weight, bias, out=out, total=total)
    assert found[0] is out and found[1] is total
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)
    assert norm_linear(x, None, scale, EPS, weight)[1] is x


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_on_a_device(shape: tuple[int, int], residual: bool, dtype: torch.dtype) -> None:
    for rows in (1, 5, 64):
        x, before, scale, weight, bias = operands(rows, shape, dtype, "cuda")
        assert fused(x, before, weight) == (rows == 1 and shape[1] <= MOST_NORMED)
        stream = x + before if residual else x
        for own in (None, bias):
            out = poison(rows, shape[0], like=x)
            total = poison(rows, shape[1], like=x) if residual else None
            own_residual = before if residual else None
            found = norm_linear(x, own_residual, scale, EPS, weight, own, out=out, total=total)
            assert found[0] is out and torch.equal(found[1], stream)
            assert product(norm(stream, scale, EPS), weight, own).stored(dtype).admits(out)
