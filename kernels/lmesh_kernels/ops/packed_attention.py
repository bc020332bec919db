"""Causal attention of packed rows over themselves, rotation included, as one node of a training pass.

Rows never see each other: each is attended by itself. What is kept for the backward pass is the rotated qkv, the
output, and where the device's kernel wants it a number a token and head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lmesh_kernels.layers.packed_batch import PackedBatch
from lmesh_kernels.ops import causal_blocks, causal_kernels
from lmesh_kernels.ops.row_blocks import row_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """How qkv [T, (heads + 2 * kv_heads) * head_dim] is cut; q first, then k, then v."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def turned(self) -> int:
        """Columns of q and k, which are rotated."""
        return (self.heads + self.kv_heads) * self.head_dim

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.kv_heads

    @property
    def q_size(self) -> int:
        """Columns of q."""
        return self.heads * self.head_dim


def packed_attention(qkv: Tensor, rotation: Tensor, batch: PackedBatch, heads: Heads) -> Tensor:
    """qkv [T, (heads + 2 * kv_heads) * head_dim], overwritten; rotation [T, head_dim] float32 (rows of `rope_table`).

    Returns [T, heads * head_dim]. The scale of the scores is head_dim ** -0.5.
    """
    attended: Tensor = _Attention.apply(qkv, rotation, batch, heads)  # type: ignore[no-untyped-call]
    return attended


def packed_attention_reference(qkv: Tensor, rotation: Tensor, batch: PackedBatch, heads: Heads) -> Tensor:
    """As `packed_attention`, in plain torch that autograd differentiates, a row at a time; qkv stays as it is."""
    cos, sin = rotation[:, None].float().chunk(2, dim=-1)
    parts = qkv.view(qkv.shape[0], -1, heads.head_dim)
    first, second = parts[:, : heads.heads + heads.kv_heads].float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(qkv.dtype)
    q, k = torch.split(turned, [heads.heads, heads.kv_heads], dim=1)
    v = parts[:, heads.heads + heads.kv_heads :]
    outs = []
    for begin, end in pairwise(batch.begins):
        rows = (t[begin:end].transpose(0, 1) for t in (q, k, v))
        one = scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)  # type: ignore[misc,arg-type]
        outs.append(one.transpose(0, 1).flatten(1))
    return torch.cat(outs)


def _turn_(qkv: Tensor, rotation: Tensor, heads: Heads, sign: float) -> None:
    """Rotates q and k in place; with sign -1 back again. In float32 whatever the dtype."""
    for rows in row_blocks(qkv, 2):
        _turn_rows_(qkv[rows, : heads.turned], rotation[rows], heads, sign)


def _turn_rows_(turned: Tensor, rotation: Tensor, heads: Heads, sign: float) -> None:
    parts = turned.view(turned.shape[0], -1, 2, heads.head_dim // 2)
    cos, sin = rotation[:, None].chunk(2, dim=-1)
    first, second = parts.float().unbind(2)  # views of qkv itself where it is float32
    crossed = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-sign)
    second.mul_(cos).add_(crossed, alpha=sign)
    if turned.dtype != torch.float32:
        parts.copy_(torch.stack([first, second], dim=2))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rotation: Tensor, batch: PackedBatch, heads: Heads) -> Tensor:  # noqa: ANN401
        # Not marked as dirty: nobody but this node has use for it, rotated or not.
        _turn_(qkv, rotation, heads, 1.0)
        if causal_kernels.packs(qkv):
            attended, kept = causal_kernels.packed_forward(*_split(qkv, heads), batch.cu_seqlens, _longest(batch))
            out = attended.flatten(1)
        elif causal_blocks.takes(qkv):
            out, kept = qkv.new_empty(qkv.shape[0], heads.q_size), []
            for group in _groups(batch, heads):
                causal_blocks.forward(*group.cut(qkv, heads), group.queries(out, heads))
        else:
            out = qkv.new_empty(qkv.shape[0], heads.q_size)
            kept = [_forward_row(qkv[rows], heads, out[rows]) for rows in _rows(batch)]
        ctx.save_for_backward(qkv, rotation, out, *kept)
        ctx.batch, ctx.heads = batch, heads
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        qkv, rotation, out, *kept = ctx.saved_tensors
        batch, heads = ctx.batch, ctx.heads
        if causal_kernels.packs(qkv):
            shape = (-1, heads.heads, heads.head_dim)
            gradients = causal_kernels.packed_backward(
                dout.view(shape), *_split(qkv, heads), out.view(shape), kept, batch.cu_seqlens, _longest(batch)
            )
            dqkv = torch.cat([g.flatten(1) for g in gradients], dim=1)
        elif causal_blocks.takes(qkv):
            dqkv = torch.empty_like(qkv)
            for group in _groups(batch, heads):
                given = group.queries(dout, heads)
                causal_blocks.backward(given, *group.cut(qkv, heads), *group.cut(dqkv, heads))
        else:
            dqkv = torch.empty_like(qkv)
            for rows, lse in zip(_rows(batch), kept, strict=True):
                _backward_row(dout[rows], qkv[rows], out[rows], lse, heads, dqkv[rows])
        _turn_(dqkv, rotation, heads, -1.0)
        return dqkv, None, None, None


def _rows(batch: PackedBatch) -> Iterator[slice]:
    return (slice(begin, end) for begin, end in pairwise(batch.begins))


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring rows of one length, which are attended together."""

    begin: int
    count: int
    length: int

    def cut(self, qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
        """Views of q [count, length, kv_heads, group, head_dim], and of k and v without the group."""
        kv_size = heads.kv_heads * heads.head_dim
        q, k, v = torch.split(qkv, [heads.q_size, kv_size, kv_size], dim=1)
        shape = (self.count, self.length, heads.kv_heads, heads.head_dim)
        return self.queries(q, heads), self._rows(k).view(shape), self._rows(v).view(shape)

    def queries(self, q: Tensor, heads: Heads) -> Tensor:
        """A view of q [T, q_size], [count, length, kv_heads, group, head_dim]."""
        return self._rows(q).view(self.count, self.length, heads.kv_heads, heads.group, heads.head_dim)

    def _rows(self, t: Tensor) -> Tensor:
        return t[self.begin : self.begin + self.count * self.length]


def _groups(batch: PackedBatch, heads: Heads) -> Iterator[_Group]:
    for length, rows in groupby(pairwise(batch.begins), key=lambda row: row[1] - row[0]):
        begins, step = [begin for begin, _ in rows], causal_blocks.rows_at_once(length, heads.heads)
        for at in range(0, len(begins), step):
            yield _Group(begins[at], len(begins[at : at + step]), length)


def _longest(batch: PackedBatch) -> int:
    return max(end - begin for begin, end in pairwise(batch.begins))


def _split(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k and v, each [T, its heads, head_dim]."""
    parts = qkv.view(qkv.shape[0], -1, heads.head_dim)
    q, k, v = torch.split(parts, [heads.heads, heads.kv_heads, heads.kv_heads], dim=1)
    return q, k, v


def _cut(qkv: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one row: q, and k and v expanded over the q heads that share them, each [kv_heads, group, n, head_dim].

    Key heads stand in the batch's place, so that expanding copies nothing.
    """
    q, k, v = _split(qkv, heads)
    k, v = (t.transpose(0, 1)[:, None].expand(-1, heads.group, -1, -1) for t in (k, v))
    return _grouped(q, heads), k, v


def _grouped(q: Tensor, heads: Heads) -> Tensor:
    """[n, heads, head_dim] or [n, heads * head_dim] as [kv_heads, group, n, head_dim], a view."""
    return q.view(q.shape[0], heads.kv_heads, heads.group, heads.head_dim).permute(1, 2, 0, 3)


def _forward_row(qkv: Tensor, heads: Heads, out: Tensor) -> Tensor:
    attended, lse = causal_kernels.row_forward(*_cut(qkv, heads))
    _grouped(out, heads).copy_(attended)
    return lse


def _backward_row(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: Heads, dqkv: Tensor) -> None:
    dq, dk, dv = causal_kernels.row_backward(_grouped(dout, heads), *_cut(qkv, heads), _grouped(out, heads), lse)
    into_q, into_k, into_v = _split(dqkv, heads)
    _grouped(into_q, heads).copy_(dq)
    # The heads of a group read the same k and v.
    torch.sum(dk, dim=1, out=into_k.transpose(0, 1))
    torch.sum(dv, dim=1, out=into_v.transpose(0, 1))
