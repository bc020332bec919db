"""Attention of a step's queries over the paged cache: decodes and prefill chunks of many sequences in one call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lmesh_kernels.layers.batch import PagedBatch
from lmesh_kernels.ops.attention_plan import AttentionPlan, Chunk, DecodeGroup, Piece, plan_attention
from lmesh_kernels.ops.backend import takes_triton
from lmesh_kernels.ops.device_attention import DeviceAttention


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch, *, scale: float, plan: AttentionPlan | None = None
) -> Tensor:
    """Causal attention of each token over its own sequence, whose K and V (this step's too) are in the cache.

    q [T, heads, head_dim]; keys, values [blocks, block_size, kv_heads, head_dim], heads a multiple of kv_heads;
    scale multiplies the scores; plan: `plan_attention` of this batch, where a caller has many layers to run on a CPU
    (on an accelerator it holds a `DeviceAttention`).
    Returns [T, heads, head_dim].
    """
    if takes_triton(q):
        group, head_dim = q.shape[1] // keys.shape[2], q.shape[2]
        device = DeviceAttention(q.device, kv_heads=keys.shape[2], group=group, head_dim=head_dim, dtype=q.dtype)
        return device.attend(q, keys, values, batch.block_tables, device.plan(batch), scale=scale)
    if plan is None:
        token_bytes = 2 * keys.shape[2] * keys.shape[3] * keys.dtype.itemsize
        plan = plan_attention(batch, block_size=keys.shape[1], token_bytes=token_bytes, dtype=q.dtype)
    return paged_attention_reference(q, keys, values, plan, scale=scale)


def paged_attention_reference(q: Tensor, keys: Tensor, values: Tensor, plan: AttentionPlan, *, scale: float) -> Tensor:
    """As `paged_attention`, with torch's scaled dot product attention over gathered blocks."""
    out = torch.empty_like(q)
    for group in plan.groups:
        out[group.rows] = _decode(q[group.rows], keys, values, group, scale)
    for chunk in plan.chunks:
        _prefill(q, keys, values, chunk, scale, out)
    return out


def _decode(q: Tensor, keys: Tensor, values: Tensor, group: DecodeGroup, scale: float) -> Tensor:
    """[n, heads, head_dim] of a group: query heads that share a key head become that head's query rows."""
    k = _gather_group(keys, group)
    v = _gather_group(values, group)
    rows = q.reshape(group.size, keys.shape[2], -1, keys.shape[3])
    # With one token a sequence the query rows of a head may all see the same keys: no causal mask among them.
    attended: Tensor = scaled_dot_product_attention(rows, k, v, attn_mask=group.mask, scale=scale)
    return attended.reshape(q.shape)


def _gather_group(cache: Tensor, group: DecodeGroup) -> Tensor:
    """[n, kv_heads, width, head_dim]; what lies past a sequence's end is zeroed, for a masked NaN is still NaN."""
    gathered = cache.index_select(0, group.blocks).view(group.size, group.width, *cache.shape[2:])
    if group.shortest < group.width:
        gathered[:, group.shortest :].masked_fill_(group.outside, 0)
    return gathered.transpose(1, 2)


def _prefill(q: Tensor, keys: Tensor, values: Tensor, chunk: Chunk, scale: float, out: Tensor) -> None:
    k, v = (cache.index_select(0, chunk.blocks).flatten(0, 1) for cache in (keys, values))
    for piece in chunk.pieces:
        _attend(q, k[: piece.kv_len], v[: piece.kv_len], piece, scale, out)


def _attend(q: Tensor, k: Tensor, v: Tensor, piece: Piece, scale: float, out: Tensor) -> None:
    """One piece: key heads stand in the batch place and are expanded, not copied, over their query heads."""
    size, (_, kv_heads, head_dim) = piece.stop - piece.start, k.shape
    rows = q[piece.start : piece.stop].reshape(size, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    k, v = (x.transpose(0, 1)[:, None].expand(-1, rows.shape[1], -1, -1) for x in (k, v))
    mask = piece.mask(q.dtype, q.device)
    attended = scaled_dot_product_attention(rows, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    out[piece.start : piece.stop] = attended.permute(2, 0, 1, 3).flatten(1, 2)
