"""Rotary frequencies under every stretch against their formulas in float64, and the rotation itself."""

from __future__ import annotations

import math

import pytest
import torch
from lmesh_kernels.models.config import RopeConfig
from lmesh_kernels.ops.rope import inverse_frequencies, rope_table, rotate
from lmesh_kernels.ops.rope_kv import rope_kv

UNIT = 2.0**-24
LLAMA3 = RopeConfig(
    type="llama3", theta=5e5, factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position=8192
)
YARN = RopeConfig(type="yarn", theta=1e4, factor=4, original_max_position=2048)
ROPES = {
    "default": RopeConfig(theta=1e5),
    "linear": RopeConfig(type="linear", theta=1e4, factor=2.5),
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-untruncated": RopeConfig(type="yarn", theta=1e4, factor=8, original_max_position=100, truncate=False),
    "divisors": RopeConfig(theta=1e4, frequency_divisors=(1.0, 2.0, 3.0, 8.0)),
}


def expected_frequency(rope: RopeConfig, pair: int, head_dim: int) -> float:
    """One pair's radians a position, from the published formulas, in Python floats."""
    plain = rope.theta ** (-2 * pair / head_dim)
    if rope.frequency_divisors:
        return plain / rope.frequency_divisors[pair]
    if rope.type == "default":
        return plain
    if rope.type == "linear":
        return plain / rope.factor
    if rope.type == "llama3":
        return llama3_frequency(rope, plain)
    return yarn_frequency(rope, plain, pair, head_dim)


def llama3_frequency(rope: RopeConfig, plain: float) -> float:
    wavelength = 2 * math.pi / plain
    if wavelength < rope.original_max_position / rope.high_freq_factor:
        return plain
    if wavelength > rope.original_max_position / rope.low_freq_factor:
        return plain / rope.factor
    smooth = rope.original_max_position / wavelength - rope.low_freq_factor
    smooth /= rope.high_freq_factor - rope.low_freq_factor
    return (1 - smooth) * plain / rope.factor + smooth * plain


def yarn_frequency(rope: RopeConfig, plain: float, pair: int, head_dim: int) -> float:
    def pair_of(turns: float) -> float:
        return head_dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = min(1.0, max(0.0, (pair - low) / (high - low)))
    return ramp * plain / rope.factor + (1 - ramp) * plain


@pytest.mark.parametrize("name", ROPES)
def test_frequencies(name: str) -> None:
    rope = ROPES[name]
    head_dim = 8 if rope.frequency_divisors else 128
    actual, _ = inverse_frequencies(rope, head_dim)
    expected = torch.tensor([expected_frequency(rope, i, head_dim) for i in range(head_dim // 2)], dtype=torch.float64)
    # pow: its exponent is rounded (times ln theta < 14) and 2 ulp of its own; a blend's weights magnify by at most
    # the turns a pair makes, below 8 where it is not clamped.
    assert ((actual.double() - expected).abs() <= 64 * UNIT * expected).all()


def test_stretches_differ_from_default() -> None:
    plain, _ = inverse_frequencies(RopeConfig(theta=1e4), 128)
    for rope in (ROPES["linear"], LLAMA3, YARN, ROPES["yarn-untruncated"]):
        assert not torch.allclose(inverse_frequencies(rope, 128)[0], plain, rtol=1e-2)


def test_yarn_scale() -> None:
    assert inverse_frequencies(YARN, 64)[1] == pytest.approx(0.1 * math.log(4) + 1)
    given = RopeConfig(type="yarn", factor=4, original_max_position=2048, attention_factor=1.25)
    assert inverse_frequencies(given, 64)[1] == 1.25
    both = RopeConfig(type="yarn", factor=4, original_max_position=2048, mscale=1.5, mscale_all_dim=0.5)
    ratio = (0.15 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert inverse_frequencies(both, 64)[1] == pytest.approx(ratio)


@pytest.mark.parametrize("name", ROPES)
def test_table(name: str) -> None:
    rope = ROPES[name]
    head_dim, positions = (8 if rope.frequency_divisors else 34), 301
    frequencies, scale = inverse_frequencies(rope, head_dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies.double()
    expected = scale * torch.cat([angles.cos(), angles.sin()], dim=-1)
    # The angle is one float32 product; cosine, sine and scaling add an ulp or two each.
    bound = scale * (UNIT * torch.cat([angles, angles], dim=-1) + 6 * UNIT)
    assert ((rope_table(rope, head_dim, positions).double() - expected).abs() <= bound).all()


def rotated(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Each pair as a complex number, turned."""
    cos, sin = rotation.double().chunk(2, dim=-1)
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.complex(cos, sin)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 1, 2), (5, 3, 34), (17, 7, 128)])
def test_rotate(tokens: int, heads: int, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, heads, head_dim, generator=generator)
    rotation = rope_table(ROPES["default"], head_dim, 400)[torch.arange(tokens) * 23 + 1]
    # Two products and a sum.
    bound = 3 * UNIT * (x.double().abs() + x.double().abs().roll(head_dim // 2, -1))
    assert ((rotate(x, rotation).double() - rotated(x, rotation)).abs() <= bound).all()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 6), (4, 4, 10), (9, 3, 64)])
def test_rope_kv(heads: int, kv_heads: int, head_dim: int, norm: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    tokens, eps = 5, 1e-5
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, generator=generator)
    weights = torch.randn(2, head_dim, generator=generator) if norm else (None, None)
    rotation = rope_table(ROPES["default"], head_dim, 90)[[3, 0, 17, 18, 80]]
    cache = torch.full((2, 4, 3, kv_heads, head_dim), 7.0)
    slots = torch.tensor([11, 0, 4, 5, 7])
    original = qkv.clone()
    q = rope_kv(qkv, rotation, slots, cache[0], cache[1], q_norm=weights[0], k_norm=weights[1], eps=eps)

    parts = original.double().view(tokens, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    expected = []
    for part, weight in zip(parts[:2], weights, strict=True):
        scale = (part.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight.double() if weight is not None else 1.0
        expected.append(rotated(part * scale, rotation))
    # The norm's head_dim / 2 + 8 roundings and the rotation's 3, of values no larger than this.
    largest = max(e.abs().max().item() for e in expected) + max(p.abs().max().item() for p in parts)
    bound = (head_dim / 2 + 11) * UNIT * 2 * largest
    assert ((q.double() - expected[0]).abs() <= bound).all()
    flat = cache.view(2, 12, kv_heads, head_dim)
    assert ((flat[0, slots].double() - expected[1]).abs() <= bound).all()
    assert torch.equal(flat[1, slots].double(), parts[2])
    untouched = [slot for slot in range(12) if slot not in slots.tolist()]
    assert (flat[:, untouched] == 7.0).all()
