"""Decodes of few rows from qkv to attention in one launch, in Triton: norm, rotation, the cache's write, and parts.

A program takes one piece of one row (see `attention_work`) for one key head. All keys but the row's own were cached by
earlier steps, so a program may read its first ones while it still waits for the kernel ahead (PDL); the own key never
comes from the cache. Scores, sums and parts are float32; exponentials are to the base 2.
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
from lmesh_kernels.ops.rope_kv_kernels import check_norms, head_weights, normed_heads

_LOG2_E = 1.4426950408889634


@triton.jit
def _cached(
    keys,
    values,
    blocks,
    low,
    end,
    place,
    token_stride,
    block_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Halves of BLOCK_N keys and values [BLOCK_N, half] from `low` on, 0 from `end` on."""
    key = low + tl.arange(0, BLOCK_N)
    block = tl.load(blocks + key // BLOCK_SIZE, mask=key < end, other=0).to(tl.int64)
    at = (block * block_stride + (key % BLOCK_SIZE) * token_stride)[:, None] + place[None, :]
    there = (key < end)[:, None] & (place < HEAD_DIM // 2)[None, :]
    k_first = tl.load(keys + at, mask=there, other=0.0)
    k_second = tl.load(keys + HEAD_DIM // 2 + at, mask=there, other=0.0)
    v_first = tl.load(values + at, mask=there, other=0.0)
    v_second = tl.load(values + HEAD_DIM // 2 + at, mask=there, other=0.0)
    return k_first, k_second, v_first, v_second


@triton.jit
def _taken(
    q_first,
    q_second,
    k_first,
    k_second,
    v_first,
    v_second,
    low,
    end,
    first,
    second,
    best,
    weight,
    scale,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The keys from `low` to `end` taken into (first half, second half, best, weight)."""
    scores = tl.dot(q_first, tl.trans(k_first), input_precision=PRECISION)
    scores = tl.dot(q_second, tl.trans(k_second), scores, input_precision=PRECISION) * scale
    scores = tl.where((low + tl.arange(0, BLOCK_N) < end)[None, :], scores, float("-inf"))
    highest = tl.maximum(best, tl.max(scores, axis=1))
    # A piece may hold nothing but the row's own key: -inf less -inf would be NaN.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    p = tl.exp2(scores - base[:, None])
    fade = tl.exp2(best - base)
    seen = p.to(v_first.dtype)
    first = tl.dot(seen, v_first, acc=first * fade[:, None], input_precision=PRECISION)
    second = tl.dot(seen, v_second, acc=second * fade[:, None], input_precision=PRECISION)
    return first, second, highest, weight * fade + tl.sum(p, axis=1)


@triton.jit
def _decode(
    qkv,
    rotation,
    kv_slots,
    q_norm,
    k_norm,
    keys,
    values,
    tables,
    pieces,
    count,
    parts_first,
    parts,
    sums,
    out,
    eps,
    scale,
    qkv_stride,
    out_stride,
    table_stride,
    token_stride,
    block_stride,
    FIELDS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NORMED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    work = tl.load(count) * KV_HEADS
    mine, kv_head = program < work, program % KV_HEADS
    piece = pieces + program // KV_HEADS * FIELDS
    row, sequence = tl.load(piece, mask=mine, other=0).to(tl.int64), tl.load(piece + 2, mask=mine, other=0)
    begin, stop = tl.load(piece + 3, mask=mine, other=0), tl.load(piece + 4, mask=mine, other=0)
    position, part = tl.load(piece + 5, mask=mine, other=0), tl.load(piece + 6, mask=mine, other=0)
    place = tl.arange(0, HALF)
    inside = place < HEAD_DIM // 2
    blocks, k_of, v_of = tables + sequence * table_stride, keys + kv_head * HEAD_DIM, values + kv_head * HEAD_DIM
    end = tl.minimum(stop, position)  # of what was cached before
    k_first, k_second, v_first, v_second = _cached(
        k_of, v_of, blocks, begin, end, place, token_stride, block_stride, HEAD_DIM, BLOCK_N, BLOCK_SIZE
    )
    cos = tl.load(rotation + row * HEAD_DIM + place, mask=inside, other=0.0)[None, :]
    sin = tl.load(rotation + row * HEAD_DIM + HEAD_DIM // 2 + place, mask=inside, other=0.0)[None, :]
    if NORMED:
        q_low, q_high = head_weights(q_norm, place, inside, HEAD_DIM)
        k_low, k_high = head_weights(k_norm, place, inside, HEAD_DIM)
    slot = tl.load(kv_slots + row).to(tl.int64)
    part += tl.where(part < 0, 0, tl.load(parts_first + row))
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        # Who has no work need not wait. But one program must: if all ended before the kernel ahead did, whoever waits
        # for this one would begin too early.
        if program < tl.maximum(work, 1):
            tl.extra.cuda.gdc_wait()
    if mine:
        kind = keys.dtype.element_ty
        under = tl.arange(0, BLOCK_M)
        head = kv_head * GROUP + under
        there = (under < GROUP)[:, None] & inside[None, :]
        # The row's own key and value first, and both halves of the queries at once: one latency of the cache for all.
        k_at = qkv + row * qkv_stride + (KV_HEADS * GROUP + kv_head) * HEAD_DIM + place[None, :]
        own_first = tl.load(k_at, mask=inside[None, :], other=0.0).to(tl.float32)
        own_second = tl.load(k_at + HEAD_DIM // 2, mask=inside[None, :], other=0.0).to(tl.float32)
        v_at = k_at + KV_HEADS * HEAD_DIM
        value_first = tl.load(v_at, mask=inside[None, :], other=0.0).to(kind)
        value_second = tl.load(v_at + HEAD_DIM // 2, mask=inside[None, :], other=0.0).to(kind)
        halves = tl.arange(0, 2)[None, None, :] * (HEAD_DIM // 2)
        q_at = qkv + row * qkv_stride + head[:, None, None] * HEAD_DIM + place[None, :, None] + halves
        q_first, q_second = tl.split(tl.load(q_at, mask=there[:, :, None], other=0.0).to(tl.float32))
        if NORMED:
            q_first, q_second = normed_heads(q_first, q_second, q_low, q_high, eps, HEAD_DIM)
            own_first, own_second = normed_heads(own_first, own_second, k_low, k_high, eps, HEAD_DIM)
        # Rounded as the cache and `rope_kv` round.
        turned = (q_first * cos - q_second * sin).to(kind)
        q_second, q_first = (q_second * cos + q_first * sin).to(kind), turned
        turned = (own_first * cos - own_second * sin).to(kind)
        own_second, own_first = (own_second * cos + own_first * sin).to(kind), turned

        has_own = stop > position
        cache = (slot * KV_HEADS + kv_head) * HEAD_DIM + place[None, :]
        written = inside[None, :] & has_own
        tl.store(keys + cache, own_first, mask=written)
        tl.store(keys + HEAD_DIM // 2 + cache, own_second, mask=written)
        tl.store(values + cache, value_first, mask=written)
        tl.store(values + HEAD_DIM // 2 + cache, value_second, mask=written)

        score = tl.sum(q_first.to(tl.float32) * own_first.to(tl.float32), axis=1)
        score = (score + tl.sum(q_second.to(tl.float32) * own_second.to(tl.float32), axis=1)) * scale
        best = tl.where(has_own, score, float("-inf"))
        weight = tl.where(has_own, tl.full((BLOCK_M,), 1.0, tl.float32), 0.0)
        first = weight[:, None] * value_first.to(tl.float32)
        second = weight[:, None] * value_second.to(tl.float32)
        first, second, best, weight = _taken(
            q_first, q_second, k_first, k_second, v_first, v_second, begin, end, first, second, best, weight, scale,
            BLOCK_N, PRECISION,
        )  # fmt: skip
        for low in range(begin + BLOCK_N, end, BLOCK_N):
            later_k, later_k_second, later_v, later_v_second = _cached(
                k_of, v_of, blocks, low, end, place, token_stride, block_stride, HEAD_DIM, BLOCK_N, BLOCK_SIZE
            )
            first, second, best, weight = _taken(
                q_first, q_second, later_k, later_k_second, later_v, later_v_second, low, end, first, second, best,
                weight, scale, BLOCK_N, PRECISION,
            )  # fmt: skip
        if part < 0:
            target = out + row * out_stride + head[:, None] * HEAD_DIM + place[None, :]
            tl.store(target, (first / weight[:, None]).to(kind), mask=there)
            tl.store(target + HEAD_DIM // 2, (second / weight[:, None]).to(kind), mask=there)
        else:
            at = (part * KV_HEADS * GROUP + head).to(tl.int64)
            room = parts + at[:, None] * HEAD_DIM + place[None, :]
            tl.store(room, first / weight[:, None], mask=there)
            tl.store(room + HEAD_DIM // 2, second / weight[:, None], mask=there)
            tl.store(sums + at, best + tl.log2(weight), mask=under < GROUP)


def decode_attention_triton(
    qkv: Tensor,
    rotation: Tensor,
    kv_slots: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    work: AttentionWork,
    scratch: Scratch,
    *,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    scale: float,
    tile: Tile,
    pdl: bool = False,
) -> Tensor:
    """Writes each row's K and V as `rope_kv` does and attends as `paged_attention` does, for narrow pieces alone.

    qkv [T, (heads + 2 * kv_heads) * head_dim], rotation [T, head_dim] float32, kv_slots [T]; keys, values [blocks,
    block_size, kv_heads, head_dim]; tables [S, blocks] int32; returns [T, heads, head_dim]. Of a row all that is
    cached was cached by earlier steps. `pdl`: launches may overlap the one ahead; of what is read it may write qkv
    alone.
    """
    kv_heads, head_dim = keys.shape[2:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    check_norms(q_norm, k_norm)
    out = torch.empty(len(qkv), heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    _decode[(len(work.narrow) * kv_heads,)](
        qkv,
        rotation,
        kv_slots,
        qkv if q_norm is None else q_norm,
        qkv if k_norm is None else k_norm,
        keys,
        values,
        tables,
        work.narrow,
        work.counts,
        work.parts_first,
        scratch.parts,
        scratch.sums,
        out,
        eps,
        scale * _LOG2_E,
        qkv.stride(0),
        out.stride(0),
        tables.stride(0),
        keys.stride(1),
        keys.stride(0),
        FIELDS=FIELDS,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        HALF=max(16, triton.next_power_of_2(head_dim // 2)),
        BLOCK_M=tile.rows,
        BLOCK_N=tile.keys,
        BLOCK_SIZE=keys.shape[1],
        NORMED=q_norm is not None,
        PRECISION="ieee" if qkv.dtype == torch.float32 else None,
        PDL=pdl,
        **launch_options(tile.warps, tile.stages, pdl),
    )
    join_parts(work, scratch, out, pdl=pdl)
    return out
