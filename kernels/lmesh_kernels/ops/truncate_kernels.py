"""The least score that top_k, top_p and min_p leave of each row, found without a sort.

A score is s <= 0, how far a logit lies under the row's best over the temperature, and its key the bits of |s|: an
integer that grows as the score falls. `_histogram` counts a row's keys in BINS bins of equal width in s. From these
`_aim` knows the k-th best's bin, and among which the mass p must be reached: a bin's mass is its count times its
middle's weight, off by half a width at most. `_collect` adds up exactly what lies above those bins and beside them, and
sets aside the ids within; where they are too many it weighs each of those bins. `_threshold` then finds the key by
bisection among few ids: those set aside, or those of the one bin where the weighed bins reach p. Where even one bin has
too many (thousands of ties), it bisects the whole row instead: slower, and as exact.

Weights are exp(s) as integers of 2^-40, so that sums do not hang on their order: a row's result is the same whatever
else runs, and wherever its pieces end. Beside exact sums p is met to within 2^-18: what exp leaves at most (|s| 2^-24
for weights that count, |s| < 28), and 2^-40 a score lost by truncation, V of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmesh_kernels.ops.logit_kernels import adjusted, distance, over_row
from lmesh_kernels.ops.logit_pieces import BLOCK, LogitSource, Pieces
from lmesh_kernels.ops.sample_params import SampleParams

BINS = 512
HELD = 4096  # ids set aside of a row
# What is kept of a row meanwhile, int32 words: the bins' counts, their weights and two sums (int64), how many ids are
# set aside, the aim.
ROW_WORDS = BINS + 2 * BINS + 4 + 2 + 6
_WEIGHTS, _SUMS = tl.constexpr(BINS), tl.constexpr(3 * BINS)
_HELD, _AIM = tl.constexpr(3 * BINS + 4), tl.constexpr(3 * BINS + 6)
_ROW = tl.constexpr(ROW_WORDS)
# Scores below this weigh nothing beside the best's 1, however many they are; the last bin has them all.
_SPAN = tl.constexpr(64.0)
_UNIT = tl.constexpr(2.0**40)
_FAR = tl.constexpr(2**31 - 1)
# Steps of a key that a bin's edge may be off by rounding, and more.
_SLACK = tl.constexpr(4096)


@triton.jit
def _width(best, least, row, heat, count, WIDE: tl.constexpr, BINS: tl.constexpr):
    """The row's best logit and the width of its bins in s."""
    top = over_row(best, row, count, WIDE)
    span = tl.div_rn(top + over_row(least, row, count, WIDE), heat)
    return top, tl.minimum(tl.maximum(span, 0.0), _SPAN) / BINS


@triton.jit
def _bin(far, width, BINS: tl.constexpr):
    """The bin of |s|; the first if all scores are alike, the last for what is no number."""
    place = tl.where(width > 0, far / tl.maximum(width, 1e-30), 0.0)
    return tl.where(place < BINS - 1, place, BINS - 1.0).to(tl.int32)


@triton.jit
def _weight(far):
    return (tl.exp(-far) * _UNIT).to(tl.int64)


@triton.jit
def _histogram(
    source, vocab, piece, best, least, work, temperature, top_p, top_k, floor,
    HAS_SEEN: tl.constexpr, HAS_BIAS: tl.constexpr, BINS: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    heat = tl.load(temperature + row)
    p, k = tl.load(top_p + row), tl.load(top_k + row)
    if (heat > 0) & ((p < 1) | (k > 0)):
        # Nothing below these can be kept, nor changes where p is reached by more than `_aim` allows for.
        end = tl.abs(tl.load(floor + row))
        if k <= 0:
            end = tl.minimum(end, tl.log(vocab / (1 - p)) + 8)
        lane = tl.arange(0, BLOCK)
        top, width = _width(best, least, row, heat, tl.num_programs(1), WIDE, BINS)
        total = tl.zeros((BINS,), tl.int32)
        for start in range(part * piece, tl.minimum((part + 1) * piece, vocab), BLOCK):
            column = start + lane
            inside = column < vocab
            x = adjusted(source, row, column, inside, HAS_SEEN, HAS_BIAS)[1]
            far = tl.abs(distance(x, top, heat))
            counts = inside & (far <= end)
            if tl.max(counts.to(tl.int32), axis=0) > 0:
                total += tl.histogram(_bin(far, width, BINS), BINS, mask=counts)
        tl.atomic_add(work + row * _ROW + tl.arange(0, BINS), total, mask=total > 0, sem="relaxed")


@triton.jit(do_not_specialize=["pieces"])
def _aim(
    pieces, best, least, work, temperature, top_p, top_k, floor,
    BINS: tl.constexpr, HELD: tl.constexpr, WIDE: tl.constexpr,
) -> None:  # fmt: skip
    """Of each row: the bin of the last id that k and the floor leave (BINS: all are left), whether k sets it, how many
    ids lie before it, the first and last bin where p may be reached, and whether those are to be weighed."""
    row = tl.program_id(0)
    heat = tl.load(temperature + row)
    p, k, low = tl.load(top_p + row), tl.load(top_k + row), tl.load(floor + row)
    if (heat > 0) & ((p < 1) | (k > 0)):
        _, width = _width(best, least, row, heat, pieces, WIDE, BINS)
        place = tl.arange(0, BINS)
        count = tl.load(work + row * _ROW + place)
        upto = tl.cumsum(count, axis=0)
        of_k = tl.where(k > 0, tl.sum((upto < k).to(tl.int32), axis=0), BINS)
        of_floor = tl.where(low > -float("inf"), _bin(-low, width, BINS), BINS)
        last = tl.minimum(of_k, of_floor)
        before = tl.sum(tl.where(place < last, count, 0), axis=0)
        middle = tl.exp(-(place.to(tl.float32) + 0.5) * width)
        reached = tl.cumsum(tl.where(place <= last, count, 0).to(tl.float32) * middle, axis=0)
        most = tl.max(reached, axis=0)
        # What is left beyond each bin: of the last one all, or its ids up to the k-th alone, whose ties are not known.
        less = tl.where(of_k <= of_floor, before + tl.sum(tl.where(place == last, count, 0), axis=0) - k, 0)
        unsure = tl.sum(tl.where(place == last, middle, 0.0), axis=0) * less.to(tl.float32)
        beyond = most - reached
        fewer = tl.maximum(beyond - unsure - 2e-6 * most, 0.0)
        more = beyond + (2e-6 + 4e-4 * (1 - p)) * most  # rounding, and what `_histogram` left out
        # p is reached where p * beyond <= (1 - p) * reached; each side is off by half a bin's width at most.
        error = tl.exp(width + 1e-5)
        first = tl.sum((p * fewer > (1 - p) * reached * error).to(tl.int32), axis=0)
        end = tl.minimum(tl.sum((p * more * error > (1 - p) * reached).to(tl.int32), axis=0), last)
        # Without top_p there is no such bin.
        first, end = tl.where(p < 1, first, BINS + 1), tl.where(p < 1, end, -1)
        within = tl.sum(tl.where(((place >= first) & (place <= end)) | (place == last), count, 0), axis=0)
        aim = work + row * _ROW + _AIM
        tl.store(aim, last)
        tl.store(aim + 1, (of_k <= of_floor).to(tl.int32))
        tl.store(aim + 2, before)
        tl.store(aim + 3, first)
        tl.store(aim + 4, end)
        tl.store(aim + 5, (within > HELD).to(tl.int32))


@triton.jit
def _collect(
    source, vocab, piece, best, least, work, aside, temperature, top_p, top_k, floor,
    HAS_SEEN: tl.constexpr, HAS_BIAS: tl.constexpr, BINS: tl.constexpr, HELD: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    heat = tl.load(temperature + row)
    p = tl.load(top_p + row)
    if (heat > 0) & ((p < 1) | (tl.load(top_k + row) > 0)):
        lane = tl.arange(0, BLOCK)
        top, width = _width(best, least, row, heat, tl.num_programs(1), WIDE, BINS)
        mine = work + row * _ROW
        last, first, end = tl.load(mine + _AIM), tl.load(mine + _AIM + 3), tl.load(mine + _AIM + 4)
        weighs = tl.load(mine + _AIM + 5) > 0
        weights = (mine + _WEIGHTS).to(tl.pointer_type(tl.int64))
        above = tl.zeros((BLOCK,), tl.int64)
        beside = tl.zeros((BLOCK,), tl.int64)
        for start in range(part * piece, tl.minimum((part + 1) * piece, vocab), BLOCK):
            column = start + lane
            inside = column < vocab
            x = adjusted(source, row, column, inside, HAS_SEEN, HAS_BIAS)[1]
            far = tl.abs(distance(x, top, heat))
            bin = tl.where(inside, _bin(far, width, BINS), BINS + 1)
            if p < 1:
                weight = _weight(far)
                above += tl.where((bin < first) & (bin < last), weight, 0)
                beside += tl.where((bin > end) & (bin < last), weight, 0)
            within = (bin == last) | ((bin >= first) & (bin <= end))
            if weighs:
                near = (bin >= first) & (bin <= end) & (bin < last)
                tl.atomic_add(weights + bin, _weight(far), mask=near, sem="relaxed")
                within = bin == last
            found = tl.sum(within.to(tl.int32), axis=0)
            if found > 0:
                place = tl.atomic_add(mine + _HELD, found, sem="relaxed")
                place += tl.cumsum(within.to(tl.int32), axis=0) - 1
                keys = far.to(tl.int32, bitcast=True)
                tl.store(aside + row.to(tl.int64) * HELD + place, keys, mask=within & (place < HELD))
        if p < 1:
            sums = (mine + _SUMS).to(tl.pointer_type(tl.int64))
            tl.atomic_add(sums, tl.sum(above, axis=0), sem="relaxed")
            tl.atomic_add(sums + 1, tl.sum(beside, axis=0), sem="relaxed")


@triton.jit
def _search(low, high, needed, base, keys, values):
    """The least key in low..high up to which `base` and the values of `keys` reach what is needed."""
    while low < high:
        middle = low + (high - low) // 2
        enough = (base + tl.sum(tl.where(keys <= middle, values, 0), axis=0)).to(tl.float64) >= needed
        low = tl.where(enough, low, middle + 1)
        high = tl.where(enough, middle, high)
    return low


@triton.jit
def _set_aside(aside, row, number, width, BINS: tl.constexpr, HELD: tl.constexpr):
    """Keys, bins and weights of what is set aside; beyond it a key, a bin and a weight of nothing."""
    place = tl.arange(0, HELD)
    keys = tl.load(aside + row.to(tl.int64) * HELD + place, mask=place < number, other=_FAR)
    far = tl.where(place < number, keys.to(tl.float32, bitcast=True), float("inf"))
    return keys, tl.where(place < number, _bin(far, width, BINS), BINS + 1), _weight(far)


@triton.jit
def _gather(
    wanted, aside, width, source, vocab, row, top, heat,
    HAS_SEEN: tl.constexpr, HAS_BIAS: tl.constexpr, BINS: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sets aside the ids of one bin instead of what was; returns how many there are."""
    lane = tl.arange(0, BLOCK)
    number = tl.zeros((), tl.int32)
    for start in range(0, vocab, BLOCK):
        column = start + lane
        inside = column < vocab
        x = adjusted(source, row, column, inside, HAS_SEEN, HAS_BIAS)[1]
        far = tl.abs(distance(x, top, heat))
        mine = (inside & (_bin(far, width, BINS) == wanted)).to(tl.int32)
        place = number + tl.cumsum(mine, axis=0) - 1
        keys = far.to(tl.int32, bitcast=True)
        tl.store(aside + row.to(tl.int64) * HELD + place, keys, mask=(mine > 0) & (place < HELD))
        number += tl.sum(mine, axis=0)
    return number


@triton.jit
def _row_upto(
    key, source, vocab, row, top, heat, BY_WEIGHT: tl.constexpr,
    HAS_SEEN: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """How many of a row's ids have a key up to `key`, or what they weigh."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, vocab, BLOCK):
        column = start + lane
        inside = column < vocab
        x = adjusted(source, row, column, inside, HAS_SEEN, HAS_BIAS)[1]
        far = tl.abs(distance(x, top, heat))
        value = _weight(far) if BY_WEIGHT else tl.full((BLOCK,), 1, tl.int64)
        total += tl.where(inside & (far.to(tl.int32, bitcast=True) <= key), value, 0)
    return tl.sum(total, axis=0)


@triton.jit
def _search_row(
    high, needed, source, vocab, row, top, heat, BY_WEIGHT: tl.constexpr,
    HAS_SEEN: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `_search`, over the whole row."""
    low = high * 0
    while low < high:
        middle = low + (high - low) // 2
        total = _row_upto(middle, source, vocab, row, top, heat, BY_WEIGHT, HAS_SEEN, HAS_BIAS, BLOCK)
        enough = total.to(tl.float64) >= needed
        low = tl.where(enough, low, middle + 1)
        high = tl.where(enough, middle, high)
    return low


@triton.jit
def _from(bin, width):
    """A key below all of the bin's."""
    return (tl.maximum(bin, 0).to(tl.float32) * width).to(tl.int32, bitcast=True) - _SLACK


@triton.jit
def _to(bin, width, key, BINS: tl.constexpr):
    """A key above all of the bin's, `key` at most; the last bin has no upper edge."""
    edge = ((bin + 1).to(tl.float32) * width).to(tl.int32, bitcast=True) + _SLACK
    return tl.where(bin < BINS - 1, tl.minimum(key, edge), key)


@triton.jit(do_not_specialize=["pieces"])
def _threshold(
    source, vocab, pieces, best, least, work, aside, limit, temperature, top_p, top_k, floor,
    HAS_SEEN: tl.constexpr, HAS_BIAS: tl.constexpr, BINS: tl.constexpr, HELD: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0)
    heat = tl.load(temperature + row)
    p, k = tl.load(top_p + row), tl.load(top_k + row)
    # ln(min_p) <= 0 as a key: what is off is infinitely far.
    whole = tl.abs(tl.load(floor + row)).to(tl.int32, bitcast=True)
    key = whole
    if (heat > 0) & ((p < 1) | (k > 0)):
        top, width = _width(best, least, row, heat, pieces, WIDE, BINS)
        mine = work + row * _ROW
        last, by_k, before = tl.load(mine + _AIM), tl.load(mine + _AIM + 1), tl.load(mine + _AIM + 2)
        first, end, number = tl.load(mine + _AIM + 3), tl.load(mine + _AIM + 4), tl.load(mine + _HELD)
        weighed = tl.load(mine + _AIM + 5) > 0
        done = number <= HELD
        if done:
            keys, bin, weight = _set_aside(aside, row, number, width, BINS, HELD)
            if (by_k > 0) & (last < BINS):
                counts = (bin == last).to(tl.int64)
                key = _search(
                    _from(last, width), _to(last, width, key, BINS), (k - before).to(tl.float64), 0, keys, counts
                )
            if p < 1:
                sums = (mine + _SUMS).to(tl.pointer_type(tl.int64))
                above = tl.load(sums)
                ending = tl.sum(tl.where((bin == last) & (keys <= key), weight, 0), axis=0)
                whole_mass = above + tl.load(sums + 1) + ending
                if weighed:
                    bins = tl.arange(0, BINS)
                    masses = tl.load((mine + _WEIGHTS).to(tl.pointer_type(tl.int64)) + bins)
                    upto = tl.cumsum(masses, axis=0)
                    whole_mass += tl.sum(masses, axis=0)
                    needed = p.to(tl.float64) * whole_mass.to(tl.float64)
                    short = (above + upto).to(tl.float64) < needed
                    # The bin where p is reached; the last, whose ids are set aside already, if none is.
                    short = short & (bins >= first) & (bins <= end) & (bins < last)
                    found = first + tl.sum(short.to(tl.int32), axis=0)
                    above += tl.sum(tl.where(bins < found, masses, 0), axis=0)
                    first, end = found, found
                    if found < tl.minimum(last, end + 1):
                        tl.debug_barrier()
                        number = _gather(
                            found, aside, width, source, vocab, row, top, heat, HAS_SEEN, HAS_BIAS, BINS, HELD, BLOCK
                        )
                        tl.debug_barrier()
                        keys, bin, weight = _set_aside(aside, row, tl.minimum(number, HELD), width, BINS, HELD)
                else:
                    whole_mass += tl.sum(tl.where((bin >= first) & (bin <= end) & (bin < last), weight, 0), axis=0)
                    needed = p.to(tl.float64) * whole_mass.to(tl.float64)
                near = tl.where((bin >= first) & (bin <= end), weight, 0)
                left = tl.sum(tl.where(keys <= key, near, 0), axis=0)
                done = (number <= HELD) & (above.to(tl.float64) < needed)
                done = done & ((above + left).to(tl.float64) >= needed)
                if done:
                    key = _search(_from(first, width), _to(end, width, key, BINS), needed, above, keys, near)
        if done == 0:
            key = whole
            if k > 0:
                key = _search_row(
                    key, k.to(tl.float64), source, vocab, row, top, heat, False, HAS_SEEN, HAS_BIAS, BLOCK
                )
            if p < 1:
                total = _row_upto(key, source, vocab, row, top, heat, True, HAS_SEEN, HAS_BIAS, BLOCK)
                needed = p.to(tl.float64) * total.to(tl.float64)
                key = _search_row(key, needed, source, vocab, row, top, heat, True, HAS_SEEN, HAS_BIAS, BLOCK)
    tl.store(limit + row, key)


def thresholds(
    source: LogitSource, params: SampleParams, pieces: Pieces, best: Tensor, least: Tensor, work: Tensor
) -> Tensor:
    """[R] int32: the largest key that each row keeps; of a row that nothing is left out of, any number's.

    best, least [R, pieces.count] float32: each piece's largest logit, and its least finite one negated; work
    [R, ROW_WORDS] int32, zeros.
    """
    vocab, held = source.logits.shape[1], HELD
    aside = torch.empty(pieces.rows, held, dtype=torch.int32, device=best.device)
    limit = torch.empty(pieces.rows, dtype=torch.int32, device=best.device)
    asked = (params.temperature, params.top_p, params.top_k, params.floor)
    reads = {**source.kinds, **pieces.joined, **pieces.launch}
    _histogram[pieces.grid](source.arguments, vocab, pieces.size, best, least, work, *asked, BINS=BINS, **reads)
    _aim[(pieces.rows,)](pieces.count, best, least, work, *asked, BINS=BINS, HELD=held, **pieces.joined, num_warps=4)
    _collect[pieces.grid](
        source.arguments, vocab, pieces.size, best, least, work, aside, *asked, BINS=BINS, HELD=held, **reads
    )
    _threshold[(pieces.rows,)](
        source.arguments, vocab, pieces.count, best, least, work, aside, limit, *asked, BINS=BINS, HELD=held,
        **(reads | {"num_warps": 8, "BLOCK": 2 * BLOCK}),
    )  # fmt: skip
    return limit
