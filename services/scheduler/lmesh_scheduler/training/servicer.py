"""lmesh.training.v1 as gateways reach it: everything but Upload and Download, for the tenant that a gateway names."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator
from typing import Any

from lmesh.training.v1 import training_pb2 as pb
from lmesh.training.v1 import training_pb2_grpc
from lmesh_chassis.errors import InvalidArgumentError
from lmesh_chassis.tenants import TENANT_METADATA
from redis.exceptions import RedisError

from lmesh_scheduler.adapters.publishing import Offer, check_name
from lmesh_scheduler.adapters.registry import Published
from lmesh_scheduler.errors import (
    AdapterNotFoundError,
    ElsewhereError,
    JobExistsError,
    JobNotFoundError,
    JobStateError,
    RegistryUnavailableError,
)
from lmesh_scheduler.training.jobs import Job, JobState, JobTransitionError, StoredEvent, Wish
from lmesh_scheduler.training.office import Office
from lmesh_scheduler.training.wire import adapter_message, event_message, job_message, placed

SERVICE_NAME = "lmesh.training.v1.TrainingService"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_BATCH = 256  # events of one message
MOST_NODES = 1024  # trainers of one job

RpcContext = Any  # grpc's own type leaves its messages open


class TrainingServicer(training_pb2_grpc.TrainingServiceServicer):
    """Translates and checks; the office decides."""

    def __init__(self, office: Office) -> None:
        self._office = office
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Ends what is watched: gateways go on at the next scheduler."""
        self._closing.set()

    async def CreateJob(self, request: pb.CreateJobRequest, context: RpcContext) -> pb.CreateJobResponse:
        """See the proto."""
        if request.job_id and not _ID.fullmatch(request.job_id):
            raise InvalidArgumentError(
                "job_id must be 1 to 64 letters, digits, dots, dashes or underscores", field="job_id"
            )
        if request.publish_as:
            check_name(request.publish_as)
            if makes := _makes_model(request.spec):
                said = f"publish_as is for adapters, and {makes} makes a model: export that and serve it"
                raise InvalidArgumentError(said, field="publish_as")
        _check_spec(request.spec)
        job_id, tenant = request.job_id or f"job-{uuid.uuid4().hex[:12]}", _tenant(context)
        spec = request.spec.SerializeToString(deterministic=True)
        known = self._office.desk.jobs.find(job_id)
        if known is None:
            place = self._office.place(tenant, request.spec.model, request.spec.lora.start)
            nodes = request.spec.nodes or 1
            known = self._office.create(
                job_id, tenant, request.spec.model, spec, place, request.publish_as, nodes=nodes
            )
        elif (known.tenant, known.spec, known.publish_as) != (tenant, spec, request.publish_as):
            raise JobExistsError(f"job id {job_id} is another job's; choose another", field="job_id")
        return pb.CreateJobResponse(job=job_message(known))

    async def ValidateJob(self, request: pb.ValidateJobRequest, context: RpcContext) -> pb.ValidateJobResponse:
        """See the proto."""
        _check_spec(request.spec)
        place = self._office.place(_tenant(context), request.spec.model, request.spec.lora.start)
        return await self._office.queries.validate(placed(request.spec, place))

    async def GetJob(self, request: pb.GetJobRequest, context: RpcContext) -> pb.GetJobResponse:
        """See the proto."""
        return pb.GetJobResponse(job=job_message(self._job(request.job_id, context)))

    async def ListJobs(self, request: pb.ListJobsRequest, context: RpcContext) -> pb.ListJobsResponse:
        """See the proto."""
        tenant = _tenant(context)
        jobs = [job for job in reversed(self._office.desk.jobs.all()) if job.tenant == tenant]
        return pb.ListJobsResponse(jobs=[job_message(job) for job in jobs])

    async def WatchJob(  # type: ignore[override]  # a coroutine that writes through its context
        self, request: pb.WatchJobRequest, context: RpcContext
    ) -> None:
        """See the proto."""
        job, cursor = self._job(request.job_id, context), request.after
        if cursor > job.last_event:
            raise InvalidArgumentError(f"the job's last event is {job.last_event}, not {cursor}", field="after")
        async for events in self._events(job, cursor):
            await context.write(pb.WatchJobResponse(events=[event_message(event) for event in events]))

    async def _events(self, job: Job, cursor: int) -> AsyncIterator[list[StoredEvent]]:
        woken = asyncio.Event()
        job.watchers.add(woken.set)
        closing = asyncio.create_task(self._closing.wait())
        try:
            while not closing.done():
                woken.clear()
                events = await self._after(job, cursor)
                if events:
                    cursor = events[-1].seq
                    yield events
                elif not job.live and cursor >= job.last_event:
                    return
                else:
                    waiting = asyncio.create_task(woken.wait())
                    await asyncio.wait({waiting, closing}, return_when=asyncio.FIRST_COMPLETED)
                    waiting.cancel()
        finally:
            closing.cancel()
            job.watchers.discard(woken.set)

    async def _after(self, job: Job, cursor: int) -> list[StoredEvent]:
        oldest = job.recent[0].seq if job.recent else job.last_event + 1
        if cursor + 1 >= oldest:
            return [event for event in job.recent if cursor < event.seq <= job.durable_event][:_BATCH]
        try:
            return await self._office.store.events(job.id, cursor, _BATCH)
        except (RedisError, OSError) as error:
            raise RegistryUnavailableError("Redis does not answer; try again", retry_after_ms=1000) from error

    async def StopJob(self, request: pb.StopJobRequest, context: RpcContext) -> pb.StopJobResponse:
        """See the proto."""
        self._ask(self._job(request.job_id, context), Wish.STOP)
        return pb.StopJobResponse()

    async def CancelJob(self, request: pb.CancelJobRequest, context: RpcContext) -> pb.CancelJobResponse:
        """See the proto."""
        self._ask(self._job(request.job_id, context), Wish.CANCEL)
        return pb.CancelJobResponse()

    def _ask(self, job: Job, wish: Wish) -> None:
        if not job.live:
            raise JobStateError(f"job {job.id} has ended: {job.state.value}", field="job_id")
        self._office.desk.ask(job, wish)

    async def ResumeJob(self, request: pb.ResumeJobRequest, context: RpcContext) -> pb.ResumeJobResponse:
        """See the proto."""
        job = self._job(request.job_id, context)
        try:
            self._office.desk.resume(job)
        except JobTransitionError:
            raise JobStateError(
                f"job {job.id} is {job.state.value}: there is nothing to resume", field="job_id"
            ) from None
        return pb.ResumeJobResponse(job=job_message(job))

    def _job(self, job_id: str, context: RpcContext) -> Job:
        job = self._office.desk.jobs.find(job_id)
        if job is None or job.tenant != _tenant(context):
            raise JobNotFoundError("no job of that id is known", field="job_id")
        return job

    async def ListAdapters(self, request: pb.ListAdaptersRequest, context: RpcContext) -> pb.ListAdaptersResponse:
        """See the proto."""
        tenant = _tenant(context)
        found = [e for e in self._office.adapters.all() if e.tenant == tenant and request.model in ("", e.model)]
        return pb.ListAdaptersResponse(adapters=[self._adapter(entry) for entry in found])

    async def GetAdapter(self, request: pb.GetAdapterRequest, context: RpcContext) -> pb.GetAdapterResponse:
        """See the proto."""
        entry = self._office.adapters.find(_tenant(context), request.model, request.name, request.version)
        if entry is None:
            raise AdapterNotFoundError(f"there is no {request.model}:{request.name}", field="name")
        return pb.GetAdapterResponse(adapter=self._adapter(entry))

    def _adapter(self, entry: Published) -> pb.Adapter:
        return adapter_message(entry, self._office.holders(entry))

    async def PublishAdapter(self, request: pb.PublishAdapterRequest, context: RpcContext) -> pb.PublishAdapterResponse:
        """See the proto."""
        check_name(request.name)
        offer = await self._offer(request, context)
        return pb.PublishAdapterResponse(adapter=self._adapter(await self._office.publisher.publish(offer)))

    async def _offer(self, request: pb.PublishAdapterRequest, context: RpcContext) -> Offer:
        tenant, waived = _tenant(context), request.allow_recipe_mismatch
        if request.WhichOneof("source") == "job_id":
            job = self._job(request.job_id, context)
            if not job.adapter_digest:
                raise JobStateError(f"job {job.id} has made no adapter: {job.state.value}", field="job_id")
            return Offer(
                tenant=tenant,
                model=request.model or job.model,
                name=request.name,
                digest=job.adapter_digest,
                artifact=job.artifact,
                manifest=job.manifest,
                job_id=job.id,
                allow_recipe_mismatch=waived,
            )
        if not request.artifact:
            raise InvalidArgumentError("source: set job_id or artifact", field="source")
        if not request.model:
            raise InvalidArgumentError("model: name the model that it belongs to", field="model")
        made = await self._office.queries.inspect(request.artifact)
        return Offer(
            tenant=tenant,
            model=request.model,
            name=request.name,
            digest=made.adapter_digest,
            artifact=request.artifact,
            manifest=made.manifest,
            allow_recipe_mismatch=waived,
        )

    async def DeleteAdapter(self, request: pb.DeleteAdapterRequest, context: RpcContext) -> pb.DeleteAdapterResponse:
        """See the proto."""
        await self._office.publisher.delete(_tenant(context), request.model, request.name, request.version)
        return pb.DeleteAdapterResponse()

    async def Export(self, request: pb.ExportRequest, context: RpcContext) -> pb.ExportResponse:
        """See the proto."""
        if request.WhichOneof("source") == "job_id":
            job = self._job(request.job_id, context)
            if job.state is not JobState.COMPLETED and not job.artifact:
                raise JobStateError(f"job {job.id} has made nothing: {job.state.value}", field="job_id")
            return await self._office.queries.export_job(job, request.format, request.dtype)
        tenant = _tenant(context)
        found = [e for e in self._office.adapters.with_digest(request.adapter_digest) if e.tenant == tenant]
        if not found:
            raise AdapterNotFoundError("no adapter of that content is published", field="adapter_digest")
        return await self._office.queries.export_adapter(found[0], request.format, request.dtype)

    async def Upload(self, request_iterator: object, context: RpcContext) -> pb.UploadResponse:
        """Gateways do that themselves."""
        raise ElsewhereError("artifacts go to a gateway")

    async def Download(  # type: ignore[override]
        self, request: pb.DownloadRequest, context: RpcContext
    ) -> None:
        """Gateways do that themselves."""
        raise ElsewhereError("artifacts come from a gateway")


def _tenant(context: RpcContext) -> str:
    value = dict(context.invocation_metadata() or ()).get(TENANT_METADATA, "")
    return value if isinstance(value, str) else ""


def _check_spec(spec: pb.JobSpec) -> None:
    if not spec.model:
        raise InvalidArgumentError("spec.model: name a served model or a source", field="spec.model")
    if spec.model.startswith(("/", ".", "~")) or ".." in spec.model or "\\" in spec.model:
        raise InvalidArgumentError(
            "spec.model: a path is the operator's to serve; name a served model, hub:<owner>/<name> or packaged:<name>",
            field="spec.model",
        )
    if spec.HasField("nodes") and not 1 <= spec.nodes <= MOST_NODES:
        raise InvalidArgumentError(f"spec.nodes must lie in 1..{MOST_NODES}", field="spec.nodes")
    if not spec.dataset.source:
        raise InvalidArgumentError(
            "spec.dataset.source: artifact:<digest>/<file> of an upload, or hub:<owner>/<name>",
            field="spec.dataset.source",
        )


def _makes_model(spec: pb.JobSpec) -> str:
    """The setting because of which the job makes a whole model and no adapter; empty where it makes one."""
    if spec.method == "full":
        return "method full"
    named = {
        "lora.modules_to_save": spec.lora.modules_to_save,
        "add_tokens": spec.add_tokens,
        "add_special_tokens": spec.add_special_tokens,
    }
    return next((name for name, told in named.items() if told), "")
