"""Checkpoint tensors into a decoder's slots: every tensor binds and every slot is filled, or loading fails by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lmesh_kernels.layers.linear import Linear
from lmesh_kernels.models.config import ModelConfig, Quantisation
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.row_shard import RowShard
from lmesh_kernels.quant.bitsandbytes_tensors import QuantisedTensorError, owner, read_nf4
from lmesh_kernels.quant.nf4 import Nf4Tensor, dequantise
from lmesh_kernels.quant.nf4_matrix import Nf4Matrix

Slot = Tensor | Nf4Matrix | RowShard

# Buffers that older checkpoints saved and the config determines.
IGNORABLE = re.compile(r"^model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$")


class WeightsError(ValueError):
    """A checkpoint and a decoder that do not fit; `reason` is UPPER_SNAKE, the message names the tensors."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """Where a checkpoint tensor goes: rows start:start+rows of a slot, or only a copy of what is there."""

    slot: str
    start: int = 0
    rows: int
    duplicate: bool = False  # must equal what another tensor put there


def bindings(config: ModelConfig) -> dict[str, Binding]:
    """Every Hugging Face tensor name of this config's checkpoint, and its place."""
    table = {
        "model.embed_tokens.weight": Binding(slot="embedding.weight", rows=config.vocab_size),
        "model.norm.weight": Binding(slot="norm.weight", rows=config.hidden_size),
        "lm_head.weight": Binding(slot="head.weight", rows=config.vocab_size),
    }
    if config.tie_word_embeddings:
        table["lm_head.weight"] = Binding(slot="embedding.weight", rows=config.vocab_size, duplicate=True)
    for layer in range(config.num_layers):
        table |= _layer_bindings(config, layer)
    return table


def _layer_bindings(config: ModelConfig, layer: int) -> dict[str, Binding]:
    hf, ours = f"model.layers.{layer}", f"layers.{layer}"
    hidden, q, kv, wide = config.hidden_size, config.q_size, config.kv_size, config.intermediate_size
    table = {
        f"{hf}.input_layernorm.weight": Binding(slot=f"{ours}.attention_norm.weight", rows=hidden),
        f"{hf}.post_attention_layernorm.weight": Binding(slot=f"{ours}.mlp_norm.weight", rows=hidden),
    }
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            slot = f"{ours}.attention.{name}.weight"
            table[f"{hf}.self_attn.{name}.weight"] = Binding(slot=slot, rows=config.head_dim)
    projections = (
        ("self_attn.q_proj", "attention.qkv", 0, q, config.attention_bias),
        ("self_attn.k_proj", "attention.qkv", q, kv, config.attention_bias),
        ("self_attn.v_proj", "attention.qkv", q + kv, kv, config.attention_bias),
        ("self_attn.o_proj", "attention.out", 0, hidden, config.output_bias),
        ("mlp.gate_proj", "mlp.gate_up", 0, wide, config.mlp_bias),
        ("mlp.up_proj", "mlp.gate_up", wide, wide, config.mlp_bias),
        ("mlp.down_proj", "mlp.down", 0, hidden, config.mlp_bias),
    )
    for theirs, slot, start, rows, has_bias in projections:
        for leaf in ("weight", "bias") if has_bias else ("weight",):
            table[f"{hf}.{theirs}.{leaf}"] = Binding(slot=f"{ours}.{slot}.{leaf}", start=start, rows=rows)
    return table


def bind(decoder: Decoder, tensors: Iterable[tuple[str, Tensor | Nf4Tensor]]) -> None:
    """Copy named tensors into the decoder's slots, one at a time, cast to its dtype, or quantised where it is.

    Raises WeightsError naming tensors that have no slot, a wrong shape or come twice, and slots left unfilled.
    """
    fill(decoder.config, _slots(decoder), tensors)


def fill(config: ModelConfig, slots: Mapping[str, Slot], tensors: Iterable[tuple[str, Tensor | Nf4Tensor]]) -> None:
    """As `bind`, into slots that lie elsewhere than in a decoder."""
    table = bindings(config)
    seen: set[str] = set()
    copies: list[tuple[str, Tensor | Nf4Tensor]] = []
    unknown: list[str] = []
    for name, tensor in tensors:
        if IGNORABLE.match(name):
            continue
        if name not in table:
            unknown.append(name)
        elif table[name].duplicate:
            copies.append((name, tensor))
        else:
            _copy(name, tensor, table[name], slots, seen, config.quantisation)
    if unknown:
        raise WeightsError("UNKNOWN_TENSORS", f"tensors without a slot: {_some(unknown)}")
    missing = [name for name, place in table.items() if not place.duplicate and name not in seen]
    if missing:
        raise WeightsError("MISSING_TENSORS", f"tensors the checkpoint lacks: {_some(missing)}")
    for name, tensor in copies:
        target = slots[table[name].slot]
        assert not isinstance(target, Nf4Matrix)  # quantised are the layers' products, and those are never tied
        _check_copy(name, tensor, target)


def _slots(decoder: Decoder) -> dict[str, Slot]:
    slots: dict[str, Slot] = dict(decoder.named_buffers())
    for name, module in decoder.named_modules():
        if isinstance(module, Linear) and module.quantised is not None:
            slots[f"{name}.weight"] = module.quantised
    return slots


def _copy(
    name: str,
    tensor: Tensor | Nf4Tensor,
    place: Binding,
    slots: Mapping[str, Slot],
    seen: set[str],
    stored: Quantisation,
) -> None:
    if name in seen:
        raise WeightsError("DUPLICATE_TENSOR", f"tensor {name} is in the checkpoint twice")
    slot = slots[place.slot]
    _check_shape(name, tensor, (place.rows, *slot.shape[1:]))
    if isinstance(slot, Nf4Matrix):
        # What a quantised checkpoint left in its dtype stays so: an adapter was trained on it as it is.
        slot.put(place.start, tensor, keep=stored == "nf4")
    elif isinstance(tensor, Nf4Tensor):
        _put(slot, place, dequantise(tensor, slot.dtype))
    else:
        _put(slot, place, tensor)
    seen.add(name)


def _put(slot: Tensor | RowShard, place: Binding, tensor: Tensor) -> None:
    if isinstance(slot, RowShard):
        slot.put(place.start, tensor)
    else:
        slot[place.start : place.start + place.rows].copy_(tensor)


def _check_shape(name: str, tensor: Tensor | Nf4Tensor, due: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != due:
        shapes = f"{tuple(tensor.shape)}, not {due}"
        raise WeightsError("SHAPE_MISMATCH", f"tensor {name} has shape {shapes} as the config says")


def _check_copy(name: str, tensor: Tensor | Nf4Tensor, target: Tensor | RowShard) -> None:
    """A tied checkpoint may carry its head again; a different one would be silently lost."""
    _check_shape(name, tensor, tuple(target.shape))
    if isinstance(tensor, Nf4Tensor) or not _same(tensor, target):
        raise WeightsError("UNTIED_HEAD", f"{name} differs from the embedding, but tie_word_embeddings is set")


def _same(tensor: Tensor, target: Tensor | RowShard) -> bool:
    if isinstance(target, RowShard):
        return target.holds(tensor)
    return torch.equal(tensor.to(target.dtype), target.to(tensor.device))


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(sorted(names)[:8]) + rest


def safetensors_files(folder: Path) -> list[Path]:
    """The checkpoint's files: those of its index, or the single one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise WeightsError("MISSING_SHARDS", f"{folder} lacks {_some(absent)}, named by its index")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if not single.is_file():
        raise WeightsError("NO_SAFETENSORS", f"{folder} has no model.safetensors nor an index of shards")
    return [single]


def read_safetensors(folder: Path) -> Iterator[tuple[str, Tensor | Nf4Tensor]]:
    """Name and tensor of all shards; tensors are views into the mapped file, read as they are copied.

    What bitsandbytes packed comes as one NF4 tensor. Raises WeightsError, also with the reasons of `read_nf4`.
    """
    for path in safetensors_files(folder):
        with safe_open(path, framework="pt") as shard:
            beside: dict[str, list[str]] = {}
            for part in shard.keys():  # noqa: SIM118 - a safetensors file is no mapping
                if (name := owner(part)) is not None:
                    beside.setdefault(name, []).append(part)
            for name in shard.keys():  # noqa: SIM118
                if name in beside:
                    yield name, _packed(name, {part: shard.get_tensor(part) for part in (name, *beside[name])})
                elif owner(name) is None:
                    yield name, shard.get_tensor(name)


def _packed(name: str, parts: dict[str, Tensor]) -> Nf4Tensor:
    try:
        return read_nf4(name, parts)
    except QuantisedTensorError as error:
        raise WeightsError(error.reason, str(error)) from error
