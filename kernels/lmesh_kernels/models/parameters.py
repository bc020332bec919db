"""What a job trains: values for the pass, float32 masters for the optimiser, and one allocation of gradient sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.distributed as dist
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
    """All of a job's. Gradients [N] float32 lie in one allocation: cleared, measured and reduced in one call each.

    Each rank holds all of them here; `models.sharded` has those of which it holds a part.
    """

    def __init__(self, values: Mapping[str, Tensor], precision: Precision) -> None:
        """`values` are used as they are, in the dtype of the pass; they are views where others read them too.

        ValueError for none, or for one of another dtype.
        """
        strange = [name for name, tensor in values.items() if tensor.dtype != precision.dtype]
        if not values or strange:
            raise ValueError(f"parameters are {precision.dtype} tensors, at least one: {strange[:3]}")
        self._lay_out(values, lambda value: value.float() if precision is Precision.BF16 else value)

    def _lay_out(self, values: Mapping[str, Tensor], master: Callable[[Tensor], Tensor]) -> None:
        """One allocation of gradients beside the values."""
        first = next(iter(values.values()))
        self.gradients = torch.zeros(sum(t.numel() for t in values.values()), device=first.device)
        self._items: dict[str, Parameter] = {}
        at = 0
        for name, tensor in values.items():
            grad = self.gradients[at : at + tensor.numel()].view(tensor.shape)
            at += tensor.numel()
            self._items[name] = Parameter(name, Trained(tensor, grad), master(tensor))

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

    def reduce(self) -> None:
        """Sums the gradients over all ranks, where there are several; every rank calls it."""
        if ranks() > 1:
            dist.all_reduce(self.gradients)

    def norm(self) -> float:
        """Of all gradients; every rank calls it."""
        return float(torch.linalg.vector_norm(self.gradients))

    def gathered(self, name: str, tensor: Tensor) -> Tensor:
        """What every rank holds its part of, whole: `tensor` is a parameter's master, or another of its shape.

        Every rank calls it, in the same order; only the first is sure to get all of it.
        """
        return tensor

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part of a whole tensor of a parameter's shape."""
        return tensor

    def wholes(self) -> dict[str, Tensor]:
        """All masters, whole, by name, as `gathered` gives them."""
        return {item.name: self.gathered(item.name, item.master) for item in self}


def ranks() -> int:
    """Processes that train together; 1 for one alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
