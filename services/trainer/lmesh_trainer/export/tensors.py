"""A model's tensors with an adapter merged in, one at a time under Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from lmesh_kernels.lora.factors import Adapter, merged
from lmesh_kernels.lora.sites import sites
from lmesh_kernels.models.config import ModelConfig
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.registry import read_tensors
from lmesh_kernels.models.weights import IGNORABLE, bindings
from lmesh_kernels.quant.nf4 import Nf4Tensor, dequantise, quantise
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
    files: ModelFiles,
    config: ModelConfig,
    adapter: Adapter,
    dtype: torch.dtype,
    survival: Survival,
    stored: Stored,
    *,
    nf4: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint in `dtype`, rounded once, after the merge in float32; `survival` is counted.

    With `nf4` the base is what loading in NF4 makes of it, as the adapter was trained on. Copies that a tied checkpoint
    carries are left out. Raises JobError ADAPTER_MISFIT when a site has no tensor.
    """
    changes = {f"{site.theirs}.weight": factors for site, factors in adapter.items()}
    known = bindings(config)
    quantised = {f"{site.theirs}.weight" for site in sites(config)} if nf4 else set()
    for name, tensor in read_tensors(files, config):
        if IGNORABLE.match(name) or (name in known and known[name].duplicate):
            continue
        if name in quantised and isinstance(tensor, Tensor):
            tensor = quantise(tensor)
        if isinstance(tensor, Nf4Tensor):
            tensor = dequantise(tensor, torch.float32)
        factors = changes.pop(name, None)
        if factors is None:
            yield name, tensor.to(dtype)
            continue
        exact = merged(tensor, factors)
        survival.take(tensor.float(), exact, stored)
        yield name, exact.to(dtype)
    if changes:
        raise JobError("ADAPTER_MISFIT", f"the model has no {sorted(changes)[:3]}")


def live_tensors(decoder: Decoder, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a decoder as it is now, in its dtype, rounded once, after the adapter's merge in float32.

    Quantised weights are unfolded: what the adapter was trained on is what it is merged into.
    """
    changes = {f"{site.theirs}.weight": factors for site, factors in adapter.items()}
    slots = dict(decoder.named_buffers())
    for name, place in bindings(decoder.config).items():
        if place.duplicate:
            continue
        slot = slots.get(place.slot)
        whole = decoder.product(place.slot.removesuffix(".weight")).matrix() if slot is None else slot
        tensor = whole[place.start : place.start + place.rows].detach()
        if name in changes:
            tensor = merged(tensor, changes[name]).to(decoder.dtype)
        yield name, tensor.cpu()


def slot_tensors(config: ModelConfig, slots: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a decoder whose slots are all here, rounded to `dtype`."""
    for name, place in bindings(config).items():
        if not place.duplicate:
            yield name, slots[place.slot][place.start : place.start + place.rows].detach().to("cpu", dtype)
