"""rms_norm, silu_mul, embedding and logits against float64, on odd shapes, to derived bounds."""

from __future__ import annotations

import pytest
import torch
from lmesh_kernels.ops import row_blocks
from lmesh_kernels.ops.embedding import embed, vocabulary_logits
from lmesh_kernels.ops.rms_norm import inverse_rms, rms_norm, rms_norm_backward, scaled
from lmesh_kernels.ops.silu_mul import silu_mul, silu_mul_backward_, silu_mul_train

UNIT = 2.0**-24  # rounding of one float32 operation, relative
# Rounding of one store in a dtype, relative: the ops compute in float32 and store in their inputs' dtype.
STORE = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = [(1, 1), (3, 7), (5, 129), (2, 2049)]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", STORE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(shape: tuple[int, int], dtype: torch.dtype, with_residual: bool) -> None:
    eps, size = 1e-5, shape[1]
    x, weight = draw(*shape, dtype=dtype), draw(size, dtype=dtype, seed=1)
    residual = draw(*shape, dtype=dtype, seed=2) if with_residual else None
    normed, total = rms_norm(x, weight, eps, residual)
    # The sum is one rounding; the norm is then held to the sum as stored.
    wide = x.double() + (residual.double() if residual is not None else 0)
    assert ((total.double() - wide).abs() <= STORE[dtype] * wide.abs()).all()
    expected = total.double() / (total.double().pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    # size additions and squares under a root (half their error), a root, two products; two stores.
    bound = ((size / 2 + 8) * UNIT + 2.1 * STORE[dtype]) * expected.abs()
    # Below the dtype's normal range a store's error is absolute; the first store is then scaled by the weight.
    floor = torch.finfo(dtype).tiny * STORE[dtype] * (1 + weight.double().abs())
    assert ((normed.double() - expected).abs() <= bound + floor).all()
    assert normed.dtype == total.dtype == dtype


@pytest.mark.parametrize("dtype", STORE)
@pytest.mark.parametrize("shape", SHAPES)
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = 4 * draw(shape[0], 2 * shape[1], dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = gate / (1 + (-gate).exp()) * up
    # exp (2 ulp, vectorised), addition, division, and the two stores: the gate's and the product's.
    bound = (8 * UNIT + 2.1 * STORE[dtype]) * expected.abs() + torch.finfo(dtype).tiny
    assert ((silu_mul(gate_up.clone()).double() - expected).abs() <= bound).all()


@pytest.fixture(params=[1, 1 << 12, row_blocks.CHAIN_BYTES], ids=["a-row", "some-rows", "whole"])
def chain_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of several sizes: a row at a time, some with a rest, all at once."""
    monkeypatch.setattr(row_blocks, "CHAIN_BYTES", request.param)
    return int(request.param)


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (50, 129)])
@pytest.mark.usefixtures("chain_bytes")
def test_silu_mul_backward(shape: tuple[int, int]) -> None:
    gate_up, dout = 4 * draw(shape[0], 2 * shape[1]), draw(*shape, seed=1)
    wide = gate_up.double().requires_grad_()
    gate, up = wide.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    expected.backward(dout.double())
    made = silu_mul_train(gate_up)
    assert torch.equal(silu_mul_backward_(dout.clone(), gate_up), made)
    # As `test_silu_mul`; the gate's derivative is a sum of terms up to |gate| + 1, of which some cancel.
    assert ((made.double() - expected).abs() <= 10 * UNIT * expected.abs() + 2.0**-126).all()
    assert wide.grad is not None
    terms = (dout.double().abs() * (1 + gate.abs()) * (1 + up.abs())).repeat(1, 2)
    assert ((gate_up.double() - wide.grad).abs() <= 12 * UNIT * terms).all()


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (50, 129)])
@pytest.mark.parametrize("with_addition", [False, True])
@pytest.mark.usefixtures("chain_bytes")
def test_rms_norm_backward(shape: tuple[int, int], with_addition: bool) -> None:
    x, weight, dy = draw(*shape), draw(shape[1], seed=1), draw(*shape, seed=2)
    add = draw(*shape, seed=3) if with_addition else None
    wide = x.double().requires_grad_()
    normed = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    normed.backward(dy.double())
    rstd = inverse_rms(x, 1e-5)
    size = shape[1]
    bound = (size / 2 + 8) * UNIT
    assert ((scaled(x, rstd, weight).double() - normed).abs() <= bound * normed.abs()).all()
    found = rms_norm_backward(dy.clone(), x, rstd, weight, add=add).double()
    assert wide.grad is not None
    expected = wide.grad if add is None else wide.grad + add.double()
    # Both terms of the difference carry the root's error three times over, and a sum of size products.
    g = (dy.double() * weight.double()).abs() * rstd.double()
    along = (g * x.double().abs() * rstd.double()).mean(-1, keepdim=True) * x.double().abs() * rstd.double()
    terms = g + along + (0 if add is None else add.double().abs())
    assert ((found - expected).abs() <= (2.5 * size + 24) * UNIT * terms).all()


def test_embed_is_exact() -> None:
    weight = draw(11, 5)
    ids = torch.tensor([10, 0, 3, 3])
    assert torch.equal(embed(ids, weight), torch.stack([weight[i] for i in ids]))


@pytest.mark.parametrize("dtype", STORE)
@pytest.mark.parametrize(("rows", "hidden", "vocab"), [(1, 1, 3), (3, 65, 131), (7, 257, 33)])
def test_vocabulary_logits(rows: int, hidden: int, vocab: int, dtype: torch.dtype) -> None:
    x, weight = draw(rows, hidden, dtype=dtype), draw(vocab, hidden, dtype=dtype, seed=1)
    expected = x.double() @ weight.double().T
    # A dot product of n terms in float32: n roundings of the terms' magnitudes; then one store.
    bound = hidden * UNIT * (x.double().abs() @ weight.double().abs().T) + 1.1 * STORE[dtype] * expected.abs()
    logits = vocabulary_logits(x, weight)
    assert logits.dtype == torch.float32
    assert ((logits.double() - expected).abs() <= bound).all()
