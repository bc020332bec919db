"""Jobs from settings to what they publish: how they end, and how they go on."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from lmesh_kernels.lora.peft_files import read_adapter
from lmesh_kernels.models.config import UnsupportedModelError
from lmesh_kernels.models.hf_config import hf_config
from lmesh_kernels.models.training import TrainingPass
from lmesh_kernels.ops.head_loss import LossSums
from lmesh_trainer import checkpoint, events
from lmesh_trainer.checkpoint import list_checkpoints
from lmesh_trainer.events import Outcome
from lmesh_trainer.job import check_job
from lmesh_trainer.messages import Wish
from lmesh_trainer.spec import DatasetSpec, LoraSpec, OptimiserSpec
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.training_jobs import After, Heard, run, save_dataset, save_model, spec


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dataset(tmp_path_factory.mktemp("data") / "chats.jsonl")


def files_equal(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def test_a_job_learns_and_publishes(model: Path, dataset: Path, tmp_path: Path) -> None:
    heard = run(spec(model, dataset), tmp_path / "job")
    assert heard.ended.outcome is Outcome.COMPLETED, heard.ended
    assert heard.losses[-1] < 0.5 * heard.losses[0]
    (ready,) = heard.of(events.DatasetReady)
    assert ready.rows == 24 and any(token.trained for token in ready.preview[0])
    (plan,) = heard.of(events.PlanMade)
    assert plan.steps == 20 and plan.trained_parameters > 0
    last = heard.of(events.StepDone)[-1]
    assert (last.global_step, last.epoch) == (20, 4.0) and last.learning_rate < 1e-3
    (published,) = heard.of(events.Published)
    assert len(published.digest) == 64
    peer = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), published.folder)
    assert len(read_adapter(Path(published.folder), hf_config(model))) == 14
    assert sum("lora_B" in name for name, _ in peer.named_parameters()) == 14


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora": LoraSpec(r=4, lora_dropout=0.2)},
        {"method": "full"},
        {"lora": LoraSpec(use_dora=True)},
        {"precision": "bf16-pure"},
        {"precision": "bf16-pure", "method": "full"},
    ],
    ids=["lora", "dropout", "full", "dora", "bf16-pure", "full bf16-pure"],
)
def test_a_resumed_job_is_the_unbroken_one(model: Path, dataset: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    job = spec(model, dataset, max_steps=9, **options)
    whole = run(job, tmp_path / "whole")
    broken = run(job, tmp_path / "parts", After(4, Wish.STOP))
    assert broken.ended.outcome is Outcome.STOPPED
    rest = run(job, tmp_path / "parts")
    assert broken.losses + rest.losses == whole.losses
    counted = [[step.num_tokens for step in heard.of(events.StepDone)] for heard in (broken, rest, whole)]
    assert counted[0] + counted[1] == counted[2]
    name = "model/model.safetensors" if options.get("method") == "full" else "adapter/adapter_model.safetensors"
    assert files_equal(tmp_path / "whole" / name, tmp_path / "parts" / name)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bf16_alone(model: Path, dataset: Path, tmp_path: Path, method: str) -> None:
    """Values, what the optimiser changes and what it remembers are bfloat16; it learns nearly as float32 does."""
    options: dict[str, Any] = {"method": method, "max_steps": 12}
    if method == "full":
        options["optimiser"] = OptimiserSpec(learning_rate=2e-3)
    heard = run(spec(model, dataset, precision="bf16-pure", **options), tmp_path / "pure")
    wide = run(spec(model, dataset, precision="float32", **options), tmp_path / "wide")
    assert heard.ended.outcome is Outcome.COMPLETED, heard.ended
    assert heard.losses != wide.losses and heard.losses == pytest.approx(wide.losses, rel=0.05)
    assert heard.losses[-1] < 0.9 * heard.losses[0]
    kept = checkpoint.load_checkpoint(list_checkpoints(tmp_path / "pure" / "checkpoints")[-1])
    assert {tensor.dtype for tensor in kept.parameters.values()} == {torch.bfloat16}
    moments = {tensor.dtype for name, tensor in kept.optimiser.items() if not name.endswith("/step")}
    assert moments == {torch.bfloat16}
    # It has neither masters nor wide moments: what the plan says of it is less, and by what.
    lines = [job.of(events.PlanMade)[0].lines for job in (heard, wide)]
    assert [2 * lines[0][name] for name in ("weights", "optimiser")] == pytest.approx(
        [lines[1][name] for name in ("weights", "optimiser")], rel=0.2
    )


def test_a_full_model_is_one_that_transformers_loads(model: Path, dataset: Path, tmp_path: Path) -> None:
    job = spec(model, dataset, method="full", optimiser=OptimiserSpec(learning_rate=2e-3), max_steps=6)
    heard = run(job, tmp_path / "job")
    (published,) = heard.of(events.Published)
    peer = AutoModelForCausalLM.from_pretrained(published.folder, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([[97, 98, 99, 100]])
    assert not torch.allclose(peer(ids).logits, base(ids).logits, atol=1e-3)
    assert heard.losses[-1] < heard.losses[0]


def test_cancelled(model: Path, dataset: Path, tmp_path: Path) -> None:
    heard = run(spec(model, dataset), tmp_path / "job", After(3, Wish.CANCEL))
    assert heard.ended.outcome is Outcome.CANCELLED
    assert not heard.of(events.Published) and not list_checkpoints(tmp_path / "job" / "checkpoints")


def test_a_corrupt_checkpoint_is_passed_over(
    model: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = spec(model, dataset, max_steps=8, save_steps=2)
    whole = run(job, tmp_path / "whole")
    run(job, tmp_path / "parts", After(5, Wish.STOP))
    older, newest = list_checkpoints(tmp_path / "parts" / "checkpoints")
    data = bytearray((newest / "parameters.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "parameters.safetensors").write_bytes(data)
    rest = run(job, tmp_path / "parts")
    assert rest.ended.outcome is Outcome.COMPLETED
    assert rest.losses == whole.losses[int(older.name.removeprefix("step-")) :]
    assert f"{newest.name}/parameters.safetensors is not what was written" in caplog.text


def test_corrupt_checkpoints_alone_end_the_job(model: Path, dataset: Path, tmp_path: Path) -> None:
    job = spec(model, dataset)
    run(job, tmp_path / "job", After(2, Wish.STOP))
    (only,) = list_checkpoints(tmp_path / "job" / "checkpoints")
    (only / "optimiser.safetensors").write_bytes(b"")
    ended = run(job, tmp_path / "job").ended
    assert (ended.outcome, ended.reason) == (Outcome.FAILED, "CORRUPT_CHECKPOINT")
    assert "optimiser.safetensors" in ended.message


def test_a_checkpoint_of_another_job(model: Path, dataset: Path, tmp_path: Path) -> None:
    run(spec(model, dataset), tmp_path / "job", After(2, Wish.STOP))
    assert run(spec(model, dataset, seed=1), tmp_path / "job").ended.reason == "CHECKPOINT_MISMATCH"


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(
    model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = checkpoint.save_file, []

    def full(*args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    ended = run(spec(model, dataset, save_steps=3), tmp_path / "job").ended
    assert (ended.outcome, ended.reason) == (Outcome.FAILED, "DISK_FULL")
    (left,) = list_checkpoints(tmp_path / "job" / "checkpoints")
    assert left.name == "step-00000003" and checkpoint.load_checkpoint(left).progress.step == 3
    assert not list((tmp_path / "job" / "checkpoints").glob(".draft-*"))


class Poison:
    """Makes the loss of some steps NaN."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
        self.step = 0
        real = TrainingPass.loss

        def loss(training: TrainingPass, *args: Any) -> LossSums:
            sums = real(training, *args)
            self.step += 1
            # The first is the rehearsal.
            return LossSums(sums.loss * float("nan"), sums.correct) if self.step - 2 in steps else sums

        monkeypatch.setattr(TrainingPass, "loss", loss)


def test_a_loss_that_is_not_finite_changes_nothing(
    model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = spec(model, dataset, batch_size=2, max_steps=6)
    Poison(monkeypatch, {3})
    heard = run(job, tmp_path / "job")
    steps = heard.of(events.StepDone)
    assert heard.ended.outcome is Outcome.COMPLETED
    assert [step.applied for step in steps] == [True] * 3 + [False] + [True] * 2
    (kept,) = (tmp_path / "job" / "not-finite").iterdir()
    assert len(json.loads(kept.read_text())) == 2


def test_three_in_a_row_end_the_job_with_its_checkpoint(
    model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Poison(monkeypatch, {4, 5, 6})
    heard = run(spec(model, dataset, batch_size=2, save_steps=2), tmp_path / "job")
    assert (heard.ended.outcome, heard.ended.reason) == (Outcome.FAILED, "NON_FINITE_LOSS")
    newest = list_checkpoints(tmp_path / "job" / "checkpoints")[-1]
    assert newest.name == "step-00000004" and checkpoint.load_checkpoint(newest).progress.step == 4


def test_evaluation_and_early_stop(model: Path, dataset: Path, tmp_path: Path) -> None:
    rows = DatasetSpec(source=str(dataset), eval_rows=4)
    wild = OptimiserSpec(learning_rate=0.5, lr_scheduler_type="constant")
    job = spec(model, dataset, dataset=rows, optimiser=wild, eval_steps=1, early_stop_patience=3, max_steps=50)
    heard = run(job, tmp_path / "job")
    losses = [found.eval_loss for found in heard.of(events.Evaluated)]
    assert heard.ended.outcome is Outcome.COMPLETED and 4 <= len(losses) < 50
    assert min(losses) == losses[-4] and heard.of(events.DatasetReady)[0].eval_rows == 4
    best = list_checkpoints(tmp_path / "job" / "checkpoints")[0]
    found = read_adapter(tmp_path / "job" / "adapter", hf_config(model))
    kept = checkpoint.load_checkpoint(best).parameters
    for site, factors in found.items():
        assert torch.equal(factors.b, kept[f"{site.theirs}.b"])


def test_going_on_from_an_adapter(model: Path, dataset: Path, tmp_path: Path) -> None:
    first = run(spec(model, dataset), tmp_path / "first")
    start = LoraSpec(start=str(tmp_path / "first" / "adapter"))
    gentle = OptimiserSpec(learning_rate=1e-4)
    second = run(spec(model, dataset, lora=start, optimiser=gentle, max_steps=2), tmp_path / "second")
    assert second.losses[0] < 1.5 * first.losses[-1]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model": "/nowhere/at/all"}, "MODEL_NOT_FOUND"),
        ({"dataset": DatasetSpec(source="/nowhere.jsonl")}, "NO_DATASET"),
        ({"lora": LoraSpec(target_modules=("c_attn",))}, "BAD_ADAPTER"),
        ({"lora": LoraSpec(start="/nowhere")}, "BAD_ADAPTER"),
        ({"optimiser": OptimiserSpec(optim="adamw_8bit")}, "OPTIMISER_UNAVAILABLE"),
        ({"micro_tokens": 2_000_000_000}, "OUT_OF_MEMORY"),
    ],
)
def test_refusals(model: Path, dataset: Path, tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    job = msgspec.structs.replace(spec(model, dataset), **options)
    ended = run(job, tmp_path / "job").ended
    assert (ended.outcome, ended.reason) == (Outcome.FAILED, reason), ended
    assert not (tmp_path / "job" / "adapter").exists()


def test_a_model_that_is_not_computed_here(model: Path, dataset: Path, tmp_path: Path) -> None:
    """Said by its name and before its weights are read, by the job and by its dry run."""
    told = json.loads((model / "config.json").read_text())
    shutil.copytree(model, tmp_path / "model")
    strange = told | {"model_type": "gemma3", "architectures": ["Gemma3ForCausalLM"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(strange))
    (tmp_path / "model" / "model.safetensors").unlink()
    job = spec(tmp_path / "model", dataset)
    ended = run(job, tmp_path / "job").ended
    assert (ended.outcome, ended.reason) == (Outcome.FAILED, "UNSUPPORTED_ARCHITECTURE"), ended
    assert "gemma3" in ended.message and "Qwen3ForCausalLM" in ended.message
    with pytest.raises(UnsupportedModelError) as caught:
        check_job(job, Heard())
    assert (caught.value.reason, str(caught.value)) == (ended.reason, ended.message)


def test_a_dry_run_writes_nothing(model: Path, dataset: Path) -> None:
    heard = Heard()
    check_job(spec(model, dataset), heard)
    assert heard.of(events.DatasetReady) and heard.of(events.PlanMade)
    assert not heard.of(events.StepDone)
