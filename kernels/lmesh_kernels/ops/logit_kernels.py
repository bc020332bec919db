"""What the sampler's Triton kernels share: reading logits as they are, adjusted and tempered, and the noise.

Logits of any float type are widened in registers; no copy of them is made. Division is rounded as IEEE says and nothing
is contracted into fused operations (the launches say so), so that scores have the bits that plain torch gives them.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def adjusted(source, row, column, inside, HAS_SEEN: tl.constexpr, HAS_BIAS: tl.constexpr):
    """A row's logits at `column` as they came and with bias and penalties applied, float32; -inf outside.

    `source` is `LogitSource.arguments`.
    """
    logits, stride, vocab, repetition, presence, frequency, seen_row, bias_row, seen, bias = source
    raw = tl.load(logits + row.to(tl.int64) * stride + column, mask=inside, other=-float("inf")).to(tl.float32)
    x = raw
    if HAS_BIAS:
        slot = tl.load(bias_row + row)
        if slot >= 0:
            x = x + tl.load(bias + slot * vocab + column, mask=inside, other=0.0)
    if HAS_SEEN:
        slot = tl.load(seen_row + row)
        if slot >= 0:
            entries = tl.load(seen + slot * vocab + column, mask=inside, other=0).to(tl.int32)
            drawn = (entries >> 1).to(tl.float32)
            factor = tl.load(repetition + row)
            lowered = tl.where(x > 0, tl.div_rn(x, tl.zeros_like(x) + factor), x * factor)
            lowered = lowered - tl.load(frequency + row) * drawn
            lowered = lowered - tl.where(drawn > 0, tl.load(presence + row), 0.0)
            x = tl.where(entries > 0, tl.minimum(tl.maximum(lowered, -LARGEST), LARGEST), x)
    return raw, x


@triton.jit
def distance(x, best, temperature):
    """|score| of logits: how far they lie under the row's best, over the temperature; infinite outside the row."""
    return -tl.div_rn(x - best, tl.zeros_like(x) + temperature)


@triton.jit
def over_row(parts, row, count, WIDE: tl.constexpr):
    """The largest of a row's `count` partial results, WIDE at most."""
    place = tl.arange(0, WIDE)
    return tl.max(tl.load(parts + row * count + place, mask=place < count, other=-float("inf")), axis=0)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def row_key(seed, choice, position):
    """As `noise.row_keys`, of one row: uint64."""
    step = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    first = tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    second = tl.full((), 0x94D049BB133111EB, tl.uint64)
    key = _mix(seed.to(tl.uint64, bitcast=True) + step)
    key = _mix(key ^ (choice.to(tl.uint64, bitcast=True) * step + first))
    return _mix(key ^ (position.to(tl.uint64, bitcast=True) * step + second))


@triton.jit
def _round(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def gumbel_noise(key, column):
    """As `noise.gumbel`: the uniform value has its bits, the logarithms may differ from torch's in the last place."""
    bits = _round(column.to(tl.uint32) ^ (key >> 32).to(tl.uint32))
    bits = _round(bits ^ key.to(tl.uint32))  # the low half
    uniform = ((bits >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -tl.log(-tl.log(uniform))
