"""The memory plan of a job, whole and with the model in parts on several ranks: its lines and what it refuses with."""

from __future__ import annotations

from typing import Any

import pytest
from lmesh_kernels.layers.recompute import Recompute
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


def test_a_refusal_has_the_numbers(config: ModelConfig) -> None:
    """What is needed at least, what there is, and every line of it, in MiB, as a plan with room has them."""
    options: dict[str, Any] = {"trained": 40_000_000, "frozen": False, "longest": 3000, "micro_tokens": 3000}
    roomy = plan(config, recompute=Recompute.FULL, **options)
    with pytest.raises(JobError) as caught:
        plan(config, recompute=Recompute.FULL, free=500 << 20, **options)
    said = str(caught.value)
    assert caught.value.reason == "OUT_OF_MEMORY"
    assert f"the job needs {roomy.total / 2**20:,.0f} MiB at least and 450 MiB may be used" in said
    assert "gradient sums 153 MiB" in said and "optimiser 305 MiB" in said  # 4 and 8 bytes of 40 million numbers
    for name, count in roomy.lines.items():
        assert f"{name} {count / 2**20:,.0f} MiB" in said
    assert "the longest row has 3000 tokens" in said and "recompute: full" in said
    assert plan(config, recompute=Recompute.FULL, free=int(roomy.total / 0.9) + 8, **options).lines == roomy.lines


def test_what_does_not_fit_is_recomputed_before_it_is_refused(config: ModelConfig) -> None:
    """The least recomputing that fits; the refusal is of what takes least of all."""
    options: dict[str, Any] = {"longest": 3000, "micro_tokens": 3000, "device_type": "cuda"}
    needs = [plan(config, recompute=policy, **options).total for policy in Recompute]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == len(needs)
    for policy, total in zip(Recompute, needs, strict=True):
        assert plan(config, free=int(total / 0.9) + 8, **options).recompute is policy
    with pytest.raises(JobError, match=f"needs {needs[-1] / 2**20:,.0f} MiB at least"):
        plan(config, free=int(needs[-1] / 0.9) - 8, **options)
