"""What a job trains: values for the pass, float32 masters for the optimiser, and one allocation of gradient sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from lmesh_kernels.ops.trained import Trained


class Precision(StrEnum):
    """Dtypes of a job: of the pass, and of what the optimiser changes."""

    FLOAT32 = "float32"
    BF16 = "bf16"  # the pass in bfloat16, masters in float32
    BF16_PURE = "bf16-pure"  # both in bfloat16

    @property
    def dtype(self) -> torch.dtype:
        """Of the pass."""
        return torch.float32 if self is Precision.FLOAT32 else torch.bfloat16


@dataclass(frozen=True, slots=True, eq=False)
class Parameter:
    """One trained tensor. `master` is the value itself where there is no other."""

    name: str
    trained: Trained
    master: Tensor

    @property
    def decays(self) -> bool:
        """Whether weight decay is meant for it: matrices, not norms, biases or magnitudes."""
        return self.master.dim() > 1


class Parameters:
    """All of a job's. Gradients [N] float32 lie in one allocation: cleared, measured and reduced in one call each."""

    def __init__(self, values: Mapping[str, Tensor], precision: Precision) -> None:
        """`values` are used as they are, in the dtype of the pass; they are views where others read them too.

        ValueError for none, or for one of another dtype.
        """
        strange = [name for name, tensor in values.items() if tensor.dtype != precision.dtype]
        if not values or strange:
            raise ValueError(f"parameters are {precision.dtype} tensors, at least one: {strange[:3]}")
        first = next(iter(values.values()))
        self.gradients = torch.zeros(sum(t.numel() for t in values.values()), device=first.device)
        self._items: dict[str, Parameter] = {}
        at = 0
        for name, tensor in values.items():
            grad = self.gradients[at : at + tensor.numel()].view(tensor.shape)
            at += tensor.numel()
            master = tensor.float() if precision is Precision.BF16 else tensor
            self._items[name] = Parameter(name, Trained(tensor, grad), master)

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self._items.values())

    def __getitem__(self, name: str) -> Parameter:
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __len__(self) -> int:
        return len(self._items)

    @property
    def count(self) -> int:
        """Numbers trained."""
        return self.gradients.numel()

    def clear(self) -> None:
        """Sets the gradients to zero."""
        self.gradients.zero_()

    def publish(self) -> None:
        """Rounds changed masters to the values that the pass reads."""
        for item in self:
            if item.master is not item.trained.value:
                item.trained.value.copy_(item.master)
