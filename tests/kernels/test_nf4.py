"""NF4 beside bitsandbytes, which made the format: codes, statistics, weights, and tensors as it saves them."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lmesh_kernels.quant.bitsandbytes_tensors import QuantisedTensorError, owner, read_nf4
from lmesh_kernels.quant.nf4 import (
    Nf4Statistics,
    block_scales,
    dequantise,
    dynamic_levels,
    nf4_levels,
    quantise,
)
from torch import Tensor

SHAPES = ((96, 128), (576, 576), (1, 64), (3, 96), (5, 7), (7, 1), (192, 1536))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


def saved(values: Tensor, *, nested: bool = True, kind: str = "nf4") -> dict[str, Tensor]:
    """As transformers writes it into a checkpoint."""
    packed, state = bnb.quantize_4bit(values, blocksize=64, compress_statistics=nested, quant_type=kind)
    return {"w": packed, **{f"w.{name}": part for name, part in state.as_dict(packed=True).items()}}


def unfolded(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """The format as it is defined, of bitsandbytes' own codes, levels and statistics: rounded once, from float32."""
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[: state.shape.numel()]
    scales = state.absmax
    if state.nested:
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return (state.code[codes.long()] * scales.repeat_interleave(64)[: len(codes)]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_those_of_bitsandbytes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = weight(shape, dtype)
    packed, state = bnb.quantize_4bit(values, blocksize=64, compress_statistics=True, quant_type="nf4")
    made = quantise(values)
    assert isinstance(made.statistics, Nf4Statistics)
    assert torch.equal(made.codes, packed.flatten())
    assert torch.equal(made.statistics.scales, state.state2.absmax)
    assert torch.equal(made.statistics.mean, state.offset)
    assert torch.equal(made.statistics.levels, state.state2.code)
    assert torch.equal(made.levels, state.code)


def test_statistics_are_the_nearest_levels() -> None:
    """Of bitsandbytes' own, made by its CPU's coarse table, none may be nearer; on a GPU they are the same."""
    values = weight((576, 576))
    made = quantise(values).statistics
    assert isinstance(made, Nf4Statistics)
    due = values.view(-1, 64).abs().amax(dim=1) - made.mean
    scales = made.scales.repeat_interleave(made.block)[: due.numel()]
    ours = (made.levels[made.codes.long()] * scales - due).abs()
    nearest = (dynamic_levels() * scales.unsqueeze(1) - due.unsqueeze(1)).abs().amin(dim=1)
    torch.testing.assert_close(ours, nearest, rtol=0, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_of_it_is_that_of_bitsandbytes_on_a_gpu(dtype: torch.dtype) -> None:
    values = weight((2048, 4096), dtype).cuda()
    packed, state = bnb.quantize_4bit(values, blocksize=64, compress_statistics=True, quant_type="nf4")
    made = quantise(values)
    assert isinstance(made.statistics, Nf4Statistics)
    # Where two levels are equally near, rounding decides: 1 in a million at most.
    assert int((made.codes != packed.flatten()).sum()) <= 8
    assert int((made.statistics.codes != state.absmax).sum()) <= 2
    same = made.codes == packed.flatten()
    theirs = bnb.dequantize_4bit(packed, state).flatten().view(-1, 2)
    known = (made.statistics.codes == state.absmax).repeat_interleave(32)
    assert torch.equal(dequantise(made, dtype).flatten().view(-1, 2)[same & known], theirs[same & known])


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_bitsandbytes_saved_is_read_to_the_bit(dtype: torch.dtype, nested: bool) -> None:
    for seed, shape in enumerate(SHAPES):
        values = weight(shape, dtype, seed)
        tensors = saved(values, nested=nested)
        packed, state = bnb.quantize_4bit(values, blocksize=64, compress_statistics=nested, quant_type="nf4")
        found = dequantise(read_nf4("w", tensors), dtype)
        assert torch.equal(found, unfolded(packed, state, dtype).view(shape))
        if shape[1] % 64 == 0:  # bitsandbytes 0.50's AVX-512 kernel takes another row's statistics where it is not
            assert torch.equal(found, bnb.dequantize_4bit(packed, state))
        assert [name for name in tensors if not owner(name)] == ["w"]


def test_what_cannot_be_read_is_named() -> None:
    good = saved(weight((96, 128)))
    state = "w.quant_state.bitsandbytes__nf4"
    faults = {
        "NOT_NF4": [saved(weight((96, 128)), kind="fp4"), {"w": good["w"]}],
        "MISSING_PART": [{k: v for k, v in good.items() if k != part} for part in ("w", "w.absmax", "w.nested_absmax")],
        "WRONG_PART": [
            {**good, "w": good["w"][1:]},
            {**good, "w.absmax": good["w.absmax"].float()},
            {**good, state: good[state][:-1]},
            {**good, state: torch.tensor(list(b"[]"), dtype=torch.uint8)},
        ],
    }
    for reason, cases in faults.items():
        for tensors in cases:
            with pytest.raises(QuantisedTensorError) as caught:
                read_nf4("w", tensors)
            assert caught.value.reason == reason and "w" in str(caught.value)


@given(st.lists(st.floats(-65504, 65504, width=16), min_size=1, max_size=400))
@settings(max_examples=60, deadline=None)
def test_no_weight_is_further_off_than_half_a_step(values: list[float]) -> None:
    original = torch.tensor(values, dtype=torch.float32)
    made = quantise(original)
    again = dequantise(made, torch.float32)
    scales = block_scales(made).repeat_interleave(made.block)[: original.numel()]
    largest = original.abs().max()
    half_step = float((nf4_levels()[1:] - nf4_levels()[:-1]).max()) / 2
    # The statistics are codes themselves: the scale itself is off by up to half a step of the levels near 1.
    assert bool(((again - original).abs() <= half_step * scales.abs() + 0.02 * largest + 1e-6).all())


def test_four_bits_and_an_eighth() -> None:
    made = quantise(weight((1024, 1024)))
    assert 8 * made.nbytes / 1024**2 == pytest.approx(4.127, abs=1e-3)


def test_what_is_no_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="floating-point"):
        quantise(torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="finite"):
        quantise(torch.tensor([1.0, float("nan")]))
