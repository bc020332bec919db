"""The two uses of the vocabulary matrix: ids to vectors and vectors to logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmesh_kernels.ops.backend import takes_triton
from lmesh_kernels.ops.linear import linear
from lmesh_kernels.ops.trained import Trained, Weight, value


def embed(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight [V, D] for ids [T] int64; returns [T, D]."""
    return embed_reference(ids, weight)


def embed_reference(ids: Tensor, weight: Tensor) -> Tensor:
    """As `embed`, in plain torch."""
    return weight.index_select(0, ids)


def embed_pending(ids: Tensor, slots: Tensor, last_ids: Tensor, weight: Tensor) -> Tensor:
    """As `embed`, of ids that the host does not all know: where slots [T] is not -1, the id is last_ids[slot]."""
    if takes_triton(weight):
        from lmesh_kernels.ops.embedding_kernels import embed_pending_triton

        return embed_pending_triton(ids, slots, last_ids, weight)
    return embed_pending_reference(ids, slots, last_ids, weight)


def embed_pending_reference(ids: Tensor, slots: Tensor, last_ids: Tensor, weight: Tensor) -> Tensor:
    """As `embed_pending`, in plain torch."""
    return embed_reference(torch.where(slots < 0, ids, last_ids[slots.clamp(min=0)]), weight)


def vocabulary_logits(
    hidden: Tensor,
    weight: Tensor,
    packed: Tensor | None = None,
    *,
    widened: bool = True,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """hidden [R, D] times weight [V, D]; returns logits [R, V], float32 or in hidden's dtype.

    `out` [R, V] in hidden's dtype, if given, is where they are written to before they are widened. `packed` is
    `ops.linear.pack` of the weight; `batch_invariant` is as in `ops.linear.linear`.
    """
    logits = linear(hidden, weight, packed=packed, out=out, batch_invariant=batch_invariant)
    return logits.float() if widened else logits


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, ids: Tensor, weight: Trained) -> Tensor:  # noqa: ANN401 - no type of autograd's
        ctx.ids, ctx.weight = ids, weight
        return embed(ids, weight.value)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[None, None, None]:  # noqa: ANN401
        ctx.weight.grad.index_add_(0, ctx.ids, dx.float())
        return None, None, None


def embed_train(ids: Tensor, weight: Weight) -> Tensor:
    """As `embed`, the first node of a training pass: what follows has something to give gradients to."""
    if isinstance(weight, Trained):
        anchor = torch.empty(0, device=ids.device, requires_grad=True)
        rows: Tensor = _Embed.apply(anchor, ids, weight)  # type: ignore[no-untyped-call]
        return rows
    return embed(ids, value(weight)).requires_grad_()
