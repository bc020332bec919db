"""The two uses of the vocabulary matrix: ids to vectors and vectors to logits."""

from __future__ import annotations

from torch import Tensor

from lmesh_kernels.ops.linear import linear, linear_reference


def embed(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight [V, D] for ids [T] int64; returns [T, D]."""
    return embed_reference(ids, weight)


def embed_reference(ids: Tensor, weight: Tensor) -> Tensor:
    """As `embed`, in plain torch."""
    return weight.index_select(0, ids)


def vocabulary_logits(hidden: Tensor, weight: Tensor, packed: Tensor | None = None) -> Tensor:
    """hidden [R, D] times weight [V, D]; returns float32 logits [R, V]. `packed` is `ops.linear.pack` of the weight."""
    return linear(hidden, weight, packed=packed).float()


def vocabulary_logits_reference(hidden: Tensor, weight: Tensor) -> Tensor:
    """As `vocabulary_logits`, in plain torch: the product in the weights' dtype, then widened."""
    return linear_reference(hidden, weight).float()
