"""A product with adapters in plain torch, differentiated by autograd: DoRA, and the reference of the fused nodes.

DoRA (Liu et al. 2024, arXiv 2402.09353): y = (x @ W.T + scale * (x @ a.T) @ b.T) * magnitude / |W + scale * b @ a|,
norms by rows, taken as constants by the gradient (section 4.3 there). Dropout, as PEFT has it, acts on what the
adapter adds: the base's own product sees x whole.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from lmesh_kernels.ops.dropout import Dropout
from lmesh_kernels.ops.low_rank import LowRank, Part
from lmesh_kernels.ops.trained import Weight, tracked


def adapted_linear(
    x: Tensor, weight: Weight, bias: Weight | None, low: LowRank | None, dropout: Dropout | None
) -> Tensor:
    """x [T, inputs] times weight [outputs, inputs] with all its adapters; returns [T, outputs]."""
    w = tracked(weight)
    plain = linear(x, w)
    b = None if bias is None else tracked(bias)
    if low is None:
        return plain if b is None else plain + b
    a = tracked(low.a)
    additions = torch.zeros_like(plain)
    for part in low.parts:
        own, seen = plain[:, part.columns], x if dropout is None else dropout.apply(x, part.site)
        outer = tracked(part.b)
        added = part.scale * linear(linear(seen, a[part.ranks]), outer)
        if part.magnitude is not None:
            rows = w[part.columns]
            factor = tracked(part.magnitude) / _norms(rows, a[part.ranks], outer, part)
            base = own if dropout is None else linear(seen, rows)
            added = factor * added + (factor - 1.0) * base
        additions = additions + torch.nn.functional.pad(added, (part.start, plain.shape[1] - part.columns.stop))
    total = plain + additions
    return total if b is None else total + b


def _norms(rows: Tensor, a: Tensor, b: Tensor, part: Part) -> Tensor:
    both = rows.detach() + part.scale * (b.detach() @ a.detach())
    norms: Tensor = torch.linalg.vector_norm(both, dim=1)
    return norms
