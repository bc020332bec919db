"""The product with a weight matrix, and the layout of weights that is fastest for it on a CPU.

oneDNN multiplies faster by weights in its own blocked layout. On 2 AMD EPYC cores (AVX2), float32, all products of
SmolLM2-135M, milliseconds against torch's plain linear: 1 row 33 (42), 8 rows 44 (98), 32 rows 82 (191), 512 rows
1,046 (1,249).
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional

log = logging.getLogger(__name__)

# The layout is made for a number of rows; this one is close to the best from 1 to 512.
_LAYOUT_ROWS = 32


def pack(weight: Tensor) -> Tensor | None:
    """A copy of weight [outputs, inputs] in the fastest layout for its device, or None where plain is the fastest.

    The copy does not follow later changes of `weight`: who swaps weights packs again.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _LAYOUT_ROWS)
    except (RuntimeError, NotImplementedError) as error:  # an operator of torch's own, not of its public interface
        log.warning("weights stay in the plain layout: this torch has no packed product (%s)", error)
        return None
    return packed


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, packed: Tensor | None = None) -> Tensor:
    """x [T, inputs] times weight [outputs, inputs] transposed, plus bias [outputs]; returns [T, outputs].

    `packed` is what `pack` made of the same weight.
    """
    if packed is None:
        return linear_reference(x, weight, bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return out


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `linear`, in plain torch."""
    return functional.linear(x, weight, bias)
