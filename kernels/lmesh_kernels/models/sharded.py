"""A decoder whose weights lie in parts on all ranks: torch's FSDP2 under the nodes of the training pass.

Each layer is a unit of `fully_shard`, which gathers its weights before its forward and its backward pass, frees them
after each, and begins the next gather meanwhile. Embedding, last norm and head are the outermost unit: whole from the
beginning of a pass to its end. The nodes add gradients to float32 tensors of a layer's size, which are summed over
ranks when the layer's backward pass ends, into this rank's part of one allocation (docs/decisions/0008).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from lmesh_kernels.models.config import ModelConfig
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.home import Lookup
from lmesh_kernels.models.parameters import Parameters, Precision
from lmesh_kernels.models.row_shard import RowShard
from lmesh_kernels.models.weights import fill
from lmesh_kernels.ops.rope import rope_table
from lmesh_kernels.ops.trained import Trained, Weight
from lmesh_kernels.quant.nf4 import Nf4Tensor


class _Gathered(Trained):
    """A trained weight while it is whole; its gradient begins to exist when the first node adds to it."""

    def __init__(self, value: nn.Parameter) -> None:
        object.__setattr__(self, "value", value)

    @property
    def grad(self) -> Tensor:
        """Float32 of the value's shape; the unit takes it when its backward pass ends."""
        if self.value.grad is None:
            self.value.grad_dtype = torch.float32
            self.value.grad = torch.zeros_like(self.value, dtype=torch.float32)
        return self.value.grad


class _Unit(nn.Module):
    """Slots that are gathered together. A forward pass is whatever is done with them."""

    def __init__(self, slots: Mapping[str, torch.Size], dtype: torch.dtype, *, trained: bool) -> None:
        super().__init__()
        for slot, shape in slots.items():
            values = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(_key(slot), nn.Parameter(values, requires_grad=trained))

    def weight(self, slot: str) -> Weight:
        """What a node reads, while the unit is gathered."""
        found = self.get_parameter(_key(slot))
        return _Gathered(found) if found.requires_grad else found

    def forward(self, run: Callable[..., Any], *inputs: Tensor) -> Any:  # noqa: ANN401 - as `run` has it
        """run(lookup, *inputs)."""
        return run(self.weight, *inputs)


class _Root(_Unit):
    """The slots outside of the layers, and the layers."""

    def __init__(self, decoder: Decoder, dtype: torch.dtype, *, trained: bool) -> None:
        slots = {name: slot.shape for name, slot in decoder.named_buffers() if name != "rotations"}
        super().__init__({n: s for n, s in slots.items() if not n.startswith("layers.")}, dtype, trained=trained)
        units = []
        for index in range(decoder.config.num_layers):
            own = {name: shape for name, shape in slots.items() if name.startswith(f"layers.{index}.")}
            units.append(_Unit(own, dtype, trained=trained))
        self.layers = nn.ModuleList(units)

    def begun(self) -> Lookup:
        """A lookup whose gradients all exist: whether a rank's own batch has any must not tell ranks apart."""
        if torch.is_grad_enabled():
            for parameter in self.parameters(recurse=False):
                if parameter.requires_grad:
                    _ = _Gathered(parameter).grad
        return self.weight


def _key(slot: str) -> str:
    return slot.replace(".", "/")  # a parameter's name has no dots


class ShardedHome:
    """Weights of a decoder over all ranks of the default process group: frozen, or all trained."""

    lockstep = True

    def __init__(self, config: ModelConfig, *, precision: Precision, device: torch.device, trained: bool) -> None:
        """The weights are undefined until `load`. Every rank makes one, with the same arguments.

        ValueError for trained weights in pure bfloat16: their parts of gradients would be summed in it.
        """
        if trained and precision is Precision.BF16_PURE:
            raise ValueError("sharded training sums gradients in the dtype of its masters: take bf16")
        self.decoder = Decoder(config, dtype=precision.dtype, device=torch.device("meta"))
        self.device, self.trained = device, trained
        self.rotations = rope_table(config.rope, config.head_dim, config.max_position_embeddings).to(device)
        self._mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        # Where masters are wider than the pass, they are what is kept, and rounded as they are gathered.
        self._root = _Root(self.decoder, torch.float32 if trained else precision.dtype, trained=trained)
        policy = MixedPrecisionPolicy(
            param_dtype=precision.dtype if trained else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for unit in (*self._units(), self._root):
            fully_shard(unit, mesh=self._mesh, mp_policy=policy)
        self._root.to_empty(device=device)
        for unit in (*self._units(), self._root):
            _settle(cast(FSDPModule, unit))
        self.shards = {slot: self._shard(slot, precision.dtype) for slot in self._slots()}

    def _units(self) -> Iterable[_Unit]:
        return cast("Iterable[_Unit]", self._root.layers)

    def _slots(self) -> list[str]:
        return [name for name, _ in self.decoder.named_buffers() if name != "rotations"]

    def parameter(self, slot: str) -> DTensor:
        """A slot as all ranks hold it."""
        parts = slot.split(".")
        unit = self._root.layers[int(parts[1])] if parts[0] == "layers" else self._root
        return cast(DTensor, unit.get_parameter(_key(slot)))

    @torch.no_grad()
    def _shard(self, slot: str, dtype: torch.dtype) -> RowShard:
        parameter = self.parameter(slot)
        rows = -(-parameter.shape[0] // self._mesh.size())
        first = min(parameter.shape[0], rows * self._mesh.get_local_rank())
        return RowShard(shape=parameter.shape, first=first, local=parameter.to_local(), dtype=dtype)

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, Tensor | Nf4Tensor]]) -> None:
        """Copies this rank's rows of a checkpoint's tensors, one at a time. Raises WeightsError as `bind` does."""
        fill(self.decoder.config, self.shards, tensors)

    def spread(self, slot: str, local: Tensor) -> DTensor:
        """A tensor whose rows lie on ranks as a slot's do."""
        parameter = self.parameter(slot)
        shape, stride = parameter.shape, parameter.stride()
        return DTensor.from_local(local, self._mesh, [Shard(0)], run_check=False, shape=shape, stride=stride)

    def whole(self, run: Callable[[Lookup], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """See `Home`; here the outermost unit's pass."""
        return cast("tuple[Tensor, ...]", self._root(lambda _: run(self._root.begun())))

    def in_layer(self, index: int, run: Callable[[Lookup, Tensor], Tensor], total: Tensor) -> Tensor:
        """See `Home`; here a layer's unit's pass."""
        return cast(Tensor, self._root.layers[index](run, total))

    def forget(self) -> None:
        """Lets go of what is still gathered: after a pass without gradients that is the outermost unit."""
        for unit in (*self._units(), self._root):
            cast(FSDPModule, unit).reshard()

    @torch.no_grad()
    def matrix(self, product: str) -> Tensor:
        """A product's weights, gathered for the caller; every rank calls it."""
        return self.parameter(f"{product}.weight").full_tensor()


def _settle(unit: FSDPModule) -> None:
    """Sums instead of means; and its parts get their last allocation, which masters are views of."""
    unit.set_gradient_divide_factor(1.0)
    unit.set_force_sum_reduction_for_comms(True)
    unit.unshard()
    unit.reshard()


class ShardedParameters(Parameters):
    """The parameters of a home whose weights are trained: of each, this rank's rows and their gradients."""

    def __init__(self, home: ShardedHome) -> None:
        self._home = home
        self._lay_out({slot: shard.local for slot, shard in home.shards.items()}, lambda value: value)
        for item in self:
            # The sums that each backward pass of a unit adds to.
            home.parameter(item.name).grad = home.spread(item.name, item.trained.grad)

    def publish(self) -> None:
        """The next pass gathers the masters as they are now."""
        self._home.forget()

    def reduce(self) -> None:
        """Nothing: every backward pass has done it."""

    def norm(self) -> float:
        """Of all ranks' parts."""
        squares = torch.linalg.vector_norm(self.gradients).square()
        dist.all_reduce(squares)
        return math.sqrt(float(squares))

    @torch.no_grad()
    def gathered(self, name: str, tensor: Tensor) -> Tensor:
        """In the first rank's host memory; an empty tensor elsewhere."""
        whole = self._home.spread(name, tensor).full_tensor()
        return whole.cpu() if dist.get_rank() == 0 else whole.new_empty(0)

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's rows."""
        return self._home.shards[name].part(tensor)[0]
