"""Jobs on streamed datasets: gone on with exactly, whatever broke them, and ended by the row that is wrong."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from lmesh_trainer import events
from lmesh_trainer.checkpoint import list_checkpoints, load_checkpoint
from lmesh_trainer.events import Outcome
from lmesh_trainer.job import check_job
from lmesh_trainer.job_process import JobProcess
from lmesh_trainer.learner import Learner
from lmesh_trainer.manifest_file import MANIFEST
from lmesh_trainer.messages import Wish
from lmesh_trainer.spec import DatasetSpec, JobSpec, LoraSpec, OptimiserSpec

from tests.training_jobs import After, Heard, run, save_dataset, save_model, spec

ADAPTER, TOLD = "adapter/adapter_model.safetensors", f"adapter/{MANIFEST}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dataset(tmp_path_factory.mktemp("data") / "chats.jsonl")


def streamed(model: Path, rows: Path | str, *, eval_rows: int = 0, held: int = 7, **options: Any) -> JobSpec:
    """Epochs of 5 updates, the last of 4 rows, drawn from 7 rows that are held."""
    told = DatasetSpec(source=str(rows), streaming=True, shuffle_buffer_size=held, max_length=160, eval_rows=eval_rows)
    return spec(model, Path(), dataset=told, **({"max_steps": 13} | options))


async def watch(job: JobSpec, folder: Path, *, kill_after: int = 0, world: int = 1) -> Heard:
    process, heard = JobProcess(folder, world=world), Heard()
    async with asyncio.timeout(240):
        async for event in process.events(job):
            heard(event)
            if isinstance(event, events.StepDone) and event.global_step == kill_after:
                os.kill(process.pid, signal.SIGKILL)
    return heard


def same(one: Path, other: Path, *names: str) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


# Within the first epoch, at its end, at the beginning of the next, and in the middle of the third.
@pytest.mark.parametrize("stop", [2, 5, 6, 12])
def test_a_resumed_job_is_the_unbroken_one(model: Path, dataset: Path, tmp_path: Path, stop: int) -> None:
    job = streamed(model, dataset, lora=LoraSpec(r=4, lora_dropout=0.2))
    whole = run(job, tmp_path / "whole")
    assert whole.ended.outcome is Outcome.COMPLETED, whole.ended
    broken = run(job, tmp_path / "parts", After(stop, Wish.STOP))
    assert broken.ended.outcome is Outcome.STOPPED
    rest = run(job, tmp_path / "parts")
    assert broken.losses + rest.losses == whole.losses
    assert [e.epoch for e in whole.of(events.StepDone)] == [0] * 4 + [1] * 5 + [2] * 4
    assert same(tmp_path / "whole", tmp_path / "parts", ADAPTER, TOLD)


def test_from_the_hub_too(model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    lines = dataset.read_text().splitlines(keepends=True)
    hub = tmp_path / "hub"
    hub.mkdir()
    for shard in range(3):
        (hub / f"train-{shard}.jsonl").write_text("".join(lines[shard * 8 : shard * 8 + 8]))
    job = streamed(model, f"hub:{hub}", eval_rows=2)
    whole = run(job, tmp_path / "whole")
    assert whole.ended.outcome is Outcome.COMPLETED, whole.ended
    broken = run(job, tmp_path / "parts", After(7, Wish.STOP))
    assert broken.losses + run(job, tmp_path / "parts").losses == whole.losses
    assert same(tmp_path / "whole", tmp_path / "parts", ADAPTER, TOLD)


async def test_killed_and_run_again_it_ends_as_if_nothing_had_been(model: Path, dataset: Path, tmp_path: Path) -> None:
    job = streamed(model, dataset, save_steps=3)
    whole = run(job, tmp_path / "whole")
    broken = await watch(job, tmp_path / "parts", kill_after=8)
    assert broken.ended.reason == "JOB_DIED"
    rest = await watch(job, tmp_path / "parts")
    assert rest.ended.outcome is Outcome.COMPLETED
    first = rest.of(events.StepDone)[0].global_step
    assert 4 <= first <= 10 and rest.losses == whole.losses[first - 1 :]
    assert same(tmp_path / "whole", tmp_path / "parts", ADAPTER, TOLD)


async def test_two_ranks_read_the_same_stream(model: Path, dataset: Path, tmp_path: Path) -> None:
    job = streamed(model, dataset, max_steps=7)
    heard = await watch(job, tmp_path / "job", world=2)
    assert heard.ended.outcome is Outcome.COMPLETED
    assert heard.losses == pytest.approx(run(job, tmp_path / "alone").losses, abs=1e-4)


def test_a_bad_row_ends_the_job_with_its_line_and_its_last_checkpoint(model: Path, tmp_path: Path) -> None:
    rows = save_dataset(tmp_path / "chats.jsonl", 400)
    lines = rows.read_text().splitlines(keepends=True)
    silent = json.loads(lines[299])
    silent["messages"][1]["train"] = False
    rows.write_text("".join([*lines[:299], json.dumps(silent) + "\n", *lines[300:]]))
    job = streamed(model, rows, max_steps=100, batch_size=20, micro_tokens=2000, save_steps=4)
    check_job(job, Heard())  # its first rows are well
    heard = run(job, tmp_path / "job")
    assert (heard.ended.outcome, heard.ended.reason) == (Outcome.FAILED, "NOTHING_TO_LEARN")
    assert heard.ended.message.startswith("line 300: ")
    # 299 rows before it, 7 of them held: 14 updates of 20 were made whole.
    assert len(heard.losses) == 14
    newest = list_checkpoints(tmp_path / "job" / "checkpoints")[-1]
    assert newest.name == "step-00000012" and load_checkpoint(newest).progress.step == 12
    again = run(job, tmp_path / "job")
    assert again.losses == heard.losses[12:] and again.ended == heard.ended


def test_a_spoilt_cursor_is_passed_over(model: Path, dataset: Path, tmp_path: Path) -> None:
    job = streamed(model, dataset, save_steps=2)
    whole = run(job, tmp_path / "whole")
    run(job, tmp_path / "parts", After(5, Wish.STOP))
    older, newest = list_checkpoints(tmp_path / "parts" / "checkpoints")
    data = bytearray((newest / "cursor.msgpack").read_bytes())
    data[len(data) // 2] ^= 1
    (newest / "cursor.msgpack").write_bytes(data)
    rest = run(job, tmp_path / "parts")
    assert older.name == "step-00000004" and rest.losses == whole.losses[4:]


def test_another_buffer_is_another_job(model: Path, dataset: Path, tmp_path: Path) -> None:
    run(streamed(model, dataset), tmp_path / "job", After(2, Wish.STOP))
    for other in (streamed(model, dataset, held=8), spec(model, dataset, max_steps=13)):
        assert run(other, tmp_path / "job").ended.reason == "CHECKPOINT_MISMATCH"


def test_evaluation_and_early_stop(model: Path, dataset: Path, tmp_path: Path) -> None:
    wild = OptimiserSpec(learning_rate=0.5, lr_scheduler_type="constant")
    options: dict[str, Any] = {"optimiser": wild, "eval_steps": 1, "early_stop_patience": 3, "max_steps": 50}
    heard = run(streamed(model, dataset, eval_rows=4, **options), tmp_path / "job")
    losses = [found.eval_loss for found in heard.of(events.Evaluated)]
    assert heard.ended.outcome is Outcome.COMPLETED and 4 <= len(losses) < 50
    assert min(losses) == losses[-4] and heard.of(events.DatasetReady)[0].eval_rows == 4


def test_evaluations_and_checkpoints_at_the_ends_of_epochs(model: Path, dataset: Path, tmp_path: Path) -> None:
    heard = run(streamed(model, dataset, eval_rows=4), tmp_path / "job")
    assert [found.global_step for found in heard.of(events.Evaluated)] == [4, 8, 12, 13]
    assert [found.global_step for found in heard.of(events.CheckpointSaved)] == [4, 8, 12, 13]


def test_memory_is_planned_and_rehearsed_for_the_longest_row(
    model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsed: list[int] = []
    real = Learner.rehearse

    def rehearse(learner: Learner, batches: Any) -> None:
        rehearsed.extend(batch.num_tokens for batch in batches)
        real(learner, batches)

    monkeypatch.setattr(Learner, "rehearse", rehearse)
    whole = run(spec(model, dataset, max_steps=1), tmp_path / "whole")
    assert rehearsed.pop() <= 200
    heard = run(streamed(model, dataset, max_steps=1), tmp_path / "job")
    assert rehearsed == [200]  # 160 and a row that fills the microbatch
    assert heard.of(events.PlanMade)[0].lines == whole.of(events.PlanMade)[0].lines  # of as many tokens at once
    long = run(streamed(model, dataset, max_steps=1, micro_tokens=1), tmp_path / "long")
    assert long.of(events.PlanMade)[0].micro_tokens == 160 and rehearsed[-1] == 160


def test_a_dry_run_says_that_it_read_the_first_rows(model: Path, tmp_path: Path) -> None:
    heard = Heard()
    check_job(streamed(model, save_dataset(tmp_path / "chats.jsonl", 400), eval_rows=3, max_steps=9), heard)
    (ready,) = heard.of(events.DatasetReady)
    assert ready.streaming and (ready.rows, ready.eval_rows) == (256, 3)
    assert heard.of(events.PlanMade)[0].steps == 9


def test_the_manifest_says_what_was_read(model: Path, dataset: Path, tmp_path: Path) -> None:
    run(streamed(model, dataset, eval_rows=4), tmp_path / "job")
    told = json.loads((tmp_path / "job" / TOLD).read_text())
    assert len(told["data_digest"]) == 64 and told["job"]["dataset"]["streaming"] is True
    read = told["data_read"]
    assert read["epoch"] == 3 and read["records"] == 3 * 20 + 5 + 7 and read["dropped"] == 0
