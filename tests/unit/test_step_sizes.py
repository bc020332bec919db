"""Steps by a model's size: how many tokens one takes, up to how many it is captured."""

from __future__ import annotations

import pytest
from lmesh_kernels.models.config import ModelConfig
from lmesh_worker.engine.step_sizes import captured_tokens, step_tokens


def config(layers: int, hidden: int, inner: int, heads: int, kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
    )


@pytest.mark.parametrize(
    ("model", "step", "captured"),
    [
        (config(28, 1024, 3072, 16, 8, 128), 16384, 4096),  # Qwen3-0.6B
        (config(16, 2048, 8192, 32, 8, 64), 16384, 3700),  # Llama-3.2-1B
        (config(32, 4096, 14336, 32, 8, 128), 8192, 1031),  # Llama-3.1-8B
        (config(80, 8192, 28672, 64, 8, 128), 8192, 1024),  # Llama-3.1-70B
    ],
)
def test_smaller_models_take_longer_steps_and_larger_graphs(model: ModelConfig, step: int, captured: int) -> None:
    assert step_tokens(model, 256, fast=True) == step + 256
    assert step_tokens(model, 256, fast=False) == 8192 + 256
    assert captured_tokens(model) == pytest.approx(captured, rel=0.01)
