"""Configs read in both spellings, and what is not computed refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lmesh_kernels.models.config import UnsupportedModelError, load_config
from lmesh_kernels.models.hf_config import config_from_dict
from lmesh_kernels.text.resolve import ModelFiles

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}


def test_defaults_of_each_family() -> None:
    llama, qwen2, qwen3 = (config_from_dict(raw) for raw in (LLAMA, QWEN2, QWEN3))
    assert (llama.num_kv_heads, llama.head_dim, llama.rms_norm_eps) == (4, 16, 1e-6)
    assert (llama.attention_bias, llama.output_bias, llama.qk_norm) == (False, False, False)
    assert (qwen2.attention_bias, qwen2.output_bias, qwen2.mlp_bias) == (True, False, False)
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.attention_bias) == (128, True, False)
    assert llama.rope.theta == 10000.0


def test_old_and_new_rope_spellings_are_one() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
    new = {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}}
    older = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}}
    assert config_from_dict(new) == config_from_dict(old) == config_from_dict(older)
    assert config_from_dict(new).rope.type == "llama3"


def test_yarn_reaches_the_context_it_was_stretched_to() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    assert config_from_dict({**QWEN2, "rope_scaling": yarn}).max_position_embeddings == 8192


@pytest.mark.parametrize(
    ("changes", "reason", "named"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "ARCHITECTURE", "MistralForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "ARCHITECTURE", "LlamaForSequenceClassification"),
        ({"model_type": None, "architectures": None}, "ARCHITECTURE", "None"),
        ({"hidden_act": "gelu"}, "ACTIVATION", "gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "QUANTIZATION", "gptq"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "ROPE", "dynamic"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "ROPE", "longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "ROPE", "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [1]}}, "ROPE", "mrope_section"),
        ({"partial_rotary_factor": 0.5}, "ROPE", "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "LAYER_TYPE", "linear_attention"),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "SLIDING_WINDOW", "64"),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 64,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "SLIDING_WINDOW",
            "64",
        ),
    ],
)
def test_refused_by_name(changes: dict[str, Any], reason: str, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named) as caught:
        config_from_dict({**LLAMA, **changes})
    assert caught.value.reason == f"UNSUPPORTED_{reason}"


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 2048, "max_window_layers": 0},
        {"use_sliding_window": False, "sliding_window": None},
    ],
)
def test_windows_that_hide_nothing_are_fine(changes: dict[str, Any]) -> None:
    assert config_from_dict({**QWEN2, **changes}).num_layers == 2


def test_load_config_from_files(tmp_path: Path) -> None:
    files = ModelFiles(source=str(tmp_path), path=tmp_path, format="hf")
    with pytest.raises(UnsupportedModelError, match=r"config\.json"):
        load_config(files)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    assert load_config(files).architecture == "qwen3"
