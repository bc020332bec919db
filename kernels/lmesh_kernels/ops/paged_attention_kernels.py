"""The Triton form of `paged_attention`: programs that walk a step's pieces (see `attention_work`).

Query heads that share a key head stand under each other in one tile, so that keys and values are read once for all of
them. Scores, sums and parts are float32; exponentials are to the base 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmesh_kernels.ops.attention_work import FIELDS, AttentionWork
from lmesh_kernels.ops.device_attention import Scratch, Tile
from lmesh_kernels.ops.join_parts_kernels import join_parts
from lmesh_kernels.ops.linear_tiles import launch_options

_LOG2_E = 1.4426950408889634


@triton.jit
def _stretch(
    q,
    keys,
    values,
    blocks,
    low,
    stop,
    limit,
    total,
    best,
    weight,
    scale,
    softcap,
    window,
    token_stride,
    block_stride,
    place,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_N keys from `low` taken into (total, best, weight)."""
    key = low + tl.arange(0, BLOCK_N)
    if BLOCK_SIZE >= BLOCK_N:
        block = tl.load(blocks + low // BLOCK_SIZE).to(tl.int64)
        at = block * block_stride + (low % BLOCK_SIZE + tl.arange(0, BLOCK_N)) * token_stride
    else:
        block = tl.load(blocks + key // BLOCK_SIZE, mask=key < stop, other=0).to(tl.int64)
        at = block * block_stride + (key % BLOCK_SIZE) * token_stride
    inside = place < HEAD_DIM
    if MASKED:
        k = tl.load(keys + at[None, :] + place[:, None], mask=(key < stop)[None, :] & inside[:, None], other=0.0)
    else:
        k = tl.load(keys + at[None, :] + place[:, None], mask=inside[:, None], other=0.0)
    scores = tl.dot(q, k, input_precision=PRECISION)
    if SOFTCAP:
        # softcap * tanh(x / softcap), to the base 2 afterwards.
        bent = tl.exp2(scores * (-2.885390081777927 * scale / softcap))
        scores = softcap * (2.0 / (1.0 + bent) - 1.0) * 1.4426950408889634
    else:
        scores = scores * scale
    if MASKED:
        # Both: a piece may end within a stretch, and what is not loaded is no key of score 0.
        seen = key[None, :] < tl.minimum(limit, stop)[:, None]
        if WINDOW:
            seen = seen & (key[None, :] + window >= limit[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    highest = tl.maximum(best, tl.max(scores, axis=1))
    # A row that has seen nothing yet stays at nothing: -inf less -inf would be NaN.
    base = tl.where(highest == float("-inf"), 0.0, highest) if MASKED else highest
    p = tl.exp2(scores - base[:, None])
    fade = tl.exp2(best - base)
    if MASKED:
        v = tl.load(values + at[:, None] + place[None, :], mask=(key < stop)[:, None] & inside[None, :], other=0.0)
    else:
        v = tl.load(values + at[:, None] + place[None, :], mask=inside[None, :], other=0.0)
    total = tl.dot(p.to(v.dtype), v, acc=total * fade[:, None], input_precision=PRECISION)
    return total, highest, weight * fade + tl.sum(p, axis=1)


@triton.jit
def _attend(
    q,
    keys,
    values,
    tables,
    pieces,
    count,
    parts_first,
    parts,
    sums,
    out,
    scale,
    softcap,
    window,
    q_stride,
    out_stride,
    table_stride,
    token_stride,
    block_stride,
    FIELDS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    work = tl.load(count) * KV_HEADS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        # Who has no work need not wait. But one program must: if all ended before the kernel ahead did, whoever waits
        # for this one would begin too early.
        if tl.program_id(0) < tl.maximum(work, 1):
            tl.extra.cuda.gdc_wait()
    place = tl.arange(0, BLOCK_D)
    under = tl.arange(0, BLOCK_M)
    for at in range(tl.program_id(0), work, tl.num_programs(0)):
        # Programs that run side by side take the heads of one piece: its keys lie side by side.
        piece = pieces + (at // KV_HEADS) * FIELDS
        kv_head = at % KV_HEADS
        first, rows, sequence = tl.load(piece), tl.load(piece + 1), tl.load(piece + 2)
        begin, stop, position, part = tl.load(piece + 3), tl.load(piece + 4), tl.load(piece + 5), tl.load(piece + 6)
        row = under // GROUP
        head = kv_head * GROUP + under % GROUP
        there = row < rows
        limit = position + row + 1
        mine = there[:, None] & (place < HEAD_DIM)[None, :]
        row_64 = (first + row).to(tl.int64)
        queries = tl.load(
            q + row_64[:, None] * q_stride + head[:, None] * HEAD_DIM + place[None, :], mask=mine, other=0.0
        )
        total = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        best = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        weight = tl.zeros((BLOCK_M,), dtype=tl.float32)
        blocks = tables + sequence * table_stride
        k_of, v_of = keys + kv_head * HEAD_DIM, values + kv_head * HEAD_DIM
        if WINDOW:
            # Keys that even the first row no longer sees are passed over.
            begin = begin + tl.maximum(position + 1 - window - begin, 0) // BLOCK_N * BLOCK_N
            open_end = begin
        else:
            open_end = begin + tl.maximum(tl.minimum(stop, position + 1) - begin, 0) // BLOCK_N * BLOCK_N
        for low in range(begin, open_end, BLOCK_N):
            total, best, weight = _stretch(
                queries, k_of, v_of, blocks, low, stop, limit, total, best, weight, scale, softcap, window,
                token_stride, block_stride, place, False, SOFTCAP, WINDOW, HEAD_DIM, BLOCK_SIZE, BLOCK_N, PRECISION,
            )  # fmt: skip
        for low in range(open_end, stop, BLOCK_N):
            total, best, weight = _stretch(
                queries, k_of, v_of, blocks, low, stop, limit, total, best, weight, scale, softcap, window,
                token_stride, block_stride, place, True, SOFTCAP, WINDOW, HEAD_DIM, BLOCK_SIZE, BLOCK_N, PRECISION,
            )  # fmt: skip
        result = total / tl.where(weight > 0, weight, 1.0)[:, None]
        if part < 0:
            target = out + row_64[:, None] * out_stride + head[:, None] * HEAD_DIM + place[None, :]
            tl.store(target, result.to(out.dtype.element_ty), mask=mine)
        else:
            number = tl.load(parts_first + first + row, mask=there, other=0) + part
            slot = (number * KV_HEADS * GROUP + head).to(tl.int64)
            tl.store(parts + slot[:, None] * HEAD_DIM + place[None, :], result, mask=mine)
            tl.store(sums + slot, best + tl.log2(weight), mask=there)


def paged_attention_triton(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    work: AttentionWork,
    scratch: Scratch,
    *,
    scale: float,
    narrow: Tile,
    wide: Tile,
    programs: int,
    softcap: float = 0.0,
    window: int = 0,
    pdl: bool = False,
) -> Tensor:
    """Attention of q [T, heads, head_dim] (rows may be apart) as `work` says; returns [T, heads, head_dim].

    keys, values [blocks, block_size, kv_heads, head_dim]; tables [S, blocks] int32; softcap and window are off at 0.
    `narrow`'s tile must hold a group of query heads, and `wide`'s was `work`'s. `pdl`: launches may overlap the one
    ahead; `work` and the tables must not have been written by it.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, block_size = keys.shape[2], keys.shape[1]
    out = torch.empty(tokens, heads, head_dim, dtype=q.dtype, device=q.device)
    exact = q.dtype == torch.float32
    kinds = ((work.has_narrow, work.narrow, 0, narrow), (work.has_wide, work.wide, 1, wide))
    for present, pieces, kind, tile in kinds:
        if not present:
            continue
        _attend[(min(programs, len(pieces) * kv_heads),)](
            q,
            keys,
            values,
            tables,
            pieces,
            work.counts[kind:],
            work.parts_first,
            scratch.parts,
            scratch.sums,
            out,
            scale if softcap else scale * _LOG2_E,
            softcap,
            window,
            q.stride(0),
            out.stride(0),
            tables.stride(0),
            keys.stride(1),
            keys.stride(0),
            FIELDS=FIELDS,
            KV_HEADS=kv_heads,
            GROUP=heads // kv_heads,
            SOFTCAP=bool(softcap),
            WINDOW=bool(window),
            HEAD_DIM=head_dim,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_M=tile.rows,
            BLOCK_N=tile.keys,
            BLOCK_SIZE=block_size,
            PRECISION="ieee" if exact else None,
            PDL=pdl,
            **launch_options(tile.warps, tile.stages, pdl),
        )
    join_parts(work, scratch, out, pdl=pdl)
    return out
