"""Where a training pass finds its weights: all of them resident in this process, or sharded over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.ops.trained import Trained, Weight

Lookup = Callable[[str], Weight]
"""The weight of a slot, as `named_buffers` of the decoder calls it."""


class Home(Protocol):
    """Weights of one decoder. What a lookup gives may be read in the call that it was handed to, and by the nodes
    of the autograd graph that were made there, in their backward pass.
    """

    @property
    def decoder(self) -> Decoder:
        """Config and shapes; its own buffers may be on the meta device."""

    @property
    def device(self) -> torch.device:
        """Where the pass runs."""

    @property
    def rotations(self) -> Tensor:
        """[positions, head_dim], the decoder's."""

    @property
    def lockstep(self) -> bool:
        """Whether every rank must run as many passes, of the same kinds, as every other."""

    def whole(self, run: Callable[[Lookup], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """run(lookup) of the slots outside of the layers; all `in_layer` calls of a pass happen inside."""

    def in_layer(self, index: int, run: Callable[[Lookup, Tensor], Tensor], total: Tensor) -> Tensor:
        """run(lookup, total) of one layer's slots; total is the residual stream."""

    def matrix(self, product: str) -> Tensor:
        """A product's weights [outputs, inputs], whole; every rank calls it, and lets go of it soon."""


class ResidentHome:
    """A decoder in this process; `trained` are slots of it that are themselves trained."""

    lockstep = False

    def __init__(self, decoder: Decoder, trained: Mapping[str, Trained] | None = None) -> None:
        self.decoder, self._trained = decoder, dict(trained or {})

    @property
    def device(self) -> torch.device:
        """Of the decoder."""
        return self.decoder.arena.device

    @property
    def rotations(self) -> Tensor:
        """The decoder's."""
        return self.decoder.rotations

    def _weight(self, slot: str) -> Weight:
        return self._trained.get(slot) or self.decoder.get_buffer(slot)

    def whole(self, run: Callable[[Lookup], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """run(lookup)."""
        return run(self._weight)

    def in_layer(self, index: int, run: Callable[[Lookup, Tensor], Tensor], total: Tensor) -> Tensor:
        """run(lookup, total)."""
        return run(self._weight, total)

    def matrix(self, product: str) -> Tensor:
        """The weights; unfolded anew where they are quantised."""
        return self.decoder.product(product).matrix()
