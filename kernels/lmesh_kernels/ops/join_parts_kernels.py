"""Joining a row's parts of attention by their log-sum-exps, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lmesh_kernels.ops.attention_work import AttentionWork
from lmesh_kernels.ops.device_attention import Scratch
from lmesh_kernels.ops.linear_tiles import launch_options

# Heads of a program that joins, and parts at a time, for few rows and for many: few should spread (8 heads a program
# cost one sequence of 700 keys 1.9 us more, of 7.2), but most of many rows have no parts, and programs that find none
# cost, too (one a head: 320 us for 8,200 rows).
_FEW_JOINED = 64
_JOIN_FEW, _JOIN_MANY = (1, 8), (8, 4)


@triton.jit
def _join(
    parts,
    sums,
    parts_first,
    counts,
    out,
    out_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    count = tl.load(counts + row)
    first = tl.load(parts_first + row)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if count > 0:
        head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        place = tl.arange(0, BLOCK_D)
        mine = (head < HEADS)[:, None] & (place < HEAD_DIM)[None, :]
        best = tl.full((BLOCK_H,), float("-inf"), dtype=tl.float32)
        weight = tl.zeros((BLOCK_H,), dtype=tl.float32)
        total = tl.zeros((BLOCK_H, BLOCK_D), dtype=tl.float32)
        for start in range(0, count, AT_ONCE):
            # Some side by side: one latency of the memory for all of them.
            part = start + tl.arange(0, AT_ONCE)
            slot = ((first + part)[:, None] * HEADS + head[None, :]).to(tl.int64)
            known = (part < count)[:, None] & (head < HEADS)[None, :]
            size = tl.load(sums + slot, mask=known, other=float("-inf"))
            at = parts + slot[:, :, None] * HEAD_DIM + place[None, None, :]
            values = tl.load(at, mask=known[:, :, None] & (place < HEAD_DIM)[None, None, :], other=0.0)
            highest = tl.maximum(best, tl.max(size, axis=0))
            base = tl.where(highest == float("-inf"), 0.0, highest)
            own, fade = tl.exp2(size - base[None, :]), tl.exp2(best - base)
            total = total * fade[:, None] + tl.sum(own[:, :, None] * values, axis=0)
            weight = weight * fade + tl.sum(own, axis=0)
            best = highest
        target = out + row.to(tl.int64) * out_stride + head[:, None] * HEAD_DIM + place[None, :]
        result = total / tl.where(weight > 0, weight, 1.0)[:, None]
        tl.store(target, result.to(out.dtype.element_ty), mask=mine)


def join_parts(work: AttentionWork, scratch: Scratch, out: Tensor, *, pdl: bool) -> None:
    """Writes to out [T, heads, head_dim] the rows that `work` cut into parts; `scratch` has these."""
    if not work.joined:
        return
    heads, head_dim = out.shape[1:]
    own_heads, own_parts = _JOIN_FEW if work.joined <= _FEW_JOINED else _JOIN_MANY
    _join[(work.joined, triton.cdiv(heads, own_heads))](
        scratch.parts,
        scratch.sums,
        work.parts_first,
        work.parts,
        out,
        out.stride(0),
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_H=own_heads,
        AT_ONCE=own_parts,
        PDL=pdl,
        **launch_options(1 if own_heads == 1 else 2, 1, pdl),
    )
