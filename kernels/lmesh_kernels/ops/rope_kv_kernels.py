"""The Triton form of `rope_kv`: norm of heads, rotation and the cache's write, each number read and written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lmesh_kernels.ops.linear_tiles import launch_options, takes_pdl

_HEADS = 8  # a program's heads: enough numbers for its threads, few enough that one token fills many programs


@triton.jit
def head_weights(weight, half, inside, HEAD_DIM: tl.constexpr):
    """Both halves [1, half] of the weights of heads' norm."""
    low = tl.load(weight + half, mask=inside, other=0.0)
    return low[None, :], tl.load(weight + HEAD_DIM // 2 + half, mask=inside, other=0.0)[None, :]


@triton.jit
def normed_heads(first, second, low, high, eps, HEAD_DIM: tl.constexpr):
    """Both halves of heads under their norm, rounded as the reference rounds; float32 in and out."""
    squares = tl.sum(first * first + second * second, axis=1)
    rstd = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
    kind = low.dtype
    first = ((first * rstd).to(kind).to(tl.float32) * low.to(tl.float32)).to(kind).to(tl.float32)
    second = ((second * rstd).to(kind).to(tl.float32) * high.to(tl.float32)).to(kind).to(tl.float32)
    return first, second


@triton.jit
def _rope_kv(
    qkv,
    rotation,
    kv_slots,
    keys,
    values,
    q_norm,
    k_norm,
    eps,
    qkv_stride,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    NORMED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    half = tl.arange(0, HALF_BLOCK)
    narrow = half < HEAD_DIM // 2
    mine = (head < HEADS + 2 * KV_HEADS)[:, None] & narrow[None, :]
    place = qkv + token * qkv_stride + head[:, None] * HEAD_DIM + half[None, :]
    kind = qkv.dtype.element_ty
    first = tl.load(place, mask=mine, other=0.0).to(tl.float32)
    second = tl.load(place + HEAD_DIM // 2, mask=mine, other=0.0).to(tl.float32)
    is_q, is_v = (head < HEADS)[:, None], (head >= HEADS + KV_HEADS)[:, None]
    turned_first, turned_second = first, second
    if NORMED:
        q_low, q_high = head_weights(q_norm, half, narrow, HEAD_DIM)
        k_low, k_high = head_weights(k_norm, half, narrow, HEAD_DIM)
        q_first, q_second = normed_heads(first, second, q_low, q_high, eps, HEAD_DIM)
        k_first, k_second = normed_heads(first, second, k_low, k_high, eps, HEAD_DIM)
        turned_first, turned_second = tl.where(is_q, q_first, k_first), tl.where(is_q, q_second, k_second)
    cos = tl.load(rotation + token * HEAD_DIM + half, mask=narrow, other=0.0)[None, :]
    sin = tl.load(rotation + token * HEAD_DIM + HEAD_DIM // 2 + half, mask=narrow, other=0.0)[None, :]
    low = turned_first * cos - turned_second * sin
    high = turned_second * cos + turned_first * sin
    tl.store(place, low.to(kind), mask=mine & (is_v == 0))
    tl.store(place + HEAD_DIM // 2, high.to(kind), mask=mine & (is_v == 0))
    cached = tl.load(kv_slots + token).to(tl.int64) * KV_HEADS
    key = keys + (cached + head[:, None] - HEADS) * HEAD_DIM + half[None, :]
    is_k = mine & (head >= HEADS)[:, None] & (head < HEADS + KV_HEADS)[:, None]
    tl.store(key, low.to(keys.dtype.element_ty), mask=is_k)
    tl.store(key + HEAD_DIM // 2, high.to(keys.dtype.element_ty), mask=is_k)
    value = values + (cached + head[:, None] - HEADS - KV_HEADS) * HEAD_DIM + half[None, :]
    tl.store(value, first.to(values.dtype.element_ty), mask=mine & is_v)
    tl.store(value + HEAD_DIM // 2, second.to(values.dtype.element_ty), mask=mine & is_v)


def check_norms(q_norm: Tensor | None, k_norm: Tensor | None) -> None:
    """ValueError unless heads of q and k have a norm both or neither: a kernel is compiled for one of the two."""
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q and k heads are normed both or not at all")


def rope_kv_triton(
    qkv: Tensor,
    rotation: Tensor,
    kv_slots: Tensor,
    keys: Tensor,
    values: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """As `rope_kv.rope_kv`; q and k are rotated in place of qkv's own, whose rows have elements of stride 1."""
    kv_heads, head_dim = keys.shape[-2:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    check_norms(q_norm, k_norm)
    pdl = takes_pdl(qkv.device)
    if qkv.shape[0]:
        _rope_kv[(qkv.shape[0], triton.cdiv(heads + 2 * kv_heads, _HEADS))](
            qkv,
            rotation,
            kv_slots,
            keys,
            values,
            qkv if q_norm is None else q_norm,
            qkv if k_norm is None else k_norm,
            eps,
            qkv.stride(0),
            HEADS=heads,
            KV_HEADS=kv_heads,
            HEAD_DIM=head_dim,
            HALF_BLOCK=triton.next_power_of_2(head_dim // 2),
            HEAD_BLOCK=_HEADS,
            NORMED=q_norm is not None,
            PDL=pdl,
            **launch_options(2, 3, pdl),
        )
    return qkv[:, : heads * head_dim].view(qkv.shape[0], heads, head_dim)
