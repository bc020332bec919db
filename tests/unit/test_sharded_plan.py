"""The memory plan of a job whose model lies in parts on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
from lmesh_kernels.models.config import ModelConfig
from lmesh_kernels.models.footprint import parameter_bytes
from lmesh_kernels.models.hf_config import hf_config
from lmesh_kernels.models.parameters import Precision
from lmesh_trainer.errors import JobError
from lmesh_trainer.memory_plan import TrainingPlan, plan_training

from tests.tiny_model import save_tiny_llama

PRECISIONS = [Precision.FLOAT32, Precision.BF16]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return hf_config(save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny"))


def plan(config: ModelConfig, **options: Any) -> TrainingPlan:
    defaults: dict[str, Any] = {
        "precision": Precision.FLOAT32,
        "trained": 1_000_000,
        "frozen": True,
        "longest": 100,
        "free": 1 << 40,
        "device_type": "cpu",
    }
    return plan_training(config, **(defaults | options))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_frozen_model_in_parts_and_an_adapter_whole(config: ModelConfig, precision: Precision) -> None:
    whole, parts = (plan(config, precision=precision, shards=n).lines for n in (1, 4))
    assert parts["weights"] == -(-whole["weights"] // 4)
    for line in ("trained values and masters", "gradient sums", "optimiser", "kept activations"):
        assert parts[line] == whole[line]
    gathered = parts["gathered weights and gradients"]
    # Embedding and head, and two layers: no more than the model, which has two.
    assert 0 < gathered <= parameter_bytes(config, precision.dtype)
    assert "gathered weights and gradients" not in whole


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_under_training_is_in_parts_with_all_that_belongs_to_it(
    config: ModelConfig, precision: Precision
) -> None:
    whole, parts = (plan(config, precision=precision, frozen=False, shards=n).lines for n in (1, 4))
    for line in ("gradient sums", "optimiser", "trained values and masters"):
        assert parts[line] == whole[line] / 4
    if precision is Precision.BF16:
        assert parts["weights"] == 0  # the masters are all there is
    frozen = plan(config, precision=precision, shards=4).lines["gathered weights and gradients"]
    assert parts["gathered weights and gradients"] > frozen


def test_what_does_not_fit_whole_fits_in_parts(config: ModelConfig) -> None:
    trained = 1_000_000_000
    with pytest.raises(JobError, match="at least and"):
        plan(config, trained=trained, frozen=False, free=10 << 30)
    assert plan(config, trained=trained, frozen=False, free=10 << 30, shards=8).total < 10 << 30
