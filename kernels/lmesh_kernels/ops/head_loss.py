"""Vocabulary head and cross-entropy together, in chunks of rows: the logits of a batch never exist at once.

Only tokens with a weight in the loss are multiplied by the head. Each chunk's gradient is made right after its loss,
in the forward pass, so that nothing of the vocabulary's size is kept and no product is made twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lmesh_kernels.ops.row_blocks import row_blocks
from lmesh_kernels.ops.trained import Trained, Weight, value

# Bytes of float32 logits in one chunk. Rows enough for a good product, and a small part of any device's memory.
CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class LossSums:
    """Sums over the tokens of a batch that have a weight; a mean is somebody else's to take."""

    loss: Tensor  # [] float64: weighted sum of -log p(target); differentiable
    correct: Tensor  # [] int64: of those tokens, where the target was the likeliest


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - no type of autograd's
        hidden: Tensor,
        head: Weight,
        targets: Tensor,
        weights: Tensor,
        chunk_bytes: int,
    ) -> tuple[Tensor, Tensor]:
        picked = weights.nonzero()[:, 0]
        rows, wanted = hidden.index_select(0, picked), targets.index_select(0, picked)
        shares = weights.index_select(0, picked)
        needs = ctx.needs_input_grad[0]
        gradient = torch.empty_like(rows) if needs else rows
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        step = max(1, chunk_bytes // (4 * value(head).shape[0]))
        for at in range(0, len(picked), step):
            part = slice(at, at + step)
            loss += _chunk(rows[part], wanted[part], shares[part], head, gradient[part] if needs else None, correct)
        ctx.mark_non_differentiable(correct)
        ctx.save_for_backward(picked, gradient)
        ctx.shape = hidden.shape
        return loss, correct

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:  # noqa: ANN401
        picked, gradient = ctx.saved_tensors
        dhidden = gradient.new_zeros(ctx.shape)
        dhidden.index_copy_(0, picked, gradient)
        return dhidden, None, None, None, None


def _chunk(
    rows: Tensor, targets: Tensor, weights: Tensor, head: Weight, gradient: Tensor | None, correct: Tensor
) -> Tensor:
    """The weighted loss of one chunk, [] float64; writes the gradient of its rows and adds the head's to its sum."""
    logits = (rows @ value(head).t()).float()
    wanted = logits.gather(1, targets[:, None])
    highest, sums = torch.empty_like(wanted), torch.empty_like(wanted)
    # One temporary of the vocabulary's size, overwritten step by step: logits, their exponentials, the gradient.
    for block in row_blocks(logits, 1):
        some = logits[block]
        torch.amax(some, dim=-1, keepdim=True, out=highest[block])
        torch.sum(some.sub_(highest[block]).exp_(), dim=-1, keepdim=True, out=sums[block])
        if gradient is not None:
            # d loss / d logits = weight * (softmax - one-hot)
            some.mul_(weights[block, None] / sums[block])
    correct += (wanted == highest).sum()
    losses = sums.log() + highest - wanted
    if gradient is not None:
        logits.scatter_add_(1, targets[:, None], -weights[:, None])
        dlogits = logits.to(rows.dtype)
        torch.mm(dlogits, value(head), out=gradient)
        if isinstance(head, Trained):
            head.add_product(dlogits.t(), rows)
    return (losses[:, 0].double() * weights).sum()


def head_loss(
    hidden: Tensor, head: Weight, targets: Tensor, weights: Tensor, *, chunk_bytes: int = CHUNK_BYTES
) -> LossSums:
    """hidden [T, D] after the last norm; head [V, D]; targets [T] int64; weights [T] float32, 0 leaves a token out.

    The gradient is that of the loss itself: its backward pass must start from 1, as `loss.backward()` does, for it
    is made before that pass begins.
    """
    loss, correct = _HeadLoss.apply(hidden, head, targets, weights, chunk_bytes)  # type: ignore[no-untyped-call]
    return LossSums(loss, correct)


def head_loss_reference(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The loss of `head_loss` in plain torch, all logits at once, [] float64."""
    logits = (hidden @ head.t()).double()
    return (cross_entropy(logits, targets, reduction="none") * weights).sum()
