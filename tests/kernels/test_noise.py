"""The counter noise: the same bits as plain integers give, uniform, and independent of everything but its counters."""

from __future__ import annotations

import math

import torch
from lmesh_kernels.ops.noise import gumbel, row_keys, uniforms

MASK64, MASK32 = (1 << 64) - 1, (1 << 32) - 1
STEP, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix64(x: int) -> int:
    x = (x ^ (x >> 30)) * MIX_1 & MASK64
    x = (x ^ (x >> 27)) * MIX_2 & MASK64
    return x ^ (x >> 31)


def round32(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x21F0AAAD & MASK32
    x = (x ^ (x >> 15)) * 0x735A2D97 & MASK32
    return x ^ (x >> 15)


def plain_uniform(seed: int, choice: int, position: int, token: int) -> float:
    key = mix64((seed + STEP) & MASK64)
    key = mix64(key ^ ((choice * STEP + MIX_1) & MASK64))
    key = mix64(key ^ ((position * STEP + MIX_2) & MASK64))
    bits = round32(round32(token ^ (key >> 32)) ^ (key & MASK32))
    return ((bits >> 9) + 0.5) / 2**23


def test_same_bits_as_plain_integers() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF]
    choices, positions = [0, 1, 7, 0, 3, 127], [0, 5, 131071, 2**40, 1, 9]
    ids = [0, 1, 2, 49151, 151935, 2**31 - 1]
    keys = row_keys(torch.tensor(seeds), torch.tensor(choices), torch.tensor(positions))
    actual = uniforms(keys, torch.tensor(ids, dtype=torch.int32))
    counters = zip(seeds, choices, positions, strict=True)
    expected = [[plain_uniform(s & MASK64, c, p, token) for token in ids] for s, c, p in counters]
    assert actual.dtype == torch.float32
    assert actual.double().tolist() == expected


def test_inside_the_open_interval_and_finite() -> None:
    keys = row_keys(torch.arange(64), torch.zeros(64, dtype=torch.int64), torch.arange(64))
    ids = torch.arange(50_000, dtype=torch.int32)
    values = uniforms(keys, ids)
    assert 0 < values.min() < 1e-5
    assert 1 - 1e-5 < values.max() < 1
    assert torch.isfinite(gumbel(keys, ids)).all()


def bins(values: torch.Tensor, count: int) -> float:
    """Standardised chi-square of values in (0, 1) over equal bins."""
    counts = torch.bincount((values.flatten() * count).long(), minlength=count).double()
    expected = values.numel() / count
    return ((((counts - expected) ** 2 / expected).sum() - (count - 1)) / math.sqrt(2 * (count - 1))).item()


def test_uniform_along_every_counter() -> None:
    many, zeros = torch.arange(200_000), torch.zeros(200_000, dtype=torch.int64)
    one = torch.tensor([17], dtype=torch.int32)
    for counters in ((many, zeros, zeros), (zeros, many, zeros), (zeros, zeros, many)):
        # Fixed seeds, so this is decided once: five standard deviations would be one chance in 10^6.
        assert abs(bins(uniforms(row_keys(*counters), one), 256)) < 5
    assert abs(bins(uniforms(row_keys(zeros[:1], zeros[:1], zeros[:1]), many.int()), 256)) < 5


def test_neighbouring_counters_are_independent() -> None:
    many, zeros = torch.arange(300_000), torch.zeros(300_000, dtype=torch.int64)
    ids = torch.tensor([5, 6], dtype=torch.int32)
    by_position = uniforms(row_keys(zeros, zeros, many), ids)
    by_choice = uniforms(row_keys(zeros, zeros + 1, many), ids)
    by_seed = uniforms(row_keys(zeros + 1, zeros, many), ids)
    pairs = {
        "ids": (by_position[:, 0], by_position[:, 1]),
        "positions": (by_position[:-1, 0], by_position[1:, 0]),
        "choices": (by_position[:, 0], by_choice[:, 0]),
        "seeds": (by_position[:, 0], by_seed[:, 0]),
    }
    for name, (first, second) in pairs.items():
        joint = ((first * 16).long() * 16 + (second * 16).long()).double().add(0.5) / 256
        assert abs(bins(joint, 256)) < 5, name


def test_a_single_id_has_the_noise_it_has_among_all() -> None:
    keys = row_keys(torch.tensor([3, 4]), torch.tensor([0, 1]), torch.tensor([9, 9]))
    everything = gumbel(keys, torch.arange(1000, dtype=torch.int32))
    some = torch.tensor([[999, 0, 500], [1, 2, 3]], dtype=torch.int32)
    assert torch.equal(
        uniforms(keys, some), uniforms(keys, torch.arange(1000, dtype=torch.int32)).gather(1, some.long())
    )
    # The logarithm's vector and scalar forms may differ in the last place.
    assert torch.allclose(gumbel(keys, some), everything.gather(1, some.long()), rtol=1e-6, atol=1e-6)
