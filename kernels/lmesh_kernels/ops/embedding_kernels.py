"""The Triton form of `embed_pending`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _embed_pending(ids, slots, last_ids, weight, out, size, BLOCK: tl.constexpr) -> None:
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    row = tl.load(ids + token).to(tl.int64)
    if slot >= 0:
        row = tl.load(last_ids + slot)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    tl.store(out + token * size + column, tl.load(weight + row * size + column, mask=inside), mask=inside)


def embed_pending_triton(ids: Tensor, slots: Tensor, last_ids: Tensor, weight: Tensor) -> Tensor:
    """As `embedding.embed_pending`."""
    size = weight.shape[1]
    out = torch.empty(len(ids), size, dtype=weight.dtype, device=weight.device)
    if len(ids):
        _embed_pending[(len(ids), triton.cdiv(size, _BLOCK))](ids, slots, last_ids, weight, out, size, BLOCK=_BLOCK)
    return out
