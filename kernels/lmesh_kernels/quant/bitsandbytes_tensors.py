"""4-bit tensors of a checkpoint as bitsandbytes saves them: a packed weight, and what it needs beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lmesh_kernels.quant.nf4 import Nf4Statistics, Nf4Tensor, nf4_levels

_STATE = ".quant_state.bitsandbytes__"
# What may stand beside a packed weight.
_PART_SUFFIXES = (".nested_absmax", ".nested_quant_map", ".absmax", ".quant_map", _STATE + "nf4", _STATE + "fp4")


class QuantisedTensorError(ValueError):
    """A quantised tensor that cannot be read; `reason` is UPPER_SNAKE, the message names the tensor."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def owner(name: str) -> str | None:
    """The packed weight that a tensor of that name belongs to; None for the model's own tensors."""
    return next((name.removesuffix(suffix) for suffix in _PART_SUFFIXES if name.endswith(suffix)), None)


def read_nf4(name: str, tensors: Mapping[str, Tensor]) -> Nf4Tensor:
    """The NF4 weight `name` of a checkpoint's tensors.

    Raises QuantisedTensorError: NOT_NF4 for another kind, MISSING_PART, WRONG_PART for shapes or types that do not fit.
    """
    state = _state(name, tensors)
    shape, block = tuple(int(size) for size in state["shape"]), int(state["blocksize"])
    elements = math.prod(shape)
    blocks = -(-elements // block)
    codes = _part(name, "", tensors, torch.uint8, -(-elements // 2))
    levels = _part(name, ".quant_map", tensors, torch.float32, 16)
    if not torch.equal(levels.cpu(), nf4_levels()):
        raise QuantisedTensorError("NOT_NF4", f"{name}: its levels are not NF4's")
    if "nested_blocksize" not in state:
        plain = _part(name, ".absmax", tensors, torch.float32, blocks)
        return Nf4Tensor(codes=codes, levels=levels, statistics=plain, shape=shape, block=block)
    nested = int(state["nested_blocksize"])
    statistics = Nf4Statistics(
        codes=_part(name, ".absmax", tensors, torch.uint8, blocks),
        levels=_part(name, ".nested_quant_map", tensors, torch.float32, 256),
        scales=_part(name, ".nested_absmax", tensors, torch.float32, -(-blocks // nested)),
        mean=torch.tensor(float(state["nested_offset"]), dtype=torch.float32, device=codes.device),
        block=nested,
    )
    return Nf4Tensor(codes=codes, levels=levels, statistics=statistics, shape=shape, block=block)


def _state(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    packed = tensors.get(f"{name}{_STATE}nf4")
    if packed is None:
        kind = "fp4" if f"{name}{_STATE}fp4" in tensors else "no 4-bit tensor of bitsandbytes"
        raise QuantisedTensorError("NOT_NF4", f"{name} is {kind}; NF4 is what can be read")
    try:
        state: dict[str, Any] = json.loads(bytes(packed.cpu().tolist()))
        wanted = {"quant_type", "blocksize", "shape"}
        if state["quant_type"] != "nf4" or not wanted <= state.keys():
            raise KeyError(state["quant_type"])
    except (KeyError, TypeError, ValueError) as error:
        raise QuantisedTensorError("WRONG_PART", f"{name}{_STATE}nf4 is no state of NF4: {error}") from error
    return state


def _part(name: str, suffix: str, tensors: Mapping[str, Tensor], dtype: torch.dtype, elements: int) -> Tensor:
    part = tensors.get(name + suffix)
    if part is None:
        raise QuantisedTensorError("MISSING_PART", f"{name}{suffix} is missing")
    if part.dtype != dtype or part.numel() != elements:
        found = f"{part.numel()} of {part.dtype}"
        raise QuantisedTensorError("WRONG_PART", f"{name}{suffix} holds {found}, not {elements} of {dtype}")
    return part.flatten()
