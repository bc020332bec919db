"""The product with a weight matrix, plain and packed, against float64."""

from __future__ import annotations

import pytest
import torch
from lmesh_kernels.ops.linear import linear, linear_reference, pack


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
