"""A model's tensors with an adapter merged in, one at a time under Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from lmesh_kernels.lora.factors import Adapter, merged
from lmesh_kernels.models.config import ModelConfig
from lmesh_kernels.models.registry import read_tensors
from lmesh_kernels.models.weights import IGNORABLE, bindings
from lmesh_kernels.quant.nf4 import Nf4Tensor, dequantise
from lmesh_kernels.text.resolve import ModelFiles
from torch import Tensor

from lmesh_trainer.errors import JobError

Stored = Callable[[Tensor], Tensor]
"""What a format makes of float32 values [rows, columns], as they are read back."""


@dataclass(slots=True)
class Survival:
    """How much of what the adapter changes is still there after rounding, over all merged tensors.

    The realised change is projected on the wanted one: 1 when nothing is lost, 0 when every change was below half a
    step of the dtype.
    """

    wanted: float = 0.0
    realised: float = 0.0

    def take(self, base: Tensor, exact: Tensor, stored: Stored) -> None:
        """Counts one tensor, `base` and `exact` float32."""
        change = (exact - base).double()
        self.wanted += float((change * change).sum())
        # The base is rounded too where it was not made in this format: that is no change of the adapter's.
        self.realised += float(((stored(exact).double() - stored(base).double()) * change).sum())

    @property
    def ratio(self) -> float:
        """1.0 without an adapter."""
        return self.realised / self.wanted if self.wanted else 1.0


def merged_tensors(
    files: ModelFiles, config: ModelConfig, adapter: Adapter, dtype: torch.dtype, survival: Survival, stored: Stored
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint in `dtype`, rounded once, after the merge in float32; `survival` is counted.

    Copies that a tied checkpoint carries are left out. Raises JobError ADAPTER_MISFIT when a site has no tensor.
    """
    sites = {f"{site.theirs}.weight": factors for site, factors in adapter.items()}
    known = bindings(config)
    for name, tensor in read_tensors(files, config):
        if IGNORABLE.match(name) or (name in known and known[name].duplicate):
            continue
        if isinstance(tensor, Nf4Tensor):
            tensor = dequantise(tensor, torch.float32)
        factors = sites.pop(name, None)
        if factors is None:
            yield name, tensor.to(dtype)
            continue
        exact = merged(tensor, factors)
        survival.take(tensor.float(), exact, stored)
        yield name, exact.to(dtype)
    if sites:
        raise JobError("ADAPTER_MISFIT", f"the model has no {sorted(sites)[:3]}")
