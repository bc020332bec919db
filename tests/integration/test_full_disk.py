"""A disk that is really full, at each place where a job writes: a named end, what was there stays, and it goes on."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lmesh.training.v1 import training_pb2
from lmesh_trainer import checkpoint, events
from lmesh_trainer.events import Outcome, Phase
from lmesh_trainer.job import run_job

from tests.trainer_scene import Place, running_trainer
from tests.training_jobs import Heard, run, save_dataset, save_model, spec

SIZE = 8 << 20


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own with 8 MiB."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        yield folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dataset(tmp_path_factory.mktemp("data") / "chats.jsonl")


def fill(disk: Path) -> Path:
    """Takes all the room that is left."""
    filler = disk / "filler"
    descriptor = os.open(filler, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    try:
        for size in (1 << 16, 1 << 12):
            while True:
                try:
                    os.write(descriptor, b"\1" * size)
                except OSError:
                    break
    finally:
        os.close(descriptor)
    return filler


class Filling(Heard):
    """Fills the disk at the first event that is meant."""

    def __init__(self, disk: Path, when: Callable[[events.Event], bool]) -> None:
        super().__init__()
        self._disk, self._when = disk, when
        self.filler: Path | None = None

    def __call__(self, event: events.Event) -> None:
        super().__call__(event)
        if self.filler is None and self._when(event):
            self.filler = fill(self._disk)


def step(number: int) -> Callable[[events.Event], bool]:
    return lambda event: isinstance(event, events.StepDone) and event.global_step == number


def finalizing(event: events.Event) -> bool:
    return isinstance(event, events.PhaseBegun) and event.phase is Phase.FINALIZING


@pytest.mark.parametrize(
    ("when", "options", "left"),
    [(step(5), {}, 3), (finalizing, {}, 20), (finalizing, {"method": "full", "max_steps": 3}, 3)],
)
def test_the_job_ends_by_name_and_goes_on_when_there_is_room(
    model: Path,
    dataset: Path,
    tmp_path: Path,
    disk: Path,
    when: Callable[..., bool],
    options: dict[str, object],
    left: int,
) -> None:
    job = spec(model, dataset, save_steps=3, keep_checkpoints=1, **options)
    whole = run(job, tmp_path / "whole")
    heard = Filling(disk, when)
    run_job(job, disk / "job", heard)
    assert (heard.ended.outcome, heard.ended.reason) == (Outcome.FAILED, "DISK_FULL"), heard.ended
    checkpoints = disk / "job" / "checkpoints"
    newest = checkpoint.list_checkpoints(checkpoints)[-1]
    assert checkpoint.load_checkpoint(newest).progress.step == left
    assert not list(checkpoints.glob(".draft-*"))
    assert heard.of(events.CheckpointSaved)[-1].global_step == left and not heard.of(events.Published)
    assert heard.filler is not None
    heard.filler.unlink()
    rest = run(job, disk / "job")
    assert rest.ended.outcome is Outcome.COMPLETED
    assert rest.losses == whole.losses[left:]
    made = "model/model.safetensors" if options else "adapter/adapter_model.safetensors"
    assert (disk / "job" / made).read_bytes() == (tmp_path / "whole" / made).read_bytes()


async def test_through_the_trainer(model: Path, dataset: Path, tmp_path: Path, disk: Path) -> None:
    """No room for the job's folder, then none for its checkpoint; its artifacts lie elsewhere."""
    place = Place(tmp_path, model, dataset)
    filler = fill(disk)
    async with running_trainer(place, jobs=disk / "jobs") as running:
        told = running.scheduler
        first = told.start("job", 1, place.spec())
        state = await told.end(first)
        assert state.state == training_pb2.JOB_STATE_FAILED
        assert state.reason in ("DISK_FULL", "STORE_FULL"), state
        filler.unlink()
        second = told.start("job", 2, place.spec(max_steps=100_000, save_steps=1))
        await told.stepped(second, 3)
        ended = asyncio.ensure_future(told.end(second))
        while not ended.done():  # again and again: pruning a checkpoint makes room for the next one
            filler = fill(disk)
            await asyncio.sleep(0.02)
        state = await ended
        assert (state.state, state.reason) == (training_pb2.JOB_STATE_FAILED, "DISK_FULL"), state
        saved = list(told.of(second, "checkpoint"))[-1]
        filler.unlink()
        third = told.start("job", 3, place.spec(max_steps=100_000, save_steps=1))
        await told.stepped(third, 1)
        assert next(told.of(third, "step")).global_step == saved + 1
