"""Causal attention of rows of one length on a CPU, in blocks of queries: batched products, none above the diagonal.

torch's own CPU kernel gives a head to a thread and multiplies by all keys of up to 512; here a block of queries meets
the keys up to its own last, and the query heads that share a key head are rows of one product. Scores are made again
in the backward pass, so nothing is kept but what came in.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

aten = torch.ops.aten

# Queries of one block. Fewer waste less above the diagonal, more make larger products and fewer calls.
BLOCK = 64
# Bytes of the scores that rows of one length may have together: a few megabytes stay in the cores' caches.
SCORE_BYTES = 3 << 20


def takes(qkv: Tensor) -> bool:
    """Whether this is the way for rows on that device and in that dtype."""
    return qkv.device.type == "cpu" and qkv.dtype == torch.float32


def rows_at_once(length: int, heads: int) -> int:
    """How many rows of that length go through `forward` and `backward` together."""
    return max(1, SCORE_BYTES // (4 * heads * min(BLOCK, length) * length))


def forward(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Writes out [R, n, kv_heads, group, head_dim] of q as out, and k and v [R, n, kv_heads, head_dim]."""
    queries, keys, values = _by_head(q, q.shape[-1] ** -0.5), _by_head(k), _by_head(v)
    attended = torch.empty_like(queries)
    for block in _blocks(q.shape[1], q.shape[3]):
        probabilities = _probabilities(queries, keys, block)
        attended[:, block.rows] = torch.bmm(probabilities, values[:, : block.end])
    _write(out, attended)


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Writes the gradients dq, dk and dv, shaped as q, k and v are in `forward`; dout is out's."""
    scale = q.shape[-1] ** -0.5
    queries, keys, values, given = _by_head(q, scale), _by_head(k), _by_head(v), _by_head(dout)
    into_queries, into_keys, into_values = (torch.empty_like(t) for t in (queries, keys, values))
    # The last block sees all keys: its products are the sums' first, and nothing need be zeroed.
    for block in reversed(list(_blocks(q.shape[1], q.shape[3]))):
        mine = given[:, block.rows]
        probabilities = _probabilities(queries, keys, block)
        _add(into_values, probabilities.transpose(1, 2), mine, block)
        dscores = torch.bmm(mine, values[:, : block.end].transpose(1, 2))
        # (d - sum(d * p)) * p, a row at a time
        aten._softmax_backward_data.out(dscores, probabilities, -1, dscores.dtype, grad_input=dscores)
        _add(into_keys, dscores.transpose(1, 2), queries[:, block.rows], block)
        into_queries[:, block.rows] = torch.bmm(dscores, keys[:, : block.end])
    _write(dq, into_queries.mul_(scale))
    _write(dk, into_keys)
    _write(dv, into_values)


class _Block:
    """Queries begin:end of a row, which see the keys up to end."""

    def __init__(self, begin: int, end: int, group: int) -> None:
        self.begin, self.end, self.group = begin, end, group
        self.rows = slice(begin * group, end * group)  # where they lie by head


def _blocks(length: int, group: int) -> Iterator[_Block]:
    return (_Block(begin, min(length, begin + BLOCK), group) for begin in range(0, length, BLOCK))


def _by_head(t: Tensor, scale: float | None = None) -> Tensor:
    """[R, n, kv_heads, (group,) head_dim] as [R * kv_heads, n (* group), head_dim], new and contiguous."""
    turned = t.transpose(1, 2)
    made = turned.new_empty(turned.shape)
    if scale is None:
        made.copy_(turned)
    else:
        torch.mul(turned, scale, out=made)
    return made.view(turned.shape[0] * turned.shape[1], -1, t.shape[-1])


def _write(to: Tensor, made: Tensor) -> None:
    """The way back from `_by_head`, into a view."""
    turned = to.transpose(1, 2)
    turned.copy_(made.view(turned.shape))


def _probabilities(queries: Tensor, keys: Tensor, block: _Block) -> Tensor:
    """[R * kv_heads, block * group, keys up to the block's end]."""
    scores = torch.bmm(queries[:, block.rows], keys[:, : block.end].transpose(1, 2))
    size = block.end - block.begin
    own = scores.view(-1, size, block.group, block.end)[..., block.begin :]
    own.add_(_mask(size))
    out: Tensor = aten._softmax.out(scores, -1, False, out=scores)
    return out


@lru_cache(maxsize=BLOCK)
def _mask(size: int) -> Tensor:
    """[size, 1, size]: 0 up to the diagonal, minus infinity above it."""
    return torch.full((size, size), float("-inf")).triu_(1)[:, None]


def _add(total: Tensor, left: Tensor, right: Tensor, block: _Block) -> None:
    """Adds left @ right to the first rows of total; the last block comes first and is written."""
    if block.end == total.shape[1]:
        torch.bmm(left, right, out=total)
    else:
        total[:, : block.end].add_(torch.bmm(left, right))
