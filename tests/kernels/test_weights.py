"""Every tensor binds and every slot is filled, or loading fails naming what did not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lmesh_kernels.models.config import ModelConfig
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.safetensors_folder import WeightsError, read_safetensors, safetensors_files
from lmesh_kernels.models.weights import bind, bindings
from safetensors.torch import save_file

from tests.kernels.paged_runner import CPU


def config(**changes: object) -> ModelConfig:
    fields = {
        "architecture": "llama",
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "head_dim": 4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 16,
        **changes,
    }
    return ModelConfig(**fields)  # type: ignore[arg-type]


def checkpoint(shape: ModelConfig) -> dict[str, torch.Tensor]:
    """Random tensors that fit `shape`."""
    slots = dict(Decoder(shape, dtype=torch.float32, device=torch.device("meta")).named_buffers())
    return {
        name: torch.randn(place.rows, *slots[place.slot].shape[1:])
        for name, place in bindings(shape).items()
        if not place.duplicate
    }


def decoder(shape: ModelConfig) -> Decoder:
    return Decoder(shape, dtype=torch.float32, device=CPU)


FULL = config(attention_bias=True, output_bias=True, mlp_bias=True, qk_norm=True)


def test_parts_land_in_their_rows() -> None:
    target, tensors = decoder(FULL), checkpoint(FULL)
    target.arena.fill_(torch.nan)
    bind(target, tensors.items())
    attention, mlp = target.get_submodule("layers.1.attention"), target.get_submodule("layers.1.mlp")
    prefix = "model.layers.1"
    for leaf in ("weight", "bias"):
        qkv = [tensors[f"{prefix}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
        assert torch.equal(getattr(attention.qkv, leaf), torch.cat(qkv))
        gate_up = [tensors[f"{prefix}.mlp.{part}_proj.{leaf}"] for part in ("gate", "up")]
        assert torch.equal(getattr(mlp.gate_up, leaf), torch.cat(gate_up))
    assert torch.equal(attention.k_norm.weight, tensors[f"{prefix}.self_attn.k_norm.weight"])
    assert all(slot.isfinite().all() for slot in target.buffers())


def test_unknown_tensors_are_named() -> None:
    extra = {
        "model.layers.0.self_attn.q_proj.lora_A": torch.zeros(1),
        "model.layers.2.mlp.up_proj.weight": torch.zeros(1),
    }
    with pytest.raises(WeightsError, match=r"layers\.0\.self_attn\.q_proj\.lora_A.*layers\.2\.mlp\.up_proj") as caught:
        bind(decoder(FULL), {**checkpoint(FULL), **extra}.items())
    assert caught.value.reason == "UNKNOWN_TENSORS"


def test_a_bias_without_a_slot_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"q_proj\.bias"):
        bind(decoder(config(output_bias=True, mlp_bias=True, qk_norm=True)), checkpoint(FULL).items())


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.k_proj.bias"])
def test_missing_tensors_are_named(name: str) -> None:
    tensors = checkpoint(FULL)
    del tensors[name]
    with pytest.raises(WeightsError, match=name) as caught:
        bind(decoder(FULL), tensors.items())
    assert caught.value.reason == "MISSING_TENSORS"


def test_wrong_shapes_are_named() -> None:
    tensors = checkpoint(FULL)
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(8, 11)
    with pytest.raises(WeightsError, match=r"down_proj\.weight has shape \(8, 11\), not \(8, 12\)"):
        bind(decoder(FULL), tensors.items())


def test_a_tensor_that_comes_twice_is_refused() -> None:
    tensors = checkpoint(FULL)
    twice = [*tensors.items(), ("model.norm.weight", tensors["model.norm.weight"])]
    with pytest.raises(WeightsError, match=r"model\.norm\.weight is in the checkpoint twice"):
        bind(decoder(FULL), twice)


def test_rotary_buffers_of_old_checkpoints_are_ignored() -> None:
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2), "model.rotary_emb.inv_freq": torch.zeros(2)}
    bind(decoder(FULL), {**checkpoint(FULL), **old}.items())


def test_a_tied_head_may_come_again_but_not_differ() -> None:
    tied = config(tie_word_embeddings=True)
    tensors = checkpoint(tied)
    assert "lm_head.weight" not in tensors
    # The head may come before the embedding it repeats.
    bind(decoder(tied), {"lm_head.weight": tensors["model.embed_tokens.weight"].clone(), **tensors}.items())
    with pytest.raises(WeightsError, match="lm_head") as caught:
        bind(decoder(tied), {**tensors, "lm_head.weight": torch.zeros(10, 8)}.items())
    assert caught.value.reason == "UNTIED_HEAD"


def test_weights_are_cast_to_the_decoders_dtype() -> None:
    target = Decoder(FULL, dtype=torch.bfloat16, device=CPU)
    tensors = checkpoint(FULL)
    bind(target, tensors.items())
    assert torch.equal(target.embedding.weight, tensors["model.embed_tokens.weight"].bfloat16())


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no model\.safetensors"):
        safetensors_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    )
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    with pytest.raises(WeightsError, match=r"model-2\.safetensors"):
        safetensors_files(tmp_path)
    save_file({"b": torch.zeros(3)}, tmp_path / "model-2.safetensors")
    assert {name: t.tolist() for name, t in read_safetensors(tmp_path)} == {"a": [1, 1], "b": [0, 0, 0]}
