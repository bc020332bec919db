"""A trainer around a scripted scheduler, over real sockets, with the tiny model's jobs as clients would send them."""

from __future__ import annotations

import asyncio
import io
import os
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from lmesh.scheduler.v1 import trainers_pb2, trainers_pb2_grpc
from lmesh.training.v1 import training_pb2
from lmesh_chassis.artifacts.store import FolderStore
from lmesh_chassis.lifecycle import Shutdown
from lmesh_chassis.server import GrpcServer
from lmesh_trainer.config import TrainerSettings
from lmesh_trainer.trainer import Trainer
from prometheus_client import CollectorRegistry

from tests.worker_process import until

Key = tuple[str, int]  # job and lease


class FakeScheduler(trainers_pb2_grpc.TrainerServiceServicer):
    """Takes hellos and reports, as a scheduler must: each seq once, in order; `commands` go down to the trainer."""

    def __init__(self) -> None:
        self.hellos: list[trainers_pb2.TrainerHello] = []
        self.requests: list[trainers_pb2.JoinRequest] = []
        self.taken: dict[Key, list[training_pb2.JobEvent]] = defaultdict(list)
        self.again = 0  # reports that had been taken before
        self.answers: dict[int, trainers_pb2.Answer] = {}
        self.acks = True
        self.commands: asyncio.Queue[trainers_pb2.JoinResponse | None] = asyncio.Queue()  # None breaks the stream

    async def Join(self, request_iterator: Any, context: Any) -> None:
        first = await context.read()
        self.hellos.append(first.hello)
        hello = trainers_pb2.TrainerWelcome(incarnation=7, heartbeat_interval_ms=100, lease_ttl_ms=5000)
        await context.write(trainers_pb2.JoinResponse(hello=hello))
        reader = asyncio.create_task(self._read(context))
        writer = asyncio.create_task(self._write(context))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            reader.cancel()
            writer.cancel()

    async def _read(self, context: Any) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            self.requests.append(request)
            for report in request.reports:
                self._take(report)
            for answer in request.answers:
                self.answers[answer.query_id] = answer
            if request.reports and self.acks:
                acks = {(r.job_id, r.lease): r.seq for r in request.reports}
                told = [trainers_pb2.RunAck(job_id=j, lease=n, seq=seq) for (j, n), seq in acks.items()]
                self.commands.put_nowait(trainers_pb2.JoinResponse(acks=told))

    def _take(self, report: trainers_pb2.RunReport) -> None:
        known = self.taken[report.job_id, report.lease]
        if report.seq <= len(known):
            assert known[report.seq - 1] == report.event
            self.again += 1
            return
        assert report.seq == len(known) + 1, f"{report.job_id}: {report.seq} after {len(known)}"
        assert report.event.seq == 0 and report.event.time.seconds > 1_600_000_000
        known.append(report.event)

    async def _write(self, context: Any) -> None:
        while (command := await self.commands.get()) is not None:
            await context.write(command)

    def start(self, job_id: str, lease: int, spec: training_pb2.JobSpec) -> Key:
        start = trainers_pb2.StartRun(job_id=job_id, lease=lease, spec=spec)
        self.commands.put_nowait(trainers_pb2.JoinResponse(starts=[start]))
        return job_id, lease

    def ask(self, key: Key, wish: int) -> None:
        asked = trainers_pb2.AskRun(job_id=key[0], lease=key[1], wish=wish)  # type: ignore[arg-type]
        self.commands.put_nowait(trainers_pb2.JoinResponse(asks=[asked]))

    async def answer(self, query_id: int, **question: Any) -> trainers_pb2.Answer:
        query = trainers_pb2.Query(query_id=query_id, **question)
        self.commands.put_nowait(trainers_pb2.JoinResponse(queries=[query]))
        await until(lambda: query_id in self.answers, 120)
        return self.answers[query_id]

    def of(self, key: Key, kind: str) -> Iterator[Any]:
        return (getattr(event, kind) for event in self.taken[key] if event.WhichOneof("event") == kind)

    def losses(self, key: Key) -> list[float]:
        return [step.loss for step in self.of(key, "step")]

    def ended(self, key: Key) -> bool:
        return any(True for _ in self.of(key, "state"))

    async def end(self, key: Key) -> training_pb2.StateChanged:
        """The last report, once it is there."""
        await until(lambda: self.ended(key), 180)
        assert self.taken[key][-1].WhichOneof("event") == "state"
        (state,) = self.of(key, "state")
        return state

    async def stepped(self, key: Key, step: int) -> None:
        await until(lambda: len(self.losses(key)) >= step or self.ended(key), 120)
        assert not self.ended(key), self.taken[key][-1]


@dataclass
class Place:
    """What outlives a boot: the volume, and what clients uploaded."""

    folder: Path
    model: Path
    rows: Path

    @property
    def store(self) -> FolderStore:
        return FolderStore(self.folder / "artifacts")

    def upload(self, path: Path) -> str:
        return self.store.put(io.BytesIO(path.read_bytes()))

    def spec(self, **options: Any) -> training_pb2.JobSpec:
        """20 updates of 5 rows, as tests.training_jobs.spec has them."""
        values: dict[str, Any] = {
            "model": str(self.model),
            "dataset": training_pb2.DatasetSpec(source=f"artifact:{self.upload(self.rows)}/{self.rows.name}"),
            "optimiser": training_pb2.OptimiserSpec(learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=2),
            "max_steps": 20,
            "batch_size": 5,
            "micro_tokens": 200,
        }
        return training_pb2.JobSpec(**(values | options))


@asynccontextmanager
async def scheduler() -> AsyncIterator[tuple[FakeScheduler, str]]:
    fake = FakeScheduler()
    control = GrpcServer("127.0.0.1:0", domain="lmesh.scheduler")
    control.add(trainers_pb2_grpc.add_TrainerServiceServicer_to_server, fake, "lmesh.scheduler.v1.TrainerService")
    port = await control.start()
    try:
        yield fake, f"127.0.0.1:{port}"
    finally:
        await control.drain(0)


@dataclass
class RunningTrainer:
    """A trainer's server in this process; its jobs and queries have processes of their own."""

    trainer: Trainer
    scheduler: FakeScheduler
    shutdown: Shutdown
    done: asyncio.Task[int]


@asynccontextmanager
async def running_trainer(place: Place, **settings: Any) -> AsyncIterator[RunningTrainer]:
    async with scheduler() as (fake, address):
        values = {"id": "t", "device": "cpu", "threads": 1, "artifacts": place.folder / "artifacts", **settings}
        trainer = Trainer(TrainerSettings(scheduler=address, **values), "a test's", registry=CollectorRegistry())
        shutdown = Shutdown()
        done = asyncio.create_task(trainer.run(shutdown))
        try:
            await until(lambda: trainer.server.serving() or done.done())
            yield RunningTrainer(trainer, fake, shutdown, done)
        finally:
            shutdown.request()
            assert await asyncio.wait_for(done, 60) == 0


@asynccontextmanager
async def trainer_process(place: Place, address: str, **settings: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The process as it is shipped, with a scheduler of the caller's."""
    values = {"device": "cpu", "threads": "1", "artifacts": str(place.folder / "artifacts"), **settings}
    values["scheduler"] = address
    env = {**os.environ, **{f"LMESH_TRAINER_{name.upper()}": value for name, value in values.items()}}
    process = await asyncio.create_subprocess_exec(sys.executable, "-P", "-m", "lmesh_trainer", env=env)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
