"""The trainer's end of its link: joins the scheduler, reports runs until they are acknowledged, takes orders."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass

import grpc
from lmesh.scheduler.v1 import trainers_pb2, trainers_pb2_grpc
from lmesh_chassis.backoff import Backoff
from lmesh_chassis.errors import RemoteError
from lmesh_chassis.links import Link

from lmesh_trainer import job_link
from lmesh_trainer.queries.desk import QueryDesk
from lmesh_trainer.queries.questions import Refused
from lmesh_trainer.runs import Runs

_log = logging.getLogger(__name__)

_DEFAULT_INTERVAL_S = 1.0
_MESSAGE_BYTES = 1 << 20  # of reports and answers in one message; the last one may go beyond


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who this trainer is."""

    trainer_id: str
    epoch: str  # this boot's id
    device: str  # in words
    slots: int
    rendezvous: str = ""  # host:port, where other trainers reach it


class SchedulerLink:
    """Keeps the trainer known to its scheduler for as long as `run` runs. Runs go on while the link is down."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        identity: Identity,
        runs: Runs,
        desk: QueryDesk,
        *,
        backoff: Backoff | None = None,
    ) -> None:
        self._identity, self._runs, self._desk = identity, runs, desk
        self._draining = False
        self._told_draining = asyncio.Event()
        self._due = False
        self._interval_s = _DEFAULT_INTERVAL_S
        self.joined = asyncio.Event()  # set by the first hello, and then for good
        stub = trainers_pb2_grpc.TrainerServiceStub(channel)
        self._link: Link[trainers_pb2.JoinRequest, trainers_pb2.JoinResponse] = Link(
            lambda: stub.Join(),
            name="scheduler",
            hello=self._hello,
            collect=self._collect,
            on_connected=self._on_connected,
            on_message=self._on_message,
            on_broken=self._on_broken,
            backoff=backoff,
        )
        runs.on_report = self._link.wake
        desk.on_answer = self._link.wake

    async def run(self) -> None:
        """Keeps the link up, and a sign of life on it, until `leave` or cancellation."""
        beats = asyncio.create_task(self._beat())
        try:
            await self._link.run()
        finally:
            beats.cancel()
            await asyncio.gather(beats, return_exceptions=True)

    async def announce_draining(self, timeout_s: float) -> bool:
        """Tells the scheduler to start nothing more here; False when it could not be told in time."""
        self._draining = True
        self._beat_now()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._told_draining.wait()
        return self._told_draining.is_set()

    def leave(self) -> None:
        """Ends the link well; `run` returns."""
        self._link.close()

    def _beat_now(self) -> None:
        self._due = True
        self._link.wake()

    async def _beat(self) -> None:
        while True:
            # Twice in what the scheduler asks for: a beat that is late by a scheduling hiccup is still in time.
            await asyncio.sleep(self._interval_s / 2)
            self._beat_now()

    def _hello(self) -> trainers_pb2.JoinRequest:
        own = self._identity
        hello = trainers_pb2.TrainerHello(
            trainer_id=own.trainer_id,
            epoch=own.epoch,
            device=own.device,
            slots=own.slots,
            rendezvous=own.rendezvous,
            held=[
                trainers_pb2.HeldRun(job_id=job_id, lease=lease) for job_id, lease in sorted(self._runs.held().items())
            ],
        )
        # A hello is a fresh start for the scheduler: the rest is said again.
        self._told_draining.clear()
        self._runs.restart()
        self._due = self._draining
        return trainers_pb2.JoinRequest(hello=hello)

    def _collect(self) -> trainers_pb2.JoinRequest | None:
        request = trainers_pb2.JoinRequest(draining=self._draining)
        self._add_reports(request)
        self._add_answers(request)
        if not (self._due or request.reports or request.answers):
            return None
        self._due = False
        if self._draining:
            self._told_draining.set()
        return request

    def _add_reports(self, request: trainers_pb2.JoinRequest) -> None:
        size = 0
        for run in self._runs:
            while size < _MESSAGE_BYTES and (report := run.outbox.next()) is not None:
                request.reports.append(job_link.run_report(run.job_id, run.lease, report))
                size += request.reports[-1].ByteSize()

    def _add_answers(self, request: trainers_pb2.JoinRequest) -> None:
        size = 0
        while size < _MESSAGE_BYTES and (found := self._desk.next()) is not None:
            request.answers.append(job_link.answer(*found))
            size += request.answers[-1].ByteSize()

    def _on_connected(self, response: trainers_pb2.JoinResponse) -> None:
        hello = response.hello
        if hello.heartbeat_interval_ms:
            self._interval_s = hello.heartbeat_interval_ms / 1000
        self.joined.set()
        _log.info("joined the scheduler", extra={"incarnation": hello.incarnation, "interval_s": self._interval_s})
        self._on_message(response)

    def _on_message(self, response: trainers_pb2.JoinResponse) -> None:
        for ack in response.acks:
            self._runs.acked(ack.job_id, ack.lease, ack.seq)
        if response.acks:
            self._link.wake()  # there is room for more reports
        for asked in response.asks:
            if (wish := job_link.ask(asked)) is not None:
                self._runs.ask(wish)
        for start in response.starts:
            self._runs.start(job_link.start_order(start))
        for query in response.queries:
            self._on_query(query)

    def _on_query(self, query: trainers_pb2.Query) -> None:
        order = job_link.query_order(query)
        if order is None:
            self._desk.answer_at_once(query.query_id, Refused(reason="NOT_SUPPORTED", message="an unknown question"))
        else:
            self._desk.ask(query.query_id, order)

    def _on_broken(self, error: RemoteError | None) -> bool:
        self._desk.forget()
        if error is not None and error.code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT):
            # It may be put right on the other side (an id in use), so it is tried again, loudly.
            _log.error("the scheduler refuses this trainer", extra={"reason": error.reason, "detail": error.message})
        return True
