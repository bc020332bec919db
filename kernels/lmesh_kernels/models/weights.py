"""Checkpoint tensors into a decoder's slots: every tensor binds and every slot is filled, or loading fails by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lmesh_kernels.layers.linear import Linear
from lmesh_kernels.models.config import ModelConfig, Quantisation
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.row_shard import RowShard
from lmesh_kernels.models.safetensors_folder import StoredTensor, WeightsError, some
from lmesh_kernels.models.staged_reads import StagedReads
from lmesh_kernels.quant.nf4 import Nf4Tensor, dequantise
from lmesh_kernels.quant.nf4_matrix import Nf4Matrix

Slot = Tensor | Nf4Matrix | RowShard
Weight = Tensor | Nf4Tensor | StoredTensor

# Buffers that older checkpoints saved and the config determines.
IGNORABLE = re.compile(r"^model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$")


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


def bind(decoder: Decoder, tensors: Iterable[tuple[str, Weight]], reads: StagedReads | None = None) -> None:
    """Copy named tensors into the decoder's slots, one at a time, cast to its dtype, or quantised where it is.

    Stored tensors need `reads`, which must have ended before the slots are read.
    Raises WeightsError naming tensors that have no slot, a wrong shape or come twice, and slots left unfilled.
    """
    fill(decoder.config, _slots(decoder), tensors, reads)


def fill(
    config: ModelConfig,
    slots: Mapping[str, Slot],
    tensors: Iterable[tuple[str, Weight]],
    reads: StagedReads | None = None,
) -> None:
    """As `bind`, into slots that lie elsewhere than in a decoder."""
    table = bindings(config)
    seen: set[str] = set()
    copies: list[tuple[str, Weight]] = []
    unknown: list[str] = []
    for name, tensor in tensors:
        if IGNORABLE.match(name):
            continue
        if name not in table:
            unknown.append(name)
        elif table[name].duplicate:
            copies.append((name, tensor))
        else:
            _copy(name, tensor, table[name], slots, seen, config.quantisation, reads)
    if unknown:
        raise WeightsError("UNKNOWN_TENSORS", f"tensors without a slot: {some(unknown)}")
    missing = [name for name, place in table.items() if not place.duplicate and name not in seen]
    if missing:
        raise WeightsError("MISSING_TENSORS", f"tensors the checkpoint lacks: {some(missing)}")
    for name, tensor in copies:
        target = slots[table[name].slot]
        assert not isinstance(target, Nf4Matrix)  # quantised are the layers' products, and those are never tied
        _check_copy(name, tensor, target, reads)


def _slots(decoder: Decoder) -> dict[str, Slot]:
    slots: dict[str, Slot] = dict(decoder.named_buffers())
    for name, module in decoder.named_modules():
        if isinstance(module, Linear) and module.quantised is not None:
            slots[f"{name}.weight"] = module.quantised
    return slots


def _copy(
    name: str,
    tensor: Weight,
    place: Binding,
    slots: Mapping[str, Slot],
    seen: set[str],
    stored: Quantisation,
    reads: StagedReads | None,
) -> None:
    if name in seen:
        raise WeightsError("DUPLICATE_TENSOR", f"tensor {name} is in the checkpoint twice")
    slot = slots[place.slot]
    _check_shape(name, tensor, (place.rows, *slot.shape[1:]))
    if isinstance(slot, Nf4Matrix):
        # What a quantised checkpoint left in its dtype stays so: an adapter was trained on it as it is.
        slot.put(place.start, _read_now(tensor, slot.device, reads), keep=stored == "nf4")
    elif isinstance(tensor, Nf4Tensor):
        _put(slot, place, dequantise(tensor, slot.dtype))
    elif isinstance(tensor, StoredTensor):
        assert reads is not None
        assert isinstance(slot, Tensor)  # sharded slots are filled from mapped files
        reads.read(tensor, slot[place.start : place.start + place.rows])
    else:
        _put(slot, place, tensor)
    seen.add(name)


def _put(slot: Tensor | RowShard, place: Binding, tensor: Tensor) -> None:
    if isinstance(slot, RowShard):
        slot.put(place.start, tensor)
    else:
        slot[place.start : place.start + place.rows].copy_(tensor)


def _read_now(tensor: Weight, device: torch.device, reads: StagedReads | None) -> Tensor | Nf4Tensor:
    """A stored tensor as one on `device`, in its own dtype; any other as it is."""
    if not isinstance(tensor, StoredTensor):
        return tensor
    assert reads is not None
    there = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    reads.read(tensor, there)
    reads.wait()
    return there


def _check_shape(name: str, tensor: Weight, due: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != due:
        shapes = f"{tuple(tensor.shape)}, not {due}"
        raise WeightsError("SHAPE_MISMATCH", f"tensor {name} has shape {shapes} as the config says")


def _check_copy(name: str, tensor: Weight, target: Tensor | RowShard, reads: StagedReads | None) -> None:
    """A tied checkpoint may carry its head again; a different one would be silently lost."""
    _check_shape(name, tensor, tuple(target.shape))
    if reads is not None:
        reads.wait()  # for the embedding itself
    read = tensor if isinstance(target, RowShard) else _read_now(tensor, target.device, reads)
    if isinstance(read, Nf4Tensor | StoredTensor) or not _same(read, target):
        raise WeightsError("UNTIED_HEAD", f"{name} differs from the embedding, but tie_word_embeddings is set")


def _same(tensor: Tensor, target: Tensor | RowShard) -> bool:
    if isinstance(target, RowShard):
        return target.holds(tensor)
    return torch.equal(tensor.to(target.dtype), target.to(tensor.device))
