"""A job in a process of its own, seen by its server: killed, stopped, in two ranks, and without a server."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from lmesh_trainer import events
from lmesh_trainer.checkpoint import list_checkpoints, load_checkpoint
from lmesh_trainer.events import Outcome
from lmesh_trainer.job_process import JobProcess
from lmesh_trainer.loop import MOST_SKIPPED
from lmesh_trainer.messages import Wish
from lmesh_trainer.spec import JobSpec, OptimiserSpec

from tests.training_jobs import Heard, run, save_dataset, save_model, spec

When = Callable[[JobProcess, events.Event], None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dataset(tmp_path_factory.mktemp("data") / "chats.jsonl")


async def watch(job: JobSpec, folder: Path, when: When = lambda process, event: None, world: int = 1) -> Heard:
    process, heard = JobProcess(folder, world=world), Heard()
    async with asyncio.timeout(240):
        async for event in process.events(job):
            heard(event)
            when(process, event)
    return heard


async def test_killed_and_run_again_it_ends_as_if_nothing_had_been(model: Path, dataset: Path, tmp_path: Path) -> None:
    job = spec(model, dataset, max_steps=12, save_steps=3)
    whole = run(job, tmp_path / "whole")

    def kill(process: JobProcess, event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.global_step == 8:
            os.kill(process.pid, signal.SIGKILL)

    broken = await watch(job, tmp_path / "parts", kill)
    assert (broken.ended.outcome, broken.ended.reason) == (Outcome.FAILED, "JOB_DIED")
    rest = await watch(job, tmp_path / "parts")
    assert rest.ended.outcome is Outcome.COMPLETED
    first = rest.of(events.StepDone)[0].global_step
    assert 4 <= first <= 10 and rest.losses == whole.losses[first - 1 :]
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(("wish", "outcome"), [(Wish.STOP, Outcome.STOPPED), (Wish.CANCEL, Outcome.CANCELLED)])
async def test_asked(model: Path, dataset: Path, tmp_path: Path, wish: Wish, outcome: Outcome) -> None:
    def ask(process: JobProcess, event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.global_step == 2:
            process.ask(wish)

    heard = await watch(spec(model, dataset, max_steps=100_000, save_steps=100_000), tmp_path / "job", ask)
    assert heard.ended.outcome is outcome
    saved = [event.global_step for event in heard.of(events.CheckpointSaved)]
    assert saved == ([len(heard.losses)] if wish is Wish.STOP else [])


async def test_two_ranks(model: Path, dataset: Path, tmp_path: Path) -> None:
    job = spec(model, dataset, max_steps=4)
    heard = await watch(job, tmp_path / "job", world=2)
    assert heard.ended.outcome is Outcome.COMPLETED
    assert heard.losses == pytest.approx(run(job, tmp_path / "alone").losses, abs=1e-4)


async def test_a_course_that_blows_up(model: Path, dataset: Path, tmp_path: Path) -> None:
    """Nothing is planted here: the rate is one that no parameter survives."""
    told = OptimiserSpec(learning_rate=1e38, lr_scheduler_type="constant", warmup_steps=2)
    heard = await watch(spec(model, dataset, max_steps=20, save_steps=1, optimiser=told), tmp_path / "job")
    assert (heard.ended.outcome, heard.ended.reason) == (Outcome.FAILED, "NON_FINITE_LOSS")
    steps, saved = heard.of(events.StepDone), heard.of(events.CheckpointSaved)
    assert [step.applied for step in steps[-MOST_SKIPPED:]] == [False] * MOST_SKIPPED
    applied = [step.global_step for step in steps if step.applied]
    assert [event.global_step for event in saved] == applied  # never one of an update that was skipped
    newest = list_checkpoints(tmp_path / "job" / "checkpoints")[-1]
    assert load_checkpoint(newest).progress.step == applied[-1]


async def test_what_cannot_be_is_said(model: Path, tmp_path: Path) -> None:
    job = spec(model, tmp_path / "none.jsonl")
    heard = await watch(job, tmp_path / "job")
    assert (heard.ended.outcome, heard.ended.reason) == (Outcome.FAILED, "NO_DATASET")


async def test_leaving_ends_the_process(model: Path, dataset: Path, tmp_path: Path) -> None:
    process = JobProcess(tmp_path / "job")
    stream = process.events(spec(model, dataset, max_steps=100_000))
    async for event in stream:
        if isinstance(event, events.StepDone):
            break
    await stream.aclose()
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
