"""The Triton form of `sample_rows`: no sort, no word from the host, every parameter read from the device.

Rows are cut into pieces of the vocabulary, enough of them to fill a device; a small launch joins a row's pieces. Greedy
takes two launches: `_scan` (best, and whether all is finite) and `_finish`. Random rows take `_draw` between them,
which reads the logits once more with the noise; truncated ones those of `truncate_kernels` before it. Kinds mix: a row
skips the launches that are not its own. Every result is the same whatever the number of pieces, so a row's id does not
depend on how many others there are.

On an H200 (copies at 4.3 TB/s), bfloat16, 128256 ids of a normal distribution of 2.5, replays of a graph, in us for 1,
8, 64 and 256 rows (`kernels/benchmarks/sample.py`): greedy 16, 17, 18, 41 (torch's argmax and a sum: 45, 47,
47, 80; one reading 0.1, 0.5, 4, 15); with penalties 13, 19, 30, 92; random 16, 19, 49, 161; top_k 50 with top_p 0.95
47, 61, 159, 528 (a full sort 358, 702, 2041, 6943), of which at 256 rows the histogram has 241. What is left there:
counting only what may be kept, and the noise, whose integers are what random rows wait for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmesh_kernels.ops.adjust import MOST_DRAWN, Adjustment
from lmesh_kernels.ops.logit_kernels import adjusted, distance, gumbel_noise, over_row, row_key
from lmesh_kernels.ops.logit_pieces import LogitSource, Pieces
from lmesh_kernels.ops.sample_params import SampleHints, SampleParams
from lmesh_kernels.ops.truncate_kernels import ROW_WORDS, thresholds

_NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def _scan(
    source, vocab, piece, best, least, where, finite, work,
    HAS_SEEN: tl.constexpr, HAS_BIAS: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), -float("inf"), tl.float32)
    fewest = tl.full((BLOCK,), float("inf"), tl.float32)
    at = tl.zeros((BLOCK,), tl.int32)
    wrong = tl.zeros((BLOCK,), tl.int32)
    for start in range(part * piece, tl.minimum((part + 1) * piece, vocab), BLOCK):
        column = start + lane
        inside = column < vocab
        raw, x = adjusted(source, row, column, inside, HAS_SEEN, HAS_BIAS)
        wrong |= (inside & ~(tl.abs(raw) < float("inf"))).to(tl.int32)
        better = x > most
        most, at = tl.where(better, x, most), tl.where(better, column, at)
        fewest = tl.minimum(fewest, tl.where(x > -float("inf"), x, float("inf")))
    top = tl.max(most, axis=0)
    out = row * tl.num_programs(1) + part
    tl.store(best + out, top)
    tl.store(least + out, -tl.min(fewest, axis=0))
    # Among equals the first, as in torch.
    tl.store(where + out, tl.min(tl.where(most == top, at, _NOWHERE), axis=0))
    tl.store(finite + out, 1 - tl.max(wrong, axis=0))
    if WORDS > 0:  # what the launches that follow count in
        for first in tl.static_range(0, WORDS, BLOCK):
            mine = (first + lane < WORDS) & (part == 0)
            tl.store(work + row * WORDS + first + lane, tl.zeros_like(lane), mask=mine)


@triton.jit
def _draw(
    source, vocab, piece, best, limit, drawn, where,
    temperature, seed, choice, position,
    HAS_SEEN: tl.constexpr, HAS_BIAS: tl.constexpr, LIMITED: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    heat = tl.load(temperature + row)
    if heat > 0:
        lane = tl.arange(0, BLOCK)
        most = tl.full((BLOCK,), -float("inf"), tl.float32)
        at = tl.zeros((BLOCK,), tl.int32)
        top = over_row(best, row, tl.num_programs(1), WIDE)
        key = row_key(tl.load(seed + row), tl.load(choice + row), tl.load(position + row))
        for start in range(part * piece, tl.minimum((part + 1) * piece, vocab), BLOCK):
            column = start + lane
            inside = column < vocab
            x = adjusted(source, row, column, inside, HAS_SEEN, HAS_BIAS)[1]
            far = distance(x, top, heat)
            if LIMITED:
                kept = inside & (tl.abs(far).to(tl.int32, bitcast=True) <= tl.load(limit + row))
                # Most pieces of a truncated row hold nothing that is kept, and noise is what costs.
                if tl.max(kept.to(tl.int32), axis=0) > 0:
                    value = tl.where(kept, gumbel_noise(key, column) - far, -float("inf"))
                    better = value > most
                    most, at = tl.where(better, value, most), tl.where(better, column, at)
            else:
                value = tl.where(inside, gumbel_noise(key, column) - far, -float("inf"))
                better = value > most
                most, at = tl.where(better, value, most), tl.where(better, column, at)
        highest = tl.max(most, axis=0)
        tl.store(drawn + row * tl.num_programs(1) + part, highest)
        tl.store(where + row * tl.num_programs(1) + part, tl.min(tl.where(most == highest, at, _NOWHERE), axis=0))


@triton.jit(do_not_specialize=["pieces"])
def _finish(
    pieces, best, where, finite, drawn, drawn_where, temperature, seen_row, seen, vocab, out_ids, out_finite,
    HAS_SEEN: tl.constexpr, RANDOM: tl.constexpr, MOST: tl.constexpr, WIDE: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0)
    place = tl.arange(0, WIDE)
    mine = place < pieces
    value = tl.load(best + row * pieces + place, mask=mine, other=-float("inf"))
    at = tl.load(where + row * pieces + place, mask=mine, other=_NOWHERE)
    if RANDOM:  # what is known when it is compiled, apart from what is not
        random = tl.load(temperature + row) > 0
        if random:
            value = tl.load(drawn + row * pieces + place, mask=mine, other=-float("inf"))
            at = tl.load(drawn_where + row * pieces + place, mask=mine, other=_NOWHERE)
    chosen = tl.min(tl.where(mine & (value == tl.max(value, axis=0)), at, _NOWHERE), axis=0)
    # Where nothing compares (no number at all) any id of the vocabulary will do.
    chosen = tl.where(chosen < vocab, chosen, 0).to(tl.int64)
    tl.store(out_ids + row, chosen)
    tl.store(out_finite + row, tl.min(tl.load(finite + row * pieces + place, mask=mine, other=1), axis=0).to(tl.int1))
    if HAS_SEEN:
        slot = tl.load(seen_row + row)
        if slot >= 0:
            entry = tl.load(seen + slot * vocab + chosen).to(tl.int32)
            tl.store(seen + slot * vocab + chosen, tl.where((entry >> 1) < MOST, entry + 2, entry).to(tl.int16))


def sample_rows_triton(
    logits: Tensor,
    params: SampleParams,
    hints: SampleHints,
    out_ids: Tensor,
    out_finite: Tensor,
    adjustment: Adjustment | None = None,
) -> None:
    """As `sample_rows`; logits [R, V] with contiguous rows. A graph may capture it: R and the hints fix its launches.

    The noise's logarithms may differ from a CPU's in the last place, which turns near ties.
    """
    rows, vocab = logits.shape
    if rows == 0:
        return
    pieces = Pieces.of(logits)
    source = LogitSource.of(logits, adjustment)
    best, least, drawn = torch.empty(3, rows, pieces.count, dtype=torch.float32, device=logits.device).unbind()
    where, drawn_where, finite = torch.empty(3, rows, pieces.count, dtype=torch.int32, device=logits.device).unbind()
    words = ROW_WORDS if hints.any_random and hints.any_truncation else 0
    work = torch.empty(rows, words, dtype=torch.int32, device=logits.device) if words else where
    _scan[pieces.grid](
        source.arguments, vocab, pieces.size, best, least, where, finite, work,
        WORDS=words, **source.kinds, **pieces.launch,
    )  # fmt: skip
    if hints.any_random:
        limit = thresholds(source, params, pieces, best, least, work) if hints.any_truncation else where
        _draw[pieces.grid](
            source.arguments, vocab, pieces.size, best, limit, drawn, drawn_where,
            params.temperature, params.seed, params.choice, params.position,
            LIMITED=hints.any_truncation, **source.kinds, **pieces.joined, **pieces.launch,
        )  # fmt: skip
    _finish[(rows,)](
        pieces.count, best, where, finite, drawn, drawn_where, params.temperature, source.seen_row, source.seen, vocab,
        out_ids, out_finite, HAS_SEEN=source.kinds["HAS_SEEN"], RANDOM=hints.any_random, MOST=MOST_DRAWN,
        **pieces.joined, num_warps=1,
    )  # fmt: skip
