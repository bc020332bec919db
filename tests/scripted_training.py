"""A scheduler's training service that says a script, over real sockets, and can be restarted on its port."""

from __future__ import annotations

import asyncio
from typing import Any

from lmesh.training.v1 import training_pb2 as pb
from lmesh.training.v1 import training_pb2_grpc
from lmesh_chassis.errors import ServiceError
from lmesh_chassis.server import GrpcServer

from tests.scripted_peers import Changes

SERVICE = "lmesh.training.v1.TrainingService"


class ScriptedTraining(training_pb2_grpc.TrainingServiceServicer):
    """Answers each call with an empty answer of its kind, or with `error`; keeps what it was asked."""

    def __init__(self) -> None:
        self.changes = Changes()
        self.calls: list[tuple[str, Any, dict[str, str]]] = []  # method, request, metadata
        self.remaining_s: float | None = None  # of the last call
        self.cancelled: list[str] = []
        self.error: ServiceError | None = None
        self.hold = False  # unary calls are not answered
        self.events: list[pb.JobEvent] = []
        self.over = False  # the job has ended
        self.leaving = False
        self.overlap = 0  # events before the cursor that come again
        self.written = 0  # events
        self.port = 0
        self._server: GrpcServer | None = None

    async def open(self) -> None:
        server = self._server = GrpcServer(f"127.0.0.1:{self.port}", domain="lmesh.scheduler", reflection=False)
        server.add(training_pb2_grpc.add_TrainingServiceServicer_to_server, self, SERVICE)
        self.port = await server.start()

    def leave(self) -> None:
        """Ends its streams well, as a scheduler does that drains."""
        self.leaving = True
        self.changes.note()

    async def close(self) -> None:
        """Its streams break."""
        if self._server is not None:
            await self._server.drain(0)
            self._server = None

    def happen(self, count: int = 1, *, last: bool = False) -> None:
        """That many more events."""
        for _ in range(count):
            seq = len(self.events) + 1
            self.events.append(pb.JobEvent(seq=seq, step=pb.Step(global_step=seq, loss=1.0 / seq)))
        if last:
            self.events[-1].state.state = pb.JOB_STATE_COMPLETED
        self.over = last
        self.changes.note()

    async def asked(self, count: int = 1) -> tuple[str, Any, dict[str, str]]:
        await self.changes.until(lambda: len(self.calls) >= count)
        return self.calls[count - 1]

    async def _answer(self, name: str, request: Any, context: Any, answer: Any) -> Any:
        self._note(name, request, context)
        if self.error is not None:
            raise self.error
        try:
            if self.hold:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.append(name)
            self.changes.note()
            raise
        return answer

    def _note(self, name: str, request: Any, context: Any) -> None:
        self.calls.append((name, request, dict(context.invocation_metadata())))
        self.remaining_s = context.time_remaining()
        self.changes.note()

    async def WatchJob(self, request: Any, context: Any) -> None:
        self._note("WatchJob", request, context)
        if self.error is not None:
            raise self.error
        seen = max(0, request.after - self.overlap)
        try:
            while not (self.leaving or (self.over and seen >= len(self.events))):
                await self.changes.until(lambda after=seen: len(self.events) > after or self.over or self.leaving, 60.0)
                # Two events a message, so that an overlap may cut one.
                for begin in range(seen, len(self.events), 2):
                    events = self.events[begin : begin + 2]
                    seen += len(events)
                    await context.write(pb.WatchJobResponse(events=events))
                    self.written += len(events)
        except asyncio.CancelledError:
            self.cancelled.append("WatchJob")
            self.changes.note()
            raise


def _unary(name: str) -> Any:
    async def call(self: ScriptedTraining, request: Any, context: Any) -> Any:
        answer = pb.GetJobResponse(job=_job(self)) if name == "GetJob" else getattr(pb, f"{name}Response")()
        return await self._answer(name, request, context, answer)

    return call


def _job(scripted: ScriptedTraining) -> pb.Job:
    state = pb.JOB_STATE_COMPLETED if scripted.over else pb.JOB_STATE_RUNNING
    return pb.Job(job_id="j", state=state, last_event=len(scripted.events))


UNARY = tuple(
    method.name
    for method in pb.DESCRIPTOR.services_by_name["TrainingService"].methods
    if method.name not in ("WatchJob", "Upload", "Download")
)
for _name in UNARY:
    setattr(ScriptedTraining, _name, _unary(_name))
