"""Noise without a generator: Gumbel values that are a function of (seed, choice, position, vocabulary id).

A row's three counters are mixed to a 64-bit key; each id is mixed with the key's halves by two rounds of a 32-bit
integer finaliser. All of it is wrapping integer arithmetic, so every platform and every batch gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Odd 64-bit constants with well-spread bits (as signed numbers, which is what torch multiplies): the golden ratio's
# fraction for stepping the counters, and the splitmix64 finaliser's multipliers.
_STEP = -7046029254386353131  # 0x9E3779B97F4A7C15
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
# Multipliers of a 32-bit finaliser with low bias (both below 2^31, so they fit int32).
_ROUND_1 = 0x21F0AAAD
_ROUND_2 = 0x735A2D97


def _shift64(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ _shift64(x, 30)) * _MIX_1
    x = (x ^ _shift64(x, 27)) * _MIX_2
    return x ^ _shift64(x, 31)


def row_keys(seed: Tensor, choice: Tensor, position: Tensor) -> Tensor:
    """One 64-bit key a row from three int64 counters, [R] each."""
    key = _mix64(seed + _STEP)
    key = _mix64(key ^ (choice * _STEP + _MIX_1))
    return _mix64(key ^ (position * _STEP + _MIX_2))


def _low32(x: Tensor) -> Tensor:
    """The low 32 bits of int64 as int32 (sign bit kept, nothing out of range is ever converted)."""
    low = x & 0xFFFFFFFF
    return (low - ((low >> 31) << 32)).to(torch.int32)


def _round_(x: Tensor) -> Tensor:
    """One round of the 32-bit finaliser, in place on int32 of any shape."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_ROUND_1)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_ROUND_2)
    return x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF))


def uniforms(keys: Tensor, ids: Tensor) -> Tensor:
    """Uniform float32 in (0, 1) for each row and id: multiples of 2^-24, offset so that 0 and 1 never occur.

    keys [R] int64 from `row_keys`; ids [V] or [R, N] int32, vocabulary ids. Returns [R, V] or [R, N].
    """
    high, low = _low32(_shift64(keys, 32)), _low32(keys)
    bits = _round_(ids ^ high[:, None])
    bits = _round_(bits.bitwise_xor_(low[:, None]))
    # 23 bits and a half step: every value and its distance to 1 are exact in float32.
    fraction = (bits >> 9).bitwise_and_(0x7FFFFF).to(torch.float32)
    return fraction.add_(0.5).mul_(2.0**-23)


def gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Standard Gumbel noise for each row and id; shapes as `uniforms`."""
    return uniforms(keys, ids).log_().neg_().log_().neg_()
