"""Random weights: every slot is filled on the device, nothing is read, and no real base has their digest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lmesh_kernels.layers.norm import RMSNorm
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.models.dummy import STD, fill_dummy
from lmesh_kernels.models.registry import load_model
from lmesh_kernels.models.safetensors_folder import WeightsError
from lmesh_kernels.text.digests import base_digest, dummy_digest
from lmesh_kernels.text.resolve import ModelFiles, local_files

from tests.kernels.paged_runner import CPU

SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


def folder(path: Path, **changes: object) -> ModelFiles:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(SHAPE | changes))
    return local_files(path)


def dummy(files: ModelFiles, **options: object) -> Decoder:
    return load_model(files, dtype=torch.float32, device=CPU, load_format="dummy", **options)  # type: ignore[arg-type]


def test_every_slot_is_filled(tmp_path: Path) -> None:
    decoder = dummy(folder(tmp_path / "m"))
    decoder.arena.fill_(torch.nan)
    fill_dummy(decoder)
    norms = {f"{name}.weight" for name, module in decoder.named_modules() if isinstance(module, RMSNorm)}
    for name, slot in decoder.named_buffers():
        if name == "rotations":
            continue
        if name in norms:
            assert (slot == 1).all(), name
        else:
            assert 0.8 * STD < slot.std() < 1.2 * STD and abs(slot.mean()) < STD / 2, name


def test_a_seed_gives_the_same_weights(tmp_path: Path) -> None:
    files = folder(tmp_path / "m")
    first, second = dummy(files), dummy(files)
    assert torch.equal(first.arena, second.arena)
    fill_dummy(second, seed=1)
    assert not torch.equal(first.arena, second.arena)


def test_quantised_products_are_filled(tmp_path: Path) -> None:
    decoder = dummy(folder(tmp_path / "m"), quantisation="nf4")
    for layer in range(2):
        for name in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down"):
            product = decoder.product(f"layers.{layer}.{name}")
            dense = product.matrix()
            assert dense.shape == (product.outputs, product.inputs)
            assert 0.8 * STD < dense.std() < 1.2 * STD


def test_without_weights_only_dummy_loads(tmp_path: Path) -> None:
    files = folder(tmp_path / "m")
    with pytest.raises(WeightsError, match="load_format dummy") as caught:
        load_model(files, dtype=torch.float32, device=CPU)
    assert caught.value.reason == "NO_SAFETENSORS"


def test_a_gguf_file_is_no_folder(tmp_path: Path) -> None:
    files = ModelFiles(source="m", path=tmp_path / "m.gguf", format="gguf")
    with pytest.raises(WeightsError, match=r"m\.gguf") as caught:
        dummy(files)
    assert caught.value.reason == "DUMMY_OF_GGUF"


def test_the_digest_reads_the_config_alone(tmp_path: Path) -> None:
    here, there = folder(tmp_path / "a"), folder(tmp_path / "b", vocab_size=513)
    digest = dummy_digest(here)
    assert digest.startswith("dummy-") and digest != base_digest(here)
    (here.path / "model.safetensors").write_bytes(b"weights")
    (here.path / "model.safetensors").chmod(0)
    assert dummy_digest(here) == digest != dummy_digest(there)
    assert dummy_digest(here, nf4=True) == f"{digest}+nf4"
