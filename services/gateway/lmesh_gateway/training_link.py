"""Training calls that the scheduler answers: passed on for a tenant, with its answers and statuses passed back."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar, cast

import grpc
from grpc_status import rpc_status
from lmesh.training.v1 import training_pb2 as pb
from lmesh.training.v1 import training_pb2_grpc
from lmesh_chassis import tracing
from lmesh_chassis.backoff import Backoff
from lmesh_chassis.channel import connect
from lmesh_chassis.errors import RemoteError, from_rpc_error
from lmesh_chassis.interceptors import internal_error
from lmesh_chassis.tenants import TENANT_METADATA
from lmesh_chassis.tls import PLAIN, Tls

from lmesh_gateway.errors import (
    DOMAIN,
    CancelledError,
    DeadlineExceededError,
    RequestTooLargeError,
    SchedulerUnavailableError,
    ServiceError,
)

_log = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_RETRY_MS = 1000
_LONGEST_WAIT_S = 1.0
_ENDED = frozenset(
    {pb.JOB_STATE_COMPLETED, pb.JOB_STATE_STOPPED, pb.JOB_STATE_CANCELLED, pb.JOB_STATE_FAILED},
)


class RelayedError(Exception):
    """The scheduler refused; `status` is what it said, for `context.abort_with_status`."""

    def __init__(self, status: grpc.Status) -> None:
        super().__init__(status.details)
        self.status = status


class TrainingLink:
    """A channel of its own. A call whose client set no deadline gets `deadline_s`; a stream then has none.

    `grace_s` bounds how long a stream that has given nothing yet waits for a scheduler.
    """

    def __init__(self, address: str, *, deadline_s: float, grace_s: float, tls: Tls = PLAIN) -> None:
        self._deadline_s, self._grace_s = deadline_s, grace_s
        # Publishing twice is two versions: whether to try again is the client's to say.
        self._channel = connect(address, domain=DOMAIN, retries=False, tls=tls)
        self._stub = training_pb2_grpc.TrainingServiceStub(self._channel)

    @property
    def stub(self) -> training_pb2_grpc.TrainingServiceAsyncStub:
        """The calls that `call` takes."""
        return self._stub

    async def call(
        self, method: Callable[..., Awaitable[Answer]], request: object, *, tenant: str, timeout_s: float | None
    ) -> Answer:
        """The scheduler's answer. Raises RelayedError, or a ServiceError when the scheduler cannot be reached.

        Cancelling it cancels the call there.
        """
        timeout = self._deadline_s if timeout_s is None else timeout_s
        try:
            return await method(request, timeout=timeout, metadata=_metadata(tenant))
        except grpc.aio.AioRpcError as error:
            raise _told(error) from error

    async def watch(
        self, request: pb.WatchJobRequest, *, tenant: str, timeout_s: float | None
    ) -> AsyncGenerator[pb.WatchJobResponse, None]:
        """A job's events, each once and in order; raises as `call`.

        A stream that breaks is opened again after the last event that was passed on.
        """
        watch = _Watch(request, give_up_at=None if timeout_s is None else time.monotonic() + timeout_s)
        while True:
            call = self._stub.WatchJob(watch.rest, timeout=watch.remaining_s(), metadata=_metadata(tenant))
            try:
                while (response := await _read(call)) is not None:
                    if (fresh := watch.fresh(response)) is not None:
                        yield fresh
                if watch.over or await self._over(watch, tenant):
                    return
                await watch.wait("ended")
            except grpc.aio.AioRpcError as error:
                if not _broke(from_rpc_error(error)) or watch.down_for_s() > self._grace_s:
                    raise _told(error) from error
                await watch.wait(error.code().name)
            finally:
                call.cancel()

    async def _over(self, watch: _Watch, tenant: str) -> bool:
        """Whether the job ended where the stream did. A scheduler that leaves ends its streams well, too."""
        asked = pb.GetJobRequest(job_id=watch.rest.job_id)
        left = watch.remaining_s()
        timeout = self._deadline_s if left is None else left
        job = (await self._stub.GetJob(asked, timeout=timeout, metadata=_metadata(tenant))).job
        return job.state in _ENDED and job.last_event <= watch.rest.after

    async def close(self) -> None:
        """Ends every call."""
        await self._channel.close()


class _Watch:
    """Where one client's stream of a job is."""

    def __init__(self, request: pb.WatchJobRequest, *, give_up_at: float | None) -> None:
        self.rest = pb.WatchJobRequest()
        self.rest.CopyFrom(request)
        self._give_up_at = give_up_at
        self._backoff = Backoff(most_s=_LONGEST_WAIT_S)
        self._began = time.monotonic()
        self._live = False  # something has come
        self.over = False  # what was passed on last is the event that ended the job

    def remaining_s(self) -> float | None:
        """Of the client's deadline."""
        return None if self._give_up_at is None else max(0.0, self._give_up_at - time.monotonic())

    def down_for_s(self) -> float:
        """How long it has waited for its first word; 0 once that came."""
        return 0.0 if self._live else time.monotonic() - self._began

    def fresh(self, response: pb.WatchJobResponse) -> pb.WatchJobResponse | None:
        """What of a message the client does not have."""
        self._live = True
        self._backoff.reset()
        known = sum(event.seq <= self.rest.after for event in response.events)
        if known:
            response = pb.WatchJobResponse(events=[e for e in response.events if e.seq > self.rest.after])
        if not response.events:
            return None
        last = response.events[-1]
        self.rest.after = last.seq
        self.over = last.WhichOneof("event") == "state" and last.state.state in _ENDED
        return response

    async def wait(self, reason: str) -> None:
        """Until the next attempt, or the deadline."""
        delay, left = self._backoff.next_s(), self.remaining_s()
        extra = {"job_id": self.rest.job_id, "after": self.rest.after, "reason": reason}
        _log.info("watch broken, to be opened again", extra={**extra, "retry_in_s": round(delay, 3)})
        await asyncio.sleep(delay if left is None else min(delay, left))
        if left is not None and left <= delay:
            raise DeadlineExceededError("the call's deadline passed, with no scheduler there")


async def _read(call: Any) -> pb.WatchJobResponse | None:  # noqa: ANN401 - grpc's own type leaves its messages open
    response = await call.read()
    return None if response is grpc.aio.EOF else cast(pb.WatchJobResponse, response)


def _metadata(tenant: str) -> tuple[tuple[str, str], ...]:
    """Nothing of the client's own goes on: what it says of its tenant is worth nothing."""
    return ((TENANT_METADATA, tenant), *tracing.outgoing_metadata())


def _broke(error: RemoteError) -> bool:
    """The scheduler went away, is leaving, or ended its calls as it went; it did not refuse."""
    if error.code is grpc.StatusCode.CANCELLED:
        return not error.reason
    return error.code is grpc.StatusCode.UNAVAILABLE


def _told(error: grpc.aio.AioRpcError) -> Exception:
    """What the client is told: the scheduler's own words, or, where it said none, what became of the call."""
    said = from_rpc_error(error)
    if said.reason and (status := rpc_status.from_call(cast(Any, error))) is not None:
        return RelayedError(cast(grpc.Status, rpc_status.to_status(status)))
    return _unsaid(said) or internal_error(error, "training_link")


def _unsaid(said: RemoteError) -> ServiceError | None:
    # UNIMPLEMENTED: a scheduler from before there was training, about to be replaced by one that has it.
    if said.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNIMPLEMENTED):
        return SchedulerUnavailableError("no scheduler answers training calls now; try again", retry_after_ms=_RETRY_MS)
    if said.code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceededError("the call's deadline passed")
    if said.code is grpc.StatusCode.CANCELLED:
        return CancelledError("the scheduler cancelled the call")
    if said.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return RequestTooLargeError("the message is larger than the scheduler takes")
    return None
