"""The trainers' link: protos on one side, the desk on the other."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from lmesh.scheduler.v1 import trainers_pb2 as pb
from lmesh.scheduler.v1 import trainers_pb2_grpc

from lmesh_scheduler.config import SchedulerSettings
from lmesh_scheduler.errors import HelloRequiredError, TrainerIdInUseError
from lmesh_scheduler.training.desk import TrainingDesk
from lmesh_scheduler.training.query_link import Queries
from lmesh_scheduler.training.trainers import Trainer
from lmesh_scheduler.training.wire import hello_of, join_response, report_of

SERVICE_NAME = "lmesh.scheduler.v1.TrainerService"
_BATCH = 64  # orders, acknowledgements and the like of one message

RpcContext = Any  # grpc's own type leaves its messages open


class TrainersServicer(trainers_pb2_grpc.TrainerServiceServicer):
    """One call a trainer."""

    def __init__(self, desk: TrainingDesk, queries: Queries, settings: SchedulerSettings, *, incarnation: int) -> None:
        self._desk, self._queries, self._settings, self._incarnation = desk, queries, settings, incarnation
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Lets every link end."""
        self._closing.set()

    async def Join(  # type: ignore[override]  # a coroutine that writes through its context
        self, request_iterator: object, context: RpcContext
    ) -> None:
        """The link; ends when the trainer ends its side or goes silent for longer than its lease."""
        first = await context.read()
        if first is grpc.aio.EOF or not (first.hello.trainer_id and first.hello.epoch and first.hello.slots):
            raise HelloRequiredError(
                "the first message must be a hello with trainer_id, epoch and slots", field="hello"
            )
        awake = asyncio.Event()
        trainer = self._desk.joined(hello_of(first.hello), awake.set)
        try:
            await context.write(pb.JoinResponse(hello=self._welcome()))
            self._take(trainer, first)
            await self._serve(trainer, awake, context)
        finally:
            self._queries.lost(trainer)
            self._desk.unlinked(trainer)

    def _welcome(self) -> pb.TrainerWelcome:
        return pb.TrainerWelcome(
            incarnation=self._incarnation,
            heartbeat_interval_ms=round(self._settings.heartbeat_interval_s * 1e3),
            lease_ttl_ms=round(self._settings.lease_ttl_s * 1e3),
        )

    async def _serve(self, trainer: Trainer, awake: asyncio.Event, context: RpcContext) -> None:
        reader = asyncio.create_task(self._read(trainer, context))
        writer = asyncio.create_task(_write(trainer, awake, context))
        closing = asyncio.create_task(self._closing.wait())
        tasks: tuple[asyncio.Task[Any], ...] = (reader, writer, closing)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for link in (reader, writer):
                if link.done():
                    link.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, trainer: Trainer, context: RpcContext) -> None:
        while True:
            try:
                async with asyncio.timeout(self._settings.lease_ttl_s):
                    message = await context.read()
            except TimeoutError:
                return
            if message is grpc.aio.EOF:
                return
            if message.HasField("hello"):
                raise HelloRequiredError("a link has one hello, at its beginning", field="hello")
            self._take(trainer, message)

    def _take(self, trainer: Trainer, message: pb.JoinRequest) -> None:
        if not self._desk.heard(trainer, draining=message.draining):
            raise TrainerIdInUseError(
                f"trainer {trainer.hello.trainer_id} is lost here: its lease lapsed, or another link took its place",
                field="trainer_id",
            )
        for report in message.reports:
            self._desk.report(trainer, report_of(report))
        for answer in message.answers:
            self._queries.answered(answer.query_id, answer.SerializeToString())


async def _write(trainer: Trainer, awake: asyncio.Event, context: RpcContext) -> None:
    while True:
        awake.clear()
        told = trainer.outbox[:_BATCH]
        if told:
            await context.write(join_response(told))
            del trainer.outbox[: len(told)]
        else:
            await awake.wait()
