"""Two trainers, each with a folder of its own, and one real scheduler: a job that takes both, or waits."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from lmesh.scheduler.v1 import trainers_pb2
from lmesh.training.v1 import training_pb2 as pb
from lmesh.training.v1 import training_pb2_grpc
from lmesh_scheduler.service import SchedulerService
from lmesh_scheduler.training.jobs import Job, JobState

from tests.redis_server import running_redis
from tests.scheduler_links import SchedulerLinks, running_scheduler, worker_hello
from tests.trainer_scene import Place, running_trainer, trainer_process
from tests.training_jobs import run, save_dataset, save_model
from tests.training_jobs import spec as plain_spec
from tests.worker_process import until

STEPS = 60


class Mesh:
    """A scheduler whose one worker serves the tiny model, and trainers that come and go."""

    def __init__(self, place: Place, service: SchedulerService, links: SchedulerLinks) -> None:
        self.place, self.service = place, service
        self.stub = training_pb2_grpc.TrainingServiceStub(links.channel)
        self._address = f"127.0.0.1:{links.port}"
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self._port = taken.getsockname()[1]

    def trainer(self, name: str, **settings: str) -> Any:
        own = {"id": name, "jobs": str(self.folder(name)), "rendezvous": f"127.0.0.1:{self._port}"}
        return trainer_process(self.place, self._address, **own | settings)

    def folder(self, name: str) -> Path:
        return self.place.folder / f"jobs-{name}"

    async def create(self, job_id: str, **options: Any) -> Job:
        request = pb.CreateJobRequest(job_id=job_id, spec=self.place.spec(model="m", **options))
        await self.stub.CreateJob(request, timeout=10)
        job = self.service.office.desk.jobs.find(job_id)
        assert job is not None
        return job

    async def losses(self, job: Job) -> list[list[tuple[int, float]]]:
        """(step, loss) of each attempt; the job has ended."""
        found: list[list[tuple[int, float]]] = []
        async for response in self.stub.WatchJob(pb.WatchJobRequest(job_id=job.id), timeout=60):
            for event in response.events:
                if event.state.state == pb.JOB_STATE_RUNNING:
                    found.append([])
                elif event.WhichOneof("event") == "step":
                    found[-1].append((event.step.global_step, event.step.loss))
        return found


def step_of(job: Job) -> int:
    return pb.Step.FromString(job.last_step).global_step


def ranks_in(folder: Path) -> list[int]:
    """Ids of processes that train below a folder, without what launched them."""
    return [pid for pid, line in _processes(folder) if "torch.distributed.run" not in line]


def launchers_in(folder: Path) -> list[int]:
    """Ids of what launched them."""
    return [pid for pid, line in _processes(folder) if "torch.distributed.run" in line]


def _processes(folder: Path) -> Iterator[tuple[int, str]]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            line = path.read_bytes().replace(b"\0", b" ").decode()
            if f"{folder}/" in line and "lmesh_trainer.process" in line:
                yield int(path.parent.name), line


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Mesh]:
    place = Place(tmp_path, save_model(tmp_path / "tiny"), save_dataset(tmp_path / "chats.jsonl"))
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(running_redis())
        service, links = await stack.enter_async_context(running_scheduler(redis.url, lease_ttl_s=4.0))
        hello = worker_hello()
        hello.model.source = str(place.model)
        await links.worker(hello)
        yield Mesh(place, service, links)


async def test_one_job_on_two_trainers_outlives_a_rank_and_a_trainer(mesh: Mesh) -> None:
    async with mesh.trainer("a"):
        async with mesh.trainer("b") as second:
            job = await mesh.create("gang", nodes=2, parallelism="fsdp", max_steps=STEPS, save_steps=4)
            await until(lambda: step_of(job) >= 10 or not job.live, 120)
            assert job.live and (job.trainer_id, job.members, job.attempts) == ("a", ("a", "b"), 1)
            (rank,) = ranks_in(mesh.folder("b"))
            os.kill(rank, signal.SIGKILL)
            await until(lambda: job.attempts == 2 and step_of(job) >= 20, 120)
            second.send_signal(signal.SIGKILL)
            await second.wait()
        await until(lambda: job.state is JobState.QUEUED, 60)
        # Nothing of it is left anywhere, and what one trainer can do goes on beside it.
        await until(lambda: not ranks_in(mesh.folder("a")) and not ranks_in(mesh.folder("b")), 30)
        alone = await mesh.create("alone", max_steps=2)
        await until(lambda: not alone.live, 120)
        assert alone.state is JobState.COMPLETED and job.state is JobState.QUEUED
        async with mesh.trainer("b"):
            await until(lambda: not job.live, 180)
            assert (job.state, job.attempts) == (JobState.COMPLETED, 3), (job.reason, job.message)
            assert job.adapter_digest
            await until(lambda: not ranks_in(mesh.folder("b")))
    attempts = await mesh.losses(job)
    found = [step for attempt in attempts for step in attempt]
    wanted = run(plain_spec(mesh.place.model, mesh.place.rows, max_steps=STEPS), mesh.place.folder / "one").losses
    assert [loss for _, loss in found] == pytest.approx([wanted[step - 1] for step, _ in found], abs=1e-4)
    first, second, third = (attempt[0][0] for attempt in attempts)
    assert first == 1 and second >= 9 and third >= 17 and found[-1][0] == STEPS
    # Where the trainers share no folder, the first one's alone has checkpoints.
    assert list(mesh.folder("a").glob("gang/checkpoints/step-*"))
    assert not list(mesh.folder("b").glob("gang/**/step-*"))


async def test_a_failure_of_a_follower_ends_the_job_by_its_reason(mesh: Mesh) -> None:
    async with mesh.trainer("a"), mesh.trainer("b", device="cpu", jobs="/proc/nowhere"):
        job = await mesh.create("gang", nodes=2)
        await until(lambda: not job.live, 120)
        assert job.state is JobState.FAILED and job.reason == "JOB_FAILED" and "/proc/nowhere" in job.message
        await until(lambda: not ranks_in(mesh.folder("a")), 30)


async def test_what_nobody_could_run(mesh: Mesh) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.create("none", nodes=0)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "spec.nodes" in str(caught.value.details())


async def test_a_follower_is_held_until_it_is_dropped_and_leaves_without_a_word(tmp_path: Path) -> None:
    place = Place(tmp_path, save_model(tmp_path / "tiny"), save_dataset(tmp_path / "chats.jsonl"))
    gang = trainers_pb2.Gang(node=1, nodes=2, rendezvous="127.0.0.1:9")  # where nobody is
    async with running_trainer(place, rendezvous="127.0.0.1:29500") as running:
        told, held = running.scheduler, running.trainer.runs.held
        assert told.hellos[0].rendezvous == "127.0.0.1:29500"
        for lease in (1, 2):
            start = trainers_pb2.StartRun(job_id="job", lease=lease, spec=place.spec(), gang=gang)
            told.commands.put_nowait(trainers_pb2.JoinResponse(starts=[start]))
            await until(lambda: bool(launchers_in(place.folder)), 60)
            assert held() == {"job": lease} and not told.taken["job", lease]
            if lease == 1:
                told.ask(("job", 1), trainers_pb2.WISH_DROP)
                await until(lambda: not held() and not launchers_in(place.folder), 30)
        running.shutdown.request()
        await asyncio.wait_for(asyncio.shield(running.done), 60)
        assert not launchers_in(place.folder) and not any(told.taken.values())
