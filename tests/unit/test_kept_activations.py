"""What a pass keeps for its way back, counted as autograd is given it, against what the memory plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lmesh_kernels.layers.packed_batch import Segment, pack_batch
from lmesh_kernels.layers.recompute import Recompute
from lmesh_kernels.lora.initial import initial_adapter
from lmesh_kernels.lora.peft_config import PeftConfig
from lmesh_kernels.lora.sites import Site, sites
from lmesh_kernels.lora.trainable import TrainableAdapter
from lmesh_kernels.models.config import Quantisation
from lmesh_kernels.models.hf_config import hf_config
from lmesh_kernels.models.parameters import Parameters, Precision
from lmesh_kernels.models.registry import load_model
from lmesh_kernels.models.training import TrainingPass
from lmesh_kernels.ops.dropout import Dropout, dropout_keys
from lmesh_kernels.text.resolve import local_files
from lmesh_trainer.activations import Adapted, kept_bytes
from lmesh_trainer.memory_plan import plan_training
from torch import Tensor

from tests.kernels.tiny_families import Family, save_family

CPU = torch.device("cpu")
LENGTHS = (
    300,
    200,
    12,
)  # more than one block of queries; tokens enough that tensors of a weight's size are small beside
TOKENS = sum(LENGTHS)
WIDE = {"hidden_size": 48, "intermediate_size": 72, "max_position_embeddings": 512}
FAMILIES = {
    "llama": Family("llama", "llama", WIDE),
    "qwen2": Family("qwen2", "qwen2", WIDE),
    "qwen3": Family("qwen3", "qwen3", {**WIDE, "head_dim": 16}),
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"r": 4},
    "wide lora": {"r": 24},
    "lora, dropout": {"r": 4, "rate": 0.1},
    "dora": {"r": 4, "dora": True},
    "dora, dropout": {"r": 4, "dora": True, "rate": 0.1},
}


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(request.param, tmp_path_factory.mktemp("model") / "m")


class Saved:
    """Distinct storages that autograd was given to keep, but for those that were there before."""

    def __init__(self, known: list[Tensor]) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._kept: dict[int, Tensor] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        at = tensor.untyped_storage().data_ptr()
        if at not in self._known:
            self._kept[at] = tensor  # held, so that its place is not given to another
        return tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())


def measured(
    model: Path,
    precision: Precision,
    policy: Recompute,
    *,
    r: int = 0,
    dora: bool = False,
    rate: float = 0.0,
    quantisation: Quantisation = "none",
) -> tuple[int, int]:
    """(bytes kept between the two halves of a pass, those that are planned)."""
    decoder = load_model(local_files(model), dtype=precision.dtype, device=CPU, quantisation=quantisation)
    config = decoder.config
    if r:
        shape = PeftConfig(r=r, alpha=8, target_modules="all-linear", dora=dora)

        def rows_of(site: Site) -> Tensor:
            place = sites(config)[site]
            return decoder.product(place.slot).matrix()[place.start : place.start + place.outputs]

        begun = initial_adapter(shape, config, seed=0, weight=rows_of if dora else None)
        adapter = TrainableAdapter(begun, config, precision=precision, device=CPU)
        parameters, training = adapter.parameters, TrainingPass(decoder, adapters=adapter.products, recompute=policy)
    else:
        slots = {name: slot for name, slot in decoder.named_buffers() if name != "rotations"}
        parameters = Parameters(slots, precision)
        training = TrainingPass(decoder, trained={p.name: p.trained for p in parameters}, recompute=policy)
    segments = [Segment(row=i, ids=[i] * n, weights=[1.0] * n) for i, n in enumerate(LENGTHS)]
    batch = pack_batch(segments, CPU)
    dropout = Dropout(rate=rate, keys=dropout_keys(0, 0, batch.rows, batch.positions)) if rate else None
    saved = Saved([*decoder.buffers(), *(p.trained.value for p in parameters)])
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda kept: kept):
        sums = training.loss(batch, dropout)
    assert sums.loss.requires_grad
    trained = sum(p.trained.value.numel() for p in parameters) if r else 0
    adapted = Adapted(trained=trained, dora=dora, dropout=rate > 0)
    if policy is Recompute.OFFLOAD:  # here there is nowhere to put it, see below
        policy = Recompute.FULL
    return saved.nbytes, TOKENS * kept_bytes(config, precision.dtype, policy, adapted)


@pytest.mark.parametrize("policy", list(Recompute))
@pytest.mark.parametrize("precision", [Precision.FLOAT32, Precision.BF16])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_it_is_planned_and_little_more(
    model: Path, kind: dict[str, Any], precision: Precision, policy: Recompute
) -> None:
    kept, planned = measured(model, precision, policy, **kind)
    assert kept <= planned <= 1.4 * kept


def test_what_makes_a_pass_keep_more_is_planned_for(tmp_path: Path) -> None:
    """The plan would not follow what is kept if it were one number: each of these moves it as it moves the count."""
    plain, normed = (save_family(FAMILIES[name], tmp_path / name) for name in ("llama", "qwen3"))
    first, told = measured(plain, Precision.FLOAT32, Recompute.NONE, r=4)
    for folder, kind in ((normed, {"r": 4}), (plain, {"r": 24}), (plain, {"r": 4, "dora": True})):
        kept, planned = measured(folder, Precision.FLOAT32, Recompute.NONE, **kind)
        assert kept > 1.2 * first and kept > 1.1 * told and planned > 1.2 * told


@pytest.mark.parametrize("policy", list(Recompute))
def test_dora_keeps_the_weights_that_it_unfolds(tmp_path: Path, policy: Recompute) -> None:
    folder = save_family(FAMILIES["llama"], tmp_path / "m")
    dora: dict[str, Any] = {"r": 4, "dora": True}
    dense, _ = measured(folder, Precision.BF16, policy, **dora)
    kept, _ = measured(folder, Precision.BF16, policy, quantisation="nf4", **dora)
    config = hf_config(folder)
    lines = [
        plan_training(
            config,
            precision=Precision.BF16,
            trained=1000,
            frozen=True,
            longest=TOKENS,
            free=1 << 40,
            device_type="cpu",
            recompute=policy,
            quantisation="nf4",
            dora=dora,
        ).lines["unfolded weights"]
        for dora in (False, True)
    ]
    assert kept - dense <= lines[1] - lines[0]
    assert (kept - dense > 0) is (policy in (Recompute.NONE, Recompute.SELECTIVE))


def test_on_a_cpu_there_is_no_other_memory_to_offload_to(tmp_path: Path) -> None:
    config = hf_config(save_family(FAMILIES["llama"], tmp_path / "m"))
    options: dict[str, Any] = {"trained": 1000, "frozen": True, "longest": TOKENS, "free": 1 << 40}
    plans = {
        (device, policy): plan_training(
            config, precision=Precision.BF16, device_type=device, micro_tokens=TOKENS, recompute=policy, **options
        )
        for device in ("cpu", "cuda")
        for policy in (Recompute.FULL, Recompute.OFFLOAD)
    }
    kept = {key: plan.lines["kept activations"] for key, plan in plans.items()}
    assert kept["cpu", Recompute.OFFLOAD] == kept["cpu", Recompute.FULL] > kept["cuda", Recompute.OFFLOAD]
    assert plans["cpu", Recompute.OFFLOAD].recompute is Recompute.OFFLOAD  # as it was asked for
