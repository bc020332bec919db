"""A merged model as one GGUF file, f16 or q8_0, written with the gguf package."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, RopeScalingType
from gguf.quants import dequantize, quantize
from lmesh_kernels.models.config import ModelConfig
from lmesh_kernels.models.gguf import LAYER_NAMES, ROPE_DIVISORS, TOP_NAMES
from lmesh_kernels.ops.rope import inverse_frequencies
from lmesh_kernels.text.resolve import ModelFiles
from torch import Tensor

from lmesh_trainer.errors import JobError
from lmesh_trainer.export.gguf_vocabulary import add_vocabulary

_THEIRS = {hf: ours for ours, hf in LAYER_NAMES.items()}
_TOP = {hf: ours for ours, hf in TOP_NAMES.items()}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_BLOCK = 32  # numbers that share a scale in q8_0
_OWN = ("general.architecture", "general.file_type", "general.quantization_version")


class GgufKind(StrEnum):
    """How matrices are stored; vectors always in float32."""

    F16 = "f16"
    Q8_0 = "q8_0"


def write_gguf(
    path: Path, tensors: Iterable[tuple[str, Tensor]], *, files: ModelFiles, config: ModelConfig, kind: GgufKind
) -> None:
    """Writes a new file. `tensors` are float32 under Hugging Face names.

    Raises JobError UNSUPPORTED_TOKENIZER or NOT_SUPPORTED for what llama.cpp could not read as it is meant.
    """
    writer = GGUFWriter(path, config.architecture, use_temp_file=True)
    try:
        if files.format == "gguf":
            _copy_metadata(writer, files.path)
        else:
            _add_metadata(writer, config)
            add_vocabulary(writer, files, rows=config.vocab_size)
        writer.add_file_type(LlamaFileType.MOSTLY_F16 if kind is GgufKind.F16 else LlamaFileType.MOSTLY_Q8_0)
        writer.add_quantization_version(2)
        for name, tensor in tensors:
            _add_tensor(writer, gguf_name(name), _paired(name, tensor, config), kind)
        if divisors := _divisors(config):
            writer.add_tensor(ROPE_DIVISORS, np.asarray(divisors, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor. Raises JobError NOT_SUPPORTED where there is none."""
    match = _LAYER.fullmatch(name)
    if match and match[2] in _THEIRS:
        return f"blk.{match[1]}.{_THEIRS[match[2]]}.{match[3]}"
    if name not in _TOP:
        raise JobError("NOT_SUPPORTED", f"tensor {name} has no name in GGUF")
    return _TOP[name]


def _paired(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """llama files pair neighbouring dimensions of q and k; the others keep halves, as the checkpoints do."""
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
    if config.architecture != "llama" or heads is None:
        return tensor
    halves = tensor.view(heads, 2, -1, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _add_tensor(writer: GGUFWriter, name: str, tensor: Tensor, kind: GgufKind) -> None:
    data = tensor.float().contiguous().numpy()
    if data.ndim == 1:
        writer.add_tensor(name, data)
    elif kind is GgufKind.Q8_0 and data.shape[-1] % _BLOCK == 0:
        packed = quantize(data, GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_shape=packed.shape, raw_dtype=GGMLQuantizationType.Q8_0)
    else:
        if float(np.abs(data).max(initial=0.0)) > np.finfo(np.float16).max:
            raise JobError("NOT_SUPPORTED", f"tensor {name} has values beyond float16: take q8_0")
        writer.add_tensor(name, data.astype(np.float16))


def read_back(tensor: Tensor, kind: GgufKind) -> Tensor:
    """What a matrix in float32 is once it was stored, float32."""
    if kind is GgufKind.F16 or tensor.shape[-1] % _BLOCK:
        return tensor.half().float()
    data = tensor.contiguous().numpy()
    q8_0 = GGMLQuantizationType.Q8_0
    return torch.from_numpy(dequantize(quantize(data, q8_0), q8_0))


def _divisors(config: ModelConfig) -> tuple[float, ...]:
    """llama3's stretch as GGUF has it: what each frequency is divided by."""
    if config.rope.frequency_divisors or config.rope.type != "llama3":
        return config.rope.frequency_divisors
    plain = 1.0 / config.rope.theta ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    return tuple((plain / inverse_frequencies(config.rope, config.head_dim)[0]).tolist())


def _add_metadata(writer: GGUFWriter, config: ModelConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope
    if rope.type in ("linear", "yarn"):
        if rope.type == "yarn" and (rope.attention_factor, rope.mscale, rope.mscale_all_dim) != (None, 0.0, 0.0):
            raise JobError("NOT_SUPPORTED", "this yarn scales attention in a way that GGUF has no key for")
        writer.add_rope_scaling_type(RopeScalingType(rope.type))
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_max_position)


def _copy_metadata(writer: GGUFWriter, source: Path) -> None:
    """Everything that the source says of itself, its vocabulary included, but how its tensors are stored."""
    for name, field in GGUFReader(source).fields.items():
        if name.startswith("GGUF.") or name in _OWN:
            continue
        kind = field.types[0]
        if kind is GGUFValueType.ARRAY:
            writer.add_key_value(name, field.contents(), kind, sub_type=field.types[-1])
        else:
            writer.add_key_value(name, _scalar(field.contents()), kind)


def _scalar(value: Any) -> Any:  # noqa: ANN401 - GGUF values are of many types
    return value.item() if isinstance(value, np.generic) else value
