"""Training with the model in parts on two processes: the job of one process, with half of its weights on each."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lmesh_chassis.artifacts.store import FolderStore
from lmesh_kernels.text.resolve import local_files
from lmesh_trainer import events
from lmesh_trainer.errors import JobError
from lmesh_trainer.export.exporter import ExportKind, export
from lmesh_trainer.job import check_job
from lmesh_trainer.sources import Bench
from lmesh_trainer.spec import DatasetSpec, JobSpec, LoraSpec, OptimiserSpec
from safetensors.torch import load_file

from tests import sharded_rank
from tests.ranked_jobs import run_ranked, run_ranks
from tests.training_jobs import Heard, run, save_dataset, save_model, spec

COURSE = {"lr_scheduler_type": "cosine", "warmup_steps": 4, "weight_decay": 0.1, "max_grad_norm": 1.0}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"lora": LoraSpec(lora_dropout=0.1), "recompute": "full"},
    "dora": {"lora": LoraSpec(use_dora=True)},
    "full": {"method": "full", "recompute": "selective"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dataset(tmp_path_factory.mktemp("data") / "chats.jsonl")


def job(model: Path, dataset: Path, **options: Any) -> JobSpec:
    told = OptimiserSpec(learning_rate=1e-3, **COURSE)
    rows = DatasetSpec(source=str(dataset), eval_rows=3)
    return spec(model, dataset, **({"dataset": rows, "optimiser": told} | options))


def published(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = [*folder.glob("adapter/adapter_model.safetensors"), *folder.glob("model/model.safetensors")]
    return load_file(file)


def test_it_learns_as_one_process_does(model: Path, dataset: Path, tmp_path: Path) -> None:
    jobs = {kind: job(model, dataset, parallelism="fsdp", **options) for kind, options in KINDS.items()}
    first, second = run_ranked(tmp_path / "both", jobs)
    for kind, options in KINDS.items():
        alone = run(job(model, dataset, **options), tmp_path / "alone" / kind)
        assert first[kind].outcome == "completed" and len(first[kind].losses) == 20
        assert first[kind].losses == pytest.approx(alone.losses, abs=1e-4), kind
        assert first[kind].losses == second[kind].losses
        assert first[kind].tokens == [step.num_tokens for step in alone.of(events.StepDone)]
        assert alone.losses[-1] < alone.losses[0]
        tensors, others = published(tmp_path / "alone" / kind), published(tmp_path / "both" / kind)
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert torch.allclose(tensor, others[name], atol=1e-4), (kind, name)
        assert not list((tmp_path / "both").glob(f"{kind}.1/checkpoints"))


def test_bf16_with_float32_masters(model: Path, dataset: Path, tmp_path: Path) -> None:
    kinds = {"lora": {}, "full": {"method": "full"}}
    jobs = {k: job(model, dataset, parallelism="fsdp", precision="bf16", **o) for k, o in kinds.items()}
    first, _ = run_ranked(tmp_path / "both", jobs)
    for kind, options in kinds.items():
        alone = run(job(model, dataset, precision="bf16", **options), tmp_path / "alone" / kind)
        # A sum of losses of around 5 in bfloat16, whose halves are added in another order.
        assert first[kind].losses == pytest.approx(alone.losses, abs=3e-2), (kind, first[kind])
        (dtype,) = {tensor.dtype for tensor in published(tmp_path / "both" / kind).values()}
        assert dtype == (torch.bfloat16 if kind == "full" else torch.float32)


def test_a_base_in_a_gguf_file(model: Path, dataset: Path, tmp_path: Path) -> None:
    """Each rank takes its own rows of what the file's matrices unfold to."""
    path = tmp_path / "tiny.gguf"
    export(local_files(model), {}, path, ExportKind.GGUF_F16)
    kinds: dict[str, dict[str, Any]] = {"lora": {}, "full": {"method": "full"}}
    jobs = {k: job(path, dataset, parallelism="fsdp", max_steps=6, **options) for k, options in kinds.items()}
    first, _ = run_ranked(tmp_path / "both", jobs)
    for kind, options in kinds.items():
        alone = run(job(path, dataset, max_steps=6, **options), tmp_path / "alone" / kind)
        assert first[kind].outcome == alone.ended.outcome == "completed", (first[kind], alone.ended)
        assert first[kind].losses == pytest.approx(alone.losses, abs=1e-4), kind
        tensors, others = published(tmp_path / "alone" / kind), published(tmp_path / "both" / kind)
        assert tensors.keys() == others.keys()
        assert all(torch.allclose(tensor, others[name], atol=1e-4) for name, tensor in tensors.items())


def test_it_goes_on_from_its_checkpoint_and_as_one_process_too(model: Path, dataset: Path, tmp_path: Path) -> None:
    jobs = {kind: job(model, dataset, max_steps=9, parallelism="fsdp", **KINDS[kind]) for kind in ("lora", "full")}
    unbroken, _ = run_ranked(tmp_path / "whole", jobs)
    begun, _ = run_ranked(tmp_path / "parts", jobs, stop_after=4)
    assert {ranked.outcome for ranked in begun.values()} == {"stopped"}
    for kind in jobs:
        shutil.copytree(tmp_path / "parts" / kind, tmp_path / "alone" / kind)
        alone = run(job(model, dataset, max_steps=9, **KINDS[kind]), tmp_path / "alone" / kind)
        assert begun[kind].losses + alone.losses == pytest.approx(unbroken[kind].losses, abs=1e-4)
    rest, _ = run_ranked(tmp_path / "parts", jobs)
    for kind in jobs:
        assert begun[kind].losses + rest[kind].losses == unbroken[kind].losses
        whole, parts = published(tmp_path / "whole" / kind), published(tmp_path / "parts" / kind)
        assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_gradients_are_those_of_one_process_and_half_of_the_weights_is_here(
    model: Path, dataset: Path, tmp_path: Path
) -> None:
    jobs = {
        kind: job(model, dataset, micro_tokens=90, **{**KINDS[kind], "lora": LoraSpec(use_dora=kind == "dora")})
        for kind in KINDS
    }
    sharded_rank.write(jobs, tmp_path, "fsdp")
    run_ranks(sharded_rank.__file__, tmp_path)
    ranks = [torch.load(tmp_path / f"measured.{rank}") for rank in (0, 1)]
    for kind, told in jobs.items():
        alone, found = sharded_rank.measure(told), [measured[kind] for measured in ranks]
        parts = 2 if kind == "full" else 1  # adapters are whole everywhere
        sharded_rank.assert_same_gradients(alone, found[0], kind)
        for measured in found:
            assert measured["norm"] == pytest.approx(alone["norm"], rel=1e-5)
            # Uneven rows are cut a row apart. Of layers, no more than one is gathered at a time.
            assert measured["held"] == pytest.approx(alone["held"] / 2, rel=0.02)
            assert measured["summed"] == pytest.approx(alone["summed"] / parts, rel=0.02)
            assert measured["moments"] == pytest.approx(alone["moments"] / parts, rel=0.02)
            assert 0 < measured["gathered_at_once"] <= measured["one_layer"] and measured["passes"] > 2
            assert measured["gathered_after"] == 0


def test_a_dry_run_counts_the_parts_that_there_will_be(model: Path, dataset: Path, tmp_path: Path) -> None:
    """As a trainer of two processes a node asks for it, in a process alone."""
    bench = Bench(store=FolderStore(tmp_path), jobs=tmp_path, device="cpu", threads=1, world=2)
    (tmp_path / "rows").mkdir()
    rows = f"artifact:{bench.store.put(io.BytesIO(dataset.read_bytes()))}/{dataset.name}"
    told = {"model": str(model), "dataset": {"source": rows}, "method": "full", "precision": "float32"}
    plans = []
    for options in ({}, {"parallelism": "fsdp"}, {"parallelism": "fsdp", "nodes": 2}):
        heard = Heard()
        check_job(bench.prepare(told | options, tmp_path / "rows"), heard)
        plans += [plan.lines for plan in heard.of(events.PlanMade)]
    whole, two, four = plans
    assert "gathered weights and gradients" in two and "gathered weights and gradients" not in whole
    for line in ("gradient sums", "optimiser"):
        assert [two[line] / whole[line], four[line] / whole[line]] == pytest.approx([0.5, 0.25], rel=1e-3)


class TestRefusals:
    def test_of_the_settings(self, model: Path, dataset: Path) -> None:
        with pytest.raises(ValueError, match="parallelism ddp"):
            job(model, dataset, parallelism="fsdp", load_in_4bit=True)

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"method": "full", "precision": "bf16-pure"}, "precision bf16-pure"),
            ({"method": "full", "optimiser": OptimiserSpec(optim="adamw_8bit")}, "optim adamw_8bit"),
            ({"lora": LoraSpec(modules_to_save=("embed_tokens",))}, "modules_to_save and added tokens"),
            ({"lora": LoraSpec(modules_to_save=("lm_head",))}, "modules_to_save and added tokens"),
            ({"add_tokens": ("surely",)}, "modules_to_save and added tokens"),
            ({"add_special_tokens": ("please",)}, "modules_to_save and added tokens"),
        ],
        ids=str,
    )
    def test_what_cannot_be_sharded(
        self, model: Path, dataset: Path, tmp_path: Path, options: dict[str, Any], said: str
    ) -> None:
        ended = run(job(model, dataset, parallelism="fsdp", **options), tmp_path / "job").ended
        assert ended.reason == "NOT_SUPPORTED" and "parallelism fsdp" in ended.message and said in ended.message

    def test_a_checkpoint_that_is_stored_quantised(self, model: Path, dataset: Path, tmp_path: Path) -> None:
        """The settings do not tell: its config does, to a run and to a dry run, before anything is loaded."""
        shutil.copytree(model, tmp_path / "model")
        told = json.loads((tmp_path / "model" / "config.json").read_text())
        stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        (tmp_path / "model" / "config.json").write_text(json.dumps(told | {"quantization_config": stored}))
        sharded = job(tmp_path / "model", dataset, parallelism="fsdp")
        ended = run(sharded, tmp_path / "job").ended
        assert ended.reason == "NOT_SUPPORTED"
        assert "parallelism fsdp" in ended.message and "quantised" in ended.message and "take ddp" in ended.message
        with pytest.raises(JobError) as caught:
            check_job(sharded, Heard())
        assert (caught.value.reason, str(caught.value)) == (ended.reason, ended.message)
