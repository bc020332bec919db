"""Part of a layer that keeps only its input and runs again in the backward pass, from memory or from the host's."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor


class Recompute(StrEnum):
    """What a layer's backward pass makes again instead of keeping."""

    NONE = "none"
    SELECTIVE = "selective"  # the feed-forward block: the widest of what is kept, and cheap beside attention
    FULL = "full"  # the whole layer: its input is what is kept
    OFFLOAD = "offload"  # as FULL, and the input waits in the host's memory


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, run: Callable[[Tensor], Tensor], to_host: bool) -> Tensor:  # noqa: ANN401
        ctx.run, ctx.device = run, total.device
        if to_host and total.device.type != "cpu":
            kept = torch.empty(total.shape, dtype=total.dtype, pin_memory=True)
            kept.copy_(total, non_blocking=True)
        else:
            kept = total
        ctx.save_for_backward(kept)
        return run(total)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, None, None]:  # noqa: ANN401
        (kept,) = ctx.saved_tensors
        with torch.enable_grad():
            total = kept.to(ctx.device, non_blocking=True).detach().requires_grad_()
            out = ctx.run(total)
        torch.autograd.backward(out, dout)
        return total.grad, None, None


def run_again(run: Callable[[Tensor], Tensor], total: Tensor, *, to_host: bool = False) -> Tensor:
    """run(total), a function of `total` and of constants only, with nothing kept but `total`.

    The same operations run twice on the same values, so gradients are those of running once, to the bit.
    """
    out: Tensor = _Again.apply(total, run, to_host)  # type: ignore[no-untyped-call]
    return out
