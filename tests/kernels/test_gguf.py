"""GGUF files: metadata to config, dequantised tensors to slots, and the packaged real model against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from lmesh_kernels.models.config import UnsupportedModelError, load_config
from lmesh_kernels.models.gguf import LAYER_NAMES, TOP_NAMES
from lmesh_kernels.models.gguf_file import GgufFile
from lmesh_kernels.models.registry import load_model
from lmesh_kernels.models.safetensors_folder import WeightsError, read_safetensors
from lmesh_kernels.text.resolve import ModelFiles, resolve

from tests.kernels.paged_runner import CPU, PagedRunner
from tests.kernels.tiny_families import Family, load_peer, peer_logits, save_family

# Rows of 32 or more, so that block quantisation applies.
WIDE = {"hidden_size": 64, "intermediate_size": 96}
FAMILIES = (
    Family("llama", "llama", {**WIDE, "tie_word_embeddings": True}),
    Family("llama-untied-bias", "llama", {**WIDE, "attention_bias": True}),
    Family("qwen2", "qwen2", {**WIDE, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}),
    Family("qwen3", "qwen3", {**WIDE, "head_dim": 24}),
)
BY_NAME = {family.name: family for family in FAMILIES}


def pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama files store them: dimension i beside i + d/2."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    folder: Path, files: ModelFiles, kind: gguf.GGMLQuantizationType, extra: dict[str, np.ndarray] | None = None
) -> ModelFiles:
    """The folder's checkpoint as a GGUF file, matrices stored as `kind`."""
    config = load_config(files)
    path = folder / f"{kind.name}.gguf"
    writer = gguf.GGUFWriter(path, config.architecture)
    write_metadata(writer, config)
    for name, tensor in read_safetensors(files.path):
        values = tensor.numpy().copy()
        part = name.split(".")[-2]
        if config.architecture == "llama" and part in ("q_proj", "k_proj"):
            values = pairs(values, config.num_heads if part == "q_proj" else config.num_kv_heads)
        stored = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else kind
        writer.add_tensor(gguf_name(name), quantize(values, stored), raw_dtype=stored)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelFiles(source=str(path), path=path, format="gguf")


def write_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_token_list([f"token {i}" for i in range(config.vocab_size)])
    writer.add_token_scores([0.5] * config.vocab_size)
    if config.rope.type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope.factor)


def gguf_name(name: str) -> str:
    layer_names = {ours: theirs for theirs, ours in LAYER_NAMES.items()}
    top_names = {ours: theirs for theirs, ours in TOP_NAMES.items()}
    if name in top_names:
        return top_names[name]
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    part, leaf = rest.rsplit(".", 1)
    return f"blk.{layer}.{layer_names[part]}.{leaf}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFiles]:
    torch.set_num_threads(2)
    folders = {name: save_family(family, tmp_path_factory.mktemp(name)) for name, family in BY_NAME.items()}
    return {name: ModelFiles(source=str(path), path=path, format="hf") for name, path in folders.items()}


def logits_of(files: ModelFiles) -> torch.Tensor:
    decoder = load_model(files, dtype=torch.float32, device=CPU)
    return PagedRunner(decoder).full([list(range(3, 60, 2))])[0]


@pytest.mark.parametrize("name", BY_NAME)
def test_float_files_are_the_same_model(saved: dict[str, ModelFiles], name: str, tmp_path: Path) -> None:
    stored = write_gguf(tmp_path, saved[name], gguf.GGMLQuantizationType.F32)
    ours, theirs = load_config(stored), load_config(saved[name])
    for field in ("num_heads", "num_kv_heads", "head_dim", "tie_word_embeddings", "qk_norm", "vocab_size"):
        assert getattr(ours, field) == getattr(theirs, field)
    assert (ours.rope.type, ours.rope.theta, ours.rope.factor) == (
        theirs.rope.type,
        theirs.rope.theta,
        theirs.rope.factor,
    )
    expected = logits_of(saved[name])
    # Metadata floats (eps, theta) are float32 in a GGUF file: the last place may differ.
    assert (logits_of(stored) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_matrices_unfold_to_what_gguf_says(saved: dict[str, ModelFiles], kind: str, tmp_path: Path) -> None:
    quantisation = gguf.GGMLQuantizationType[kind]
    stored = write_gguf(tmp_path, saved["qwen3"], quantisation)
    weights = dict(read_safetensors(saved["qwen3"].path))
    for name in ("model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"):
        tensor = GgufFile(stored.path).tensors[gguf_name(name)]
        expected = dequantize(quantize(weights[name].numpy(), quantisation), quantisation)
        assert np.array_equal(tensor.floats(), expected.astype(np.float32))
        assert tensor.shape == tuple(weights[name].shape)
    assert logits_of(stored).isfinite().all()


def test_rope_divisors_are_used(saved: dict[str, ModelFiles], tmp_path: Path) -> None:
    divisors = np.linspace(1, 8, 8, dtype=np.float32)
    stored = write_gguf(tmp_path, saved["llama"], gguf.GGMLQuantizationType.F32, {"rope_freqs.weight": divisors})
    assert load_config(stored).rope.frequency_divisors == tuple(divisors.tolist())
    expected = logits_of(saved["llama"])
    assert (logits_of(stored) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_unknown_tensors_are_named(saved: dict[str, ModelFiles], tmp_path: Path) -> None:
    extra = {"blk.0.attn_sinks.weight": np.ones(4, dtype=np.float32)}
    stored = write_gguf(tmp_path, saved["qwen3"], gguf.GGMLQuantizationType.F32, extra)
    with pytest.raises(WeightsError, match=r"blk\.0\.attn_sinks\.weight"):
        load_model(stored, dtype=torch.float32, device=CPU)


def test_other_architectures_and_broken_files_are_refused(saved: dict[str, ModelFiles], tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="gemma3"):
        load_config(ModelFiles(source=str(path), path=path, format="gguf"))
    whole = write_gguf(tmp_path, saved["qwen3"], gguf.GGMLQuantizationType.F16)
    data = whole.path.read_bytes()
    for size in (20, 300, len(data) // 2):
        whole.path.write_bytes(data[:size])
        with pytest.raises(UnsupportedModelError, match=r"cut short|past the end"):
            load_config(whole)
    whole.path.write_bytes(b"not a model" + data)
    with pytest.raises(UnsupportedModelError, match="not a GGUF file"):
        load_config(whole)


def test_the_packaged_model_equals_transformers() -> None:
    from transformers import GgufConfig

    torch.set_num_threads(2)
    files = resolve("packaged:smollm2-135m-instruct")
    sequences = [[1, 4093, 198, 504, 3575, 282, 4649, 314, *range(1000, 1040)], [17, 3], [2]]
    options = {"gguf_file": files.path.name, "quantization_config": GgufConfig(dequantize=True)}
    expected = peer_logits(load_peer(files.path.parent, **options), sequences)
    runner = PagedRunner(load_model(files, dtype=torch.float32, device=CPU), block_size=16, num_blocks=32)
    for actual in (runner.full(sequences), PagedRunner(runner.decoder).in_chunks(sequences, (16, 1, 5))):
        for ours, theirs in zip(actual, expected, strict=True):
            assert theirs.std() >= 1.0
            assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
