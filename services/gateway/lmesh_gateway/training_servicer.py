"""The public training API: the scheduler's service for authenticated tenants, and artifacts up and down."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from lmesh.training.v1 import training_pb2 as pb
from lmesh.training.v1 import training_pb2_grpc

from lmesh_gateway.artifact_transfer import PIECE_BYTES, ArtifactTransfer
from lmesh_gateway.authentication import caller
from lmesh_gateway.errors import ArtifactsDisabledError, DrainingError, InvalidArgumentError
from lmesh_gateway.training_link import RelayedError, TrainingLink

SERVICE_NAME = "lmesh.training.v1.TrainingService"

_log = logging.getLogger(__name__)

_SHOWN_S, _LOOK_S = 1.0, 0.005  # how long an answer waits for its adapter to be known here, and how often it looks

RpcContext = Any  # grpc's own type leaves its messages open
Answer = TypeVar("Answer")


class TrainingServicer(training_pb2_grpc.TrainingServiceServicer):
    """Passes calls on unchanged, with the caller's tenant; Upload and Download are the gateway's own.

    An artifact's digest is a capability: tenants share one store, and whoever knows a sha256 may read what is under it.
    Nothing lists digests but what shows a tenant its own jobs and adapters.
    """

    def __init__(
        self, link: TrainingLink, artifacts: ArtifactTransfer | None, shows: Callable[[str, str], bool]
    ) -> None:
        """`shows` tells whether this process serves a model of that id to that tenant."""
        self._link, self._artifacts, self._shows = link, artifacts, shows
        self._watches: set[asyncio.Timeout] = set()
        self._leaving = False

    def leave(self) -> None:
        """The process leaves: streams of events, which may last for days, end now with DRAINING."""
        self._leaving = True
        for watch in self._watches:
            watch.reschedule(asyncio.get_running_loop().time())

    async def CreateJob(self, request: pb.CreateJobRequest, context: RpcContext) -> pb.CreateJobResponse:
        """Queues a job."""
        return await self._pass_on(self._link.stub.CreateJob, request, context)

    async def ValidateJob(self, request: pb.ValidateJobRequest, context: RpcContext) -> pb.ValidateJobResponse:
        """A dry run of a job."""
        return await self._pass_on(self._link.stub.ValidateJob, request, context)

    async def GetJob(self, request: pb.GetJobRequest, context: RpcContext) -> pb.GetJobResponse:
        """One job."""
        return await self._pass_on(self._link.stub.GetJob, request, context)

    async def ListJobs(self, request: pb.ListJobsRequest, context: RpcContext) -> pb.ListJobsResponse:
        """The tenant's jobs."""
        return await self._pass_on(self._link.stub.ListJobs, request, context)

    async def WatchJob(self, request: pb.WatchJobRequest, context: RpcContext) -> None:  # type: ignore[override]
        """A job's events, through restarts of the scheduler; one message at a time, so that a slow client holds one."""
        tenant, timeout_s = caller.get(), context.time_remaining()
        async with _passing_back(context), self._while_here():
            responses = self._link.watch(request, tenant=tenant, timeout_s=timeout_s)
            async with aclosing(responses):
                async for response in responses:
                    await context.write(response)

    async def StopJob(self, request: pb.StopJobRequest, context: RpcContext) -> pb.StopJobResponse:
        """Ends a job with a checkpoint."""
        return await self._pass_on(self._link.stub.StopJob, request, context)

    async def CancelJob(self, request: pb.CancelJobRequest, context: RpcContext) -> pb.CancelJobResponse:
        """Ends a job without one."""
        return await self._pass_on(self._link.stub.CancelJob, request, context)

    async def ResumeJob(self, request: pb.ResumeJobRequest, context: RpcContext) -> pb.ResumeJobResponse:
        """Queues an ended job again."""
        return await self._pass_on(self._link.stub.ResumeJob, request, context)

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: RpcContext) -> pb.ListAdaptersResponse:
        """The tenant's adapters."""
        return await self._pass_on(self._link.stub.ListAdapters, request, context)

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: RpcContext) -> pb.GetAdapterResponse:
        """One version of an adapter."""
        return await self._pass_on(self._link.stub.GetAdapter, request, context)

    async def PublishAdapter(self, request: pb.PublishAdapterRequest, context: RpcContext) -> pb.PublishAdapterResponse:
        """Puts a new version into service: the next request that comes here has it."""
        response = await self._pass_on(self._link.stub.PublishAdapter, request, context)
        made = response.adapter
        # Which models there are comes from the scheduler on another stream, and may come after the answer.
        until = time.monotonic() + _SHOWN_S
        wanted = f"{made.model}:{made.name}@{made.version}"
        while not self._shows(wanted, caller.get()) and time.monotonic() < until:  # noqa: ASYNC110 - a matter of milliseconds
            await asyncio.sleep(_LOOK_S)
        if time.monotonic() >= until:
            _log.warning("published, and not yet known here", extra={"model": wanted})
        return response

    async def DeleteAdapter(self, request: pb.DeleteAdapterRequest, context: RpcContext) -> pb.DeleteAdapterResponse:
        """Takes versions out of service."""
        return await self._pass_on(self._link.stub.DeleteAdapter, request, context)

    async def Export(self, request: pb.ExportRequest, context: RpcContext) -> pb.ExportResponse:
        """Merges or converts what was trained."""
        return await self._pass_on(self._link.stub.Export, request, context)

    async def Upload(self, request_iterator: AsyncIterator[pb.UploadRequest], context: RpcContext) -> pb.UploadResponse:
        """Stores bytes; what came before a break stays, and the next upload of that digest goes on there."""
        artifacts = self._store()
        pieces = aiter(request_iterator)
        first = await anext(pieces, None)
        if first is None:
            raise InvalidArgumentError("digest: the first message must have it", field="digest")
        received = await artifacts.begin(first.digest, first.size)
        if received == first.size:
            return pb.UploadResponse(received=received)  # there already: whatever else comes need not be read
        received = await _append(artifacts, first, first, received)
        async for piece in pieces:
            if piece.digest or piece.size:
                name = "digest" if piece.digest else "size"
                raise InvalidArgumentError(f"{name}: is for the first message alone", field=name)
            received = await _append(artifacts, first, piece, received)
        return pb.UploadResponse(received=received)

    async def Download(self, request: pb.DownloadRequest, context: RpcContext) -> None:  # type: ignore[override]
        """An artifact's bytes from an offset on, for whoever knows its digest; checked at the end if from its start."""
        pieces = self._store().read(request.digest, request.offset)
        async with aclosing(pieces):
            async for piece in pieces:
                await context.write(pb.DownloadResponse(data=piece))

    def _store(self) -> ArtifactTransfer:
        if self._artifacts is None:
            raise ArtifactsDisabledError("this gateway has no artifact store: set LMESH_GATEWAY_ARTIFACTS")
        return self._artifacts

    async def _pass_on(self, method: Callable[..., Awaitable[Answer]], request: object, context: RpcContext) -> Answer:
        async with _passing_back(context):
            timeout_s = context.time_remaining()
            return await self._link.call(method, request, tenant=caller.get(), timeout_s=timeout_s)

    @asynccontextmanager
    async def _while_here(self) -> AsyncIterator[None]:
        error = DrainingError("this gateway is leaving; watch again from the last event", retry_after_ms=1000)
        if self._leaving:
            raise error
        watch = asyncio.timeout(None)
        try:
            async with watch:
                self._watches.add(watch)
                yield
        except TimeoutError:
            if not watch.expired():
                raise
            raise error from None
        finally:
            self._watches.discard(watch)


@asynccontextmanager
async def _passing_back(context: RpcContext) -> AsyncIterator[None]:
    try:
        yield
    except RelayedError as error:
        await context.abort_with_status(error.status)


async def _append(artifacts: ArtifactTransfer, first: pb.UploadRequest, piece: pb.UploadRequest, received: int) -> int:
    if len(piece.data) > PIECE_BYTES:
        raise InvalidArgumentError(f"data: {len(piece.data)} bytes, of at most {PIECE_BYTES}", field="data")
    if not piece.data:
        return received
    return await artifacts.append(first.digest, piece.offset, piece.data, size=first.size)
