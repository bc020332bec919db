"""The memory plan: every line computed from the model's shape before anything is allocated."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from lmesh_kernels.layers.kv_cache import KVCache
from lmesh_kernels.models.config import ModelConfig, Quantisation
from lmesh_kernels.models.footprint import activation_bytes, packed_bytes, parameter_bytes, unfolded_bytes
from lmesh_kernels.ops.linear_tiles import takes_pdl
from lmesh_kernels.platforms.platform import Platform

from lmesh_worker.engine.config import ConfigError, EngineConfig
from lmesh_worker.engine.logit_tables import LogitTables
from lmesh_worker.engine.step_sizes import captured_tokens, step_tokens

log = logging.getLogger(__name__)

# (sequences, tokens) of a step, share of free memory, cap of the KV cache in bytes (0: none) by kind of device. A
# CPU shares its memory with everything else on the machine, so it takes a smaller share and no more than it needs.
_DEFAULTS = {"cpu": (32, 512, 0.4, 4 << 30)}
# Of an accelerator a step's tokens depend on the model (`step_sizes`).
_DEVICE_DEFAULTS = (256, 0, 0.9, 0)
# Tokens of a KV block: on an accelerator as many as attention takes at once, so that it looks each block up once.
_BLOCK = {"cpu": 16}
_BLOCK_DEVICE = 64
# Of all live adapters together: a share of the memory that the engine may use, which the KV cache then does not get.
_ADAPTER_SHARE = {"cpu": 0.05}
_ADAPTER_SHARE_DEVICE = 0.02
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Sizes that an engine is built with, and what each takes in bytes."""

    dtype: torch.dtype
    quantisation: Quantisation
    max_seqs: int
    max_step_tokens: int
    max_model_len: int
    block_size: int
    kv_blocks: int
    max_blocks: int  # of one sequence
    adapter_bytes: int  # of all live adapters
    pack_weights: bool  # hold the weights once more in the device's fastest layout
    lines: dict[str, int]


def plan_memory(config: EngineConfig, model: ModelConfig, platform: Platform) -> MemoryPlan:
    """Cuts the device's memory into weights, activations and KV blocks.

    Raises ConfigError, with the numbers, where they do not fit or one sequence of max_model_len would not.
    """
    seqs, tokens, fraction, cap = _DEFAULTS.get(platform.name, _DEVICE_DEFAULTS)
    dtype = platform.default_dtype() if config.dtype == "auto" else _DTYPES[config.dtype]
    max_tokens = config.max_step_tokens or tokens
    max_tokens = max_tokens or step_tokens(model, config.max_seqs or seqs, fast=takes_pdl(platform.device))
    max_seqs = config.max_seqs or min(seqs, max_tokens)
    if max_seqs > max_tokens:
        raise ConfigError(f"max_seqs {max_seqs} exceeds max_step_tokens {max_tokens}: every sequence needs one token")
    free = platform.memory_free()
    quantisation: Quantisation = "nf4" if "nf4" in (config.quantization, model.quantisation) else "none"
    if quantisation == "nf4" and config.quantization == "none":
        raise ConfigError("quantization none: the checkpoint is NF4; take auto, or the model that it was made of")
    if config.batch_invariant and (platform.name != "cuda" or dtype == torch.float32):
        raise ConfigError(f"batch_invariant needs bfloat16 or float16 on a CUDA device, not {dtype} on {platform.name}")
    weights = parameter_bytes(model, dtype, quantisation)
    activations = activation_bytes(model, max_tokens, max_seqs, dtype, device_type=platform.device.type)
    graphs = 0  # what the largest captured step holds: smaller ones, captured after it, lie in the same place
    if platform.supports_graphs and not config.enforce_eager:
        most = min(max_tokens, captured_tokens(model))
        graphs = activation_bytes(model, most, max_seqs, dtype, device_type=platform.device.type)
    logits = 0 if platform.device.type == "cpu" else max_seqs * model.vocab_size * dtype.itemsize
    tables = LogitTables.planned_bytes(max_seqs, model.vocab_size)
    activations += unfolded_bytes(model, dtype) if quantisation == "nf4" else 0
    block_size = config.block_size or _BLOCK.get(platform.name, _BLOCK_DEVICE)
    block = KVCache.bytes_per_block(model, block_size, dtype)
    budget = int(free * (config.memory_fraction or fraction))
    plain = platform.name == "cpu" and dtype is torch.float32 and quantisation == "none"
    packed = packed_bytes(model, dtype) if plain else 0
    # Speed must not cost a model its place: packed only where half the budget is left for KV blocks.
    packed = packed if weights + packed + activations + tables <= budget // 2 else 0
    adapters = config.max_adapter_bytes or int(budget * _ADAPTER_SHARE.get(platform.name, _ADAPTER_SHARE_DEVICE))
    taken = weights + packed + activations + graphs + logits + tables + adapters
    kv_blocks = _kv_blocks(config, block, budget - taken, cap)
    lines = {
        "free": free,
        "weights": weights,
        "packed_weights": packed,
        "activations": activations,
        "graphs": graphs,
        "logits": logits,
        "logit_tables": tables,
        "adapters": adapters,
        "kv_cache": kv_blocks * block,
        "kv_block": block,
    }
    _check_fit(lines, kv_blocks * block > free - taken)
    max_model_len = _max_model_len(config, model, kv_blocks, block_size, lines)
    log.info("memory plan", extra={"plan_bytes": lines})
    return MemoryPlan(
        dtype=dtype,
        quantisation=quantisation,
        max_seqs=max_seqs,
        max_step_tokens=max_tokens,
        max_model_len=max_model_len,
        block_size=block_size,
        kv_blocks=kv_blocks,
        max_blocks=-(-max_model_len // block_size),
        adapter_bytes=adapters,
        pack_weights=packed > 0,
        lines=lines,
    )


def _kv_blocks(config: EngineConfig, block: int, left: int, cap: int) -> int:
    if config.kv_blocks:
        return config.kv_blocks
    if config.kv_cache_bytes:
        return config.kv_cache_bytes // block
    return max(0, min(left, cap) if cap else left) // block


def _check_fit(lines: dict[str, int], too_much: bool) -> None:
    if lines["kv_cache"] == 0 or too_much:
        told = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in lines.items())
        raise ConfigError(
            f"the model does not fit: {told}. Lower max_seqs, max_step_tokens or kv_cache_bytes, take a smaller "
            "dtype, or give the engine more memory (memory_fraction)"
        )


def _max_model_len(
    config: EngineConfig, model: ModelConfig, kv_blocks: int, block_size: int, lines: dict[str, int]
) -> int:
    held = kv_blocks * block_size
    asked = config.max_model_len
    if asked > model.max_position_embeddings:
        raise ConfigError(f"max_model_len {asked} exceeds the model's {model.max_position_embeddings} positions")
    if asked > held:
        raise ConfigError(
            f"one sequence of max_model_len {asked} needs {-(-asked // block_size)} KV blocks of "
            f"{lines['kv_block']} bytes; the plan has {kv_blocks}"
        )
    if not asked and held < model.max_position_embeddings:
        log.warning(
            "max_model_len is %d, not the model's %d: the KV cache holds no more", held, model.max_position_embeddings
        )
    length = asked or min(held, model.max_position_embeddings)
    if length < 2:
        raise ConfigError(f"max_model_len {length} has no place for a new token beside a prompt; at least 2 is needed")
    return length
