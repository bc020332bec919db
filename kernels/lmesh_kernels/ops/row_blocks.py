"""Chains of elementwise operations a few rows at a time, where that keeps them in a processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

# Bytes of all tensors of a chain together: what the second caches of two cores hold. Each operation is then a call for
# every block, which costs less than a pass over memory.
CHAIN_BYTES = 2 << 20


def row_blocks(like: Tensor, tensors: int) -> Iterator[slice]:
    """Slices of the first dimension for a chain over `tensors` such as `like`: blocks on a CPU, else one of all."""
    rows = like.shape[0]
    step = max(1, CHAIN_BYTES // max(1, tensors * like[:1].nbytes)) if like.device.type == "cpu" else max(1, rows)
    return (slice(at, min(rows, at + step)) for at in range(0, rows, step))
