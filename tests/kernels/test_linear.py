"""The product with a weight matrix against float64: plain, packed, and its kernels, interpreted and on a device."""

from __future__ import annotations

import pytest
import torch
from lmesh_kernels.ops.linear import linear, linear_reference, pack
from lmesh_kernels.ops.linear_tiles import DeviceFacts, ProductTile, RowTile, gated_tile, product_tile, suits

from tests.kernels.product_bounds import draw, exactly, poison, product


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 7, 5), (3, 64, 33), (32, 577, 961), (70, 128, 1)])
@pytest.mark.parametrize("biased", [False, True])
def test_against_float64(rows: int, inputs: int, outputs: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator) if biased else None
    exact = linear_reference(x.double(), weight.double(), None if bias is None else bias.double())
    # A sum of n products of size s errs by at most about n * eps * s in any order; |x||w| bounds each row's size.
    bound = (inputs + 1) * torch.finfo(torch.float32).eps * (x.norm(dim=1).max() * weight.norm(dim=1).max() + 1)
    for packed in (None, pack(weight)):
        assert (linear(x, weight, bias, packed).double() - exact).abs().max() <= bound


def test_what_is_packed() -> None:
    assert pack(torch.randn(8, 8)) is not None
    assert pack(torch.randn(8, 8, dtype=torch.bfloat16)) is None


def test_packing_is_a_copy() -> None:
    weight = torch.ones(4, 4)
    packed = pack(weight)
    weight.zero_()
    assert linear(torch.ones(1, 4), weight, None, packed).sum() == 16


# Outputs and inputs; a descriptor's rows begin at 16 bytes, which is 4 float32 or 8 bfloat16.
SMALL = [(1, 4), (5, 8), (33, 68), (131, 36)]
LARGE = [(1, 8), (1003, 520), (4096, 1024), (2048, 8192), (8200, 1032), (12304, 2048)]
TILES = [ProductTile(32, 32, 32, 4, 3), ProductTile(16, 64, 64, 4, 2, swapped=True)]


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_kernels_interpreted(shape: tuple[int, int], biased: bool) -> None:
    from lmesh_kernels.ops.linear_row_kernels import row_product
    from lmesh_kernels.ops.linear_tile_kernels import tile_product

    outputs, inputs = shape
    weight = draw(*shape, dtype=torch.float32, device="cpu", seed=1)
    bias = draw(outputs, dtype=torch.float32, device="cpu", seed=2) if biased else None
    for rows in (1, 7, 33, 65):
        x = draw(rows, inputs, dtype=torch.float32, device="cpu", seed=rows)
        wanted = product(exactly(x), weight, bias).stored(torch.float32)
        for tile in TILES:
            out = poison(rows, outputs, like=x)
            tile_product(x, weight, bias, out, tile, gated=False, pdl=False)
            assert wanted.admits(out)
        if rows == 1:
            for row_tile in (RowTile(4, 64, 4), RowTile(1, 16, 1)):
                out = poison(1, outputs, like=x)
                row_product(x, weight, bias, out, row_tile, pdl=False)
                assert wanted.admits(out)


def test_inputs_that_no_tile_takes() -> None:
    from lmesh_kernels.ops.linear_row_kernels import row_product

    x, weight = (draw(n, 7, dtype=torch.float32, device="cpu", seed=n) for n in (1, 5))
    out = poison(1, 5, like=x)
    row_product(x, weight, None, out, RowTile(4, 16, 4), pdl=False)
    assert product(exactly(x), weight, None).stored(torch.float32).admits(out)
    assert not suits(x, weight)
    with pytest.raises(ValueError, match="no batch-invariant product"):
        linear(x, weight, batch_invariant=True)


def test_output_given_on_a_cpu() -> None:
    x, weight = (draw(n, 8, dtype=torch.float32, device="cpu", seed=n) for n in (3, 5))
    out = poison(3, 5, like=x)
    assert linear(x, weight, out=out) is out
    assert torch.equal(out, linear_reference(x, weight))


@pytest.mark.parametrize("outputs", [1, 1024, 4096, 6144, 16384, 128256])
@pytest.mark.parametrize("shared", [48 << 10, 64 << 10, 99 << 10, 227 << 10])
def test_tiles_fit_the_device(outputs: int, shared: int) -> None:
    device = DeviceFacts(100, shared, False)
    for rows in (1, 17, 64, 65, 128, 129, 4096):
        tile = product_tile(rows, outputs, device, always=True)
        assert tile is not None
        assert tile.stages * 2 * tile.block_k * (tile.block_m + tile.block_n) < shared
        tile = gated_tile(rows, outputs, device, always=True)
        assert tile is not None
        assert tile.stages * 2 * tile.block_k * (tile.block_m + 2 * tile.block_n) < shared


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_on_a_device(shape: tuple[int, int], biased: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # Else torch's own product, for many rows, may round its partial sums to 16 bits.
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        monkeypatch.setattr(torch.backends.cuda.matmul, name, False)
    outputs, inputs = shape
    weight = draw(*shape, dtype=dtype, device="cuda", seed=1)
    bias = draw(outputs, dtype=dtype, device="cuda", seed=2) if biased else None
    for rows in (1, 2, 7, 16, 17, 33, 64, 65, 128, 129, 1023):
        x = draw(rows, inputs, dtype=dtype, device="cuda", seed=rows)
        wanted = product(exactly(x), weight, bias).stored(dtype)
        for invariant in (False, True):
            out = poison(rows, outputs, like=x)
            assert linear(x, weight, bias, out=out, batch_invariant=invariant) is out
            assert wanted.admits(out)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*LARGE[2:], (28672, 4096)], ids=str)
def test_batch_invariant_rows_are_equal(shape: tuple[int, int]) -> None:
    weight = draw(*shape, dtype=torch.bfloat16, device="cuda", seed=1)
    x = draw(300, shape[1], dtype=torch.bfloat16, device="cuda", seed=2)
    together = linear(x, weight, batch_invariant=True)
    prefill = linear(x.repeat(3, 1), weight, batch_invariant=True)
    assert torch.equal(prefill[300:600], together)
    for rows in (1, 2, 16, 17, 32, 33, 64, 65, 128, 129, 256):
        for first in (0, 300 - rows):
            some = slice(first, first + rows)
            assert torch.equal(linear(x[some], weight, batch_invariant=True), together[some])


@pytest.mark.gpu
def test_in_a_graph_without_waiting() -> None:
    weights = [draw(2048, 2048, dtype=torch.bfloat16, device="cuda", seed=i) * 0.03 for i in range(4)]
    x = draw(16, 2048, dtype=torch.bfloat16, device="cuda", seed=9)

    def chain(rows: int) -> torch.Tensor:
        y = x[:rows]
        for weight in weights:
            y = linear(y, weight)
        return y

    for rows in (1, 16):
        chain(rows)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.graph(graph, stream=stream):
            y = chain(rows)
        for seed in (10, 11):
            x.copy_(draw(16, 2048, dtype=torch.bfloat16, device="cuda", seed=seed))
            graph.replay()
            torch.cuda.set_sync_debug_mode("error")
            try:
                expected = chain(rows)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert torch.equal(y, expected)
