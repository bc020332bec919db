"""A model as a Hugging Face folder: safetensors in shards, config, tokenizer and template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lmesh_kernels.models.config import ModelConfig
from lmesh_kernels.models.hf_config import ARCHITECTURES
from lmesh_kernels.text.added_tokens import NO_TOKENS, AddedTokens
from lmesh_kernels.text.digests import model_digest
from lmesh_kernels.text.resolve import ModelFiles, local_files
from lmesh_kernels.text.tokenizer import load_tokenizer, raw_tokenizer
from safetensors.torch import save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from lmesh_trainer.errors import JobError
from lmesh_trainer.export.added_vocabulary import write_added

SHARD_BYTES = 4 << 30
_COPIED = (".json", ".jinja", ".txt", ".model")


def write_model(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    config: ModelConfig,
    dtype: torch.dtype,
    files: ModelFiles,
    added: AddedTokens = NO_TOKENS,
) -> str:
    """Writes a model to a new folder, whole or not at all.

    `tensors` are all of it, of `dtype` and under Hugging Face names; `files` are those that the base was loaded from,
    `added` what the vocabulary has beyond theirs. Returns the model digest, which workers that serve it announce.
    """
    draft = folder.with_name(f".{folder.name}-draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    write_folder(draft, tensors, files=files, config=config, dtype=dtype, added=added)
    draft.replace(folder)
    return model_digest(local_files(folder))


def check_folder(files: ModelFiles, config: ModelConfig) -> None:
    """Raises JobError NOT_SUPPORTED for a model that `write_folder` could not describe, before anything is made."""
    if files.format == "gguf":
        _config(config)


def write_folder(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    files: ModelFiles,
    config: ModelConfig,
    dtype: torch.dtype,
    added: AddedTokens = NO_TOKENS,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes all of it below a folder that exists; no more than one shard is in memory.

    `tensors` are dense, under Hugging Face names; `files` the base's, `added` what its vocabulary is given.
    """
    _write_shards(folder, tensors, shard_bytes)
    named = str(dtype).removeprefix("torch.")
    if files.format == "gguf":
        _describe_gguf(folder, files, config, named, added)
        return
    for path in files.path.iterdir():
        if path.is_file() and path.suffix in _COPIED and ".index." not in path.name:
            shutil.copyfile(path, folder / path.name)
    told = json.loads((folder / "config.json").read_text())
    for gone in ("torch_dtype", "quantization_config"):
        told.pop(gone, None)
    _write_json(folder / "config.json", told | {"dtype": named, "vocab_size": config.vocab_size})
    if added:
        write_added(folder, files, added)


def _write_json(path: Path, told: dict[str, Any]) -> None:
    path.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """One file, or several and their index."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(held, folder / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        held[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "shard-0.safetensors").rename(folder / "model.safetensors")
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for number, name in enumerate(names):
        (folder / f"shard-{number}.safetensors").rename(folder / name)
    places = {tensor: names[number] for number, shard in enumerate(shards) for tensor in shard}
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def _describe_gguf(folder: Path, files: ModelFiles, config: ModelConfig, dtype: str, added: AddedTokens) -> None:
    """Config and tokenizer of a folder whose source was one GGUF file."""
    tokenizer = load_tokenizer(files)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids)}
    _write_json(folder / "config.json", _config(config) | ids | {"dtype": dtype})
    _write_json(folder / "generation_config.json", ids)
    raw = raw_tokenizer(files, added)
    if adds_bos := tokenizer.encode("a", add_special_tokens=True)[0] == tokenizer.bos_id:
        # transformers does it by the file alone, whatever the config says.
        bos = tokenizer.special_tokens["bos_token"]
        raw.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_id)])
    raw.save(str(folder / "tokenizer.json"))
    told: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens}
    told |= {"add_bos_token": adds_bos, "model_max_length": config.max_position_embeddings}
    _write_json(folder / "tokenizer_config.json", told)
    if tokenizer.chat_template is not None:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def _config(config: ModelConfig) -> dict[str, Any]:
    """config.json's object of a config that a GGUF file gave. Raises JobError for a stretch that it cannot name."""
    rope = config.rope
    parameters: dict[str, Any] = {"rope_type": rope.type, "rope_theta": rope.theta}
    if rope.frequency_divisors:
        hint = "the GGUF file holds its rotation's stretch as numbers: take the original model in safetensors instead"
        raise JobError("NOT_SUPPORTED", hint)
    if rope.type != "default":
        parameters |= {"factor": rope.factor, "original_max_position_embeddings": rope.original_max_position}
    biases: dict[str, Any] = {"attention_bias": config.attention_bias} if config.architecture != "qwen2" else {}
    if config.architecture == "llama":
        biases["mlp_bias"] = config.mlp_bias
    return {
        "model_type": config.architecture,
        "architectures": [ARCHITECTURES[config.architecture]],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": parameters,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        **biases,
    }
