"""Where adapters act: the seven projections of each layer, by the names that PEFT and Hugging Face give them.

A site is a logical projection. In our weights q, k and v are row slices of one matrix, gate and up of another; adapters
are addressed by site, so that the serving bank and the training parameters share one form.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from lmesh_kernels.models.config import ModelConfig


class Projection(StrEnum):
    """A projection of a decoder layer; values are ours, `theirs` the checkpoint's."""

    Q = "q"
    K = "k"
    V = "v"
    O = "o"  # noqa: E741 - the field's name for it
    GATE = "gate"
    UP = "up"
    DOWN = "down"

    @property
    def theirs(self) -> str:
        """Its module in a Hugging Face layer, such as self_attn.q_proj."""
        block = "mlp" if self in (Projection.GATE, Projection.UP, Projection.DOWN) else "self_attn"
        return f"{block}.{self.value}_proj"


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One projection of one layer."""

    layer: int
    projection: Projection

    @property
    def theirs(self) -> str:
        """Its module in a Hugging Face checkpoint, such as model.layers.3.mlp.up_proj."""
        return f"model.layers.{self.layer}.{self.projection.theirs}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteShape:
    """What a site multiplies, and where its output lies: rows start:start+outputs of the slot's weight."""

    slot: str  # of the decoder: "layers.3.attention.qkv"
    start: int
    outputs: int
    inputs: int


def sites(config: ModelConfig) -> dict[Site, SiteShape]:
    """Every site of a model of this config, in the order of the forward pass."""
    hidden, q, kv, wide = config.hidden_size, config.q_size, config.kv_size, config.intermediate_size
    places = (
        (Projection.Q, "attention.qkv", 0, q, hidden),
        (Projection.K, "attention.qkv", q, kv, hidden),
        (Projection.V, "attention.qkv", q + kv, kv, hidden),
        (Projection.O, "attention.out", 0, hidden, q),
        (Projection.GATE, "mlp.gate_up", 0, wide, hidden),
        (Projection.UP, "mlp.gate_up", wide, wide, hidden),
        (Projection.DOWN, "mlp.down", 0, hidden, wide),
    )
    return {
        Site(layer, projection): SiteShape(slot=f"layers.{layer}.{slot}", start=start, outputs=outputs, inputs=inputs)
        for layer in range(config.num_layers)
        for projection, slot, start, outputs, inputs in places
    }
