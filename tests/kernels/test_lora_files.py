"""Adapters on disk beside PEFT, which made the layout: what it writes is read, what is written it reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lmesh_kernels.lora.factors import Factors, content_digest, merged
from lmesh_kernels.lora.peft_config import CONFIG_FILE, AdapterFilesError
from lmesh_kernels.lora.peft_files import WEIGHTS_FILE, read_adapter, write_adapter
from lmesh_kernels.lora.sites import Projection, Site, sites
from lmesh_kernels.models.config import ModelConfig
from lmesh_kernels.models.hf_config import hf_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from tests.tiny_model import save_tiny_llama

IDS = torch.tensor([[256, 72, 101, 108, 108, 111, 33, 10]])
CONFIGS: dict[str, dict[str, Any]] = {
    "attention": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "all linears": {"r": 4, "lora_alpha": 32, "target_modules": "all-linear"},
    "rank 64": {"r": 64, "target_modules": ["down_proj", "o_proj"]},
    "a regular expression": {"r": 4, "target_modules": r".*\.1\.mlp\.(up|gate)_proj"},
    "one layer": {"r": 4, "target_modules": ["k_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "without some": {"r": 4, "target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*0\.self_attn\.k_proj"},
    "rsLoRA": {"r": 16, "use_rslora": True, "target_modules": "all-linear"},
    "DoRA": {"r": 8, "use_dora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 4, "layers.1.mlp.up_proj": 32},
        "alpha_pattern": {"q_proj": 2, "down_proj": 64},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def model(base: Path) -> ModelConfig:
    return hf_config(base)


def trained(base: Path, folder: Path, **config: Any) -> Tensor:
    """An adapter of PEFT's with something in it, saved; the logits that it gives."""
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    with torch.no_grad():
        return wrapped(IDS).logits


def logits_of(base: Path, adapter: dict[Site, Factors]) -> Tensor:
    llama: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for site, factors in adapter.items():
            linear = llama.get_submodule(site.theirs)
            linear.weight.copy_(merged(linear.weight, factors))
        return llama(IDS).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_writes(base: Path, model: ModelConfig, tmp_path: Path, name: str) -> None:
    due = trained(base, tmp_path / "theirs", **CONFIGS[name])
    adapter = read_adapter(tmp_path / "theirs", model)
    torch.testing.assert_close(logits_of(base, adapter), due, rtol=0, atol=1e-4)
    assert (due - logits_of(base, {})).abs().max() > 1e-2  # it does something


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_reads(base: Path, model: ModelConfig, tmp_path: Path, name: str) -> None:
    due = trained(base, tmp_path / "theirs", **CONFIGS[name])
    adapter = read_adapter(tmp_path / "theirs", model)
    write_adapter(tmp_path / "ours", adapter, base=str(base))
    again = read_adapter(tmp_path / "ours", model)
    assert content_digest(again) == content_digest(adapter)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, due, rtol=0, atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_a_digest_is_of_what_is_computed(model: ModelConfig) -> None:
    shape = sites(model)[site := Site(0, Projection.Q)]
    a, b = torch.randn(4, shape.inputs), torch.randn(shape.outputs, 4)
    digest = content_digest({site: Factors(a=a, b=b, scale=2.0)})
    assert digest == content_digest({site: Factors(a=a.clone(), b=b.clone(), scale=2.0)})
    others = (
        {site: Factors(a=a, b=b, scale=1.0)},
        {site: Factors(a=a.bfloat16(), b=b, scale=2.0)},
        {site: Factors(a=a + 1e-6, b=b, scale=2.0)},
        {site: Factors(a=a, b=b, scale=2.0, magnitude=torch.ones(shape.outputs))},
        {Site(1, Projection.Q): Factors(a=a, b=b, scale=2.0)},
    )
    assert len({digest, *map(content_digest, others)}) == 6


def _settings(**changed: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        told = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(told | changed))

    return change


def _tensors(edit: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_FILE)
        edit(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)

    return change


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
FAULTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "no config": ("NO_CONFIG", lambda folder: (folder / CONFIG_FILE).unlink()),
    "no JSON": ("BAD_CONFIG", lambda folder: (folder / CONFIG_FILE).write_text("{")),
    "a list": ("BAD_CONFIG", lambda folder: (folder / CONFIG_FILE).write_text("[]")),
    "rank 0": ("BAD_CONFIG", _settings(r=0)),
    "no rank": ("BAD_CONFIG", _settings(r=None)),
    "a pattern without end": ("BAD_CONFIG", _settings(target_modules=r"(.|\w|[._])*(?<=0)")),
    "a long pattern": ("BAD_CONFIG", _settings(target_modules="a" * 2000)),
    "a broken pattern": ("BAD_CONFIG", _settings(rank_pattern={"(": 4})),
    "another kind": ("UNSUPPORTED_SETTING", _settings(peft_type="IA3")),
    "biases": ("UNSUPPORTED_SETTING", _settings(bias="all")),
    "whole modules": ("UNSUPPORTED_SETTING", _settings(modules_to_save=["lm_head"])),
    "another base": ("UNSUPPORTED_SETTING", _settings(init_lora_weights="pissa_niter_4")),
    "of a later PEFT": ("UNSUPPORTED_SETTING", _settings(use_what_comes_next=True)),
    "no weights": ("NO_WEIGHTS", lambda folder: (folder / WEIGHTS_FILE).unlink()),
    "cut weights": ("NO_WEIGHTS", lambda folder: (folder / WEIGHTS_FILE).write_bytes(b"\x10")),
    "half a site": ("MISSING_TENSORS", _tensors(lambda t: t.pop(B))),
    "no target": ("MISSING_TENSORS", _settings(target_modules=["nothing"])),
    "one target more": ("MISSING_TENSORS", _settings(target_modules=["q_proj", "v_proj", "k_proj"])),
    "one target less": ("UNKNOWN_TENSORS", _settings(target_modules=["q_proj"])),
    "a stranger": ("UNKNOWN_TENSORS", _tensors(lambda t: t.update({"base_model.model.x.lora_A.weight": t[A].clone()}))),
    "a magnitude": (
        "UNKNOWN_TENSORS",
        _tensors(lambda t: t.update({A.replace("lora_A.weight", "lora_magnitude_vector"): t[B][:, 0].clone()})),
    ),
    "another rank": ("SHAPE_MISMATCH", _settings(r=4)),
    "another shape": ("SHAPE_MISMATCH", _tensors(lambda t: t.update({A: t[A][:, 1:]}))),
    "not finite": ("NOT_FINITE", _tensors(lambda t: t[A].fill_(float("nan")))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_named(base: Path, model: ModelConfig, tmp_path: Path, fault: str) -> None:
    trained(base, tmp_path / "a", r=8, target_modules=["q_proj", "v_proj"])
    reason, change = FAULTS[fault]
    change(tmp_path / "a")
    with pytest.raises(AdapterFilesError) as caught:
        read_adapter(tmp_path / "a", model)
    assert caught.value.reason == reason, str(caught.value)


def test_what_is_written_is_whole_or_not_there(model: ModelConfig, tmp_path: Path) -> None:
    shape = sites(model)[site := Site(0, Projection.Q)]
    a, b = torch.randn(4, shape.inputs), torch.randn(shape.outputs, 4)
    plain, dora = Factors(a=a, b=b, scale=1.0), Factors(a=a, b=b, scale=1.0, magnitude=torch.ones(shape.outputs))
    with pytest.raises(ValueError, match="magnitude"):
        write_adapter(tmp_path / "mixed", {site: plain, Site(1, Projection.Q): dora}, base="m")
    with pytest.raises(ValueError, match="sites"):
        write_adapter(tmp_path / "empty", {}, base="m")
    write_adapter(tmp_path / "once", {site: plain}, base="m")
    with pytest.raises(FileExistsError):
        write_adapter(tmp_path / "once", {site: plain}, base="m")
    assert [path.name for path in tmp_path.iterdir()] == ["once"]
    shutil.rmtree(tmp_path / "once")
