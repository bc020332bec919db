"""All weights of a model in one allocation: addresses stay, so graphs, swaps in place and sharing can rely on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ALIGNMENT = 256  # bytes: what the widest loads of any platform ask for


def lay_out(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Replace every buffer of `module` by a view into one new allocation, in the order of their names.

    The contents are undefined. Returns the allocation, flat, in `dtype`.
    """
    slots = list(module.named_buffers())
    arena = torch.empty(slot_elements(module, dtype), dtype=dtype, device=device)
    offset = 0
    for name, slot in slots:
        owner, _, leaf = name.rpartition(".")
        view = arena[offset : offset + slot.numel()].view(slot.shape)
        module.get_submodule(owner).register_buffer(leaf, view)
        offset += _aligned(slot.numel(), dtype)
    return arena


def slot_elements(module: nn.Module, dtype: torch.dtype) -> int:
    """Elements that the module's buffers take in one allocation, padding included."""
    return sum(_aligned(slot.numel(), dtype) for slot in module.buffers())


def _aligned(elements: int, dtype: torch.dtype) -> int:
    unit = ALIGNMENT // dtype.itemsize
    return -(-elements // unit) * unit
