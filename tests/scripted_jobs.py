"""A training service that plays a script behind a real gRPC server; its store is the chassis's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from lmesh.training.v1 import training_pb2, training_pb2_grpc
from lmesh_chassis.artifacts.folders import put_folder, read_folder
from lmesh_chassis.artifacts.store import FolderStore
from lmesh_chassis.artifacts.uploads import Uploads
from lmesh_chassis.errors import InvalidArgumentError, ServiceError
from lmesh_chassis.server import GrpcServer

from tests.scripted_core import loop_thread

MODEL = "small"
QUEUED, RUNNING = training_pb2.JOB_STATE_QUEUED, training_pb2.JOB_STATE_RUNNING
COMPLETED, FAILED = training_pb2.JOB_STATE_COMPLETED, training_pb2.JOB_STATE_FAILED


class JobNotFoundError(ServiceError):
    code = grpc.StatusCode.NOT_FOUND
    reason = "JOB_NOT_FOUND"


def step(number: int) -> training_pb2.JobEvent:
    told = training_pb2.Step(
        global_step=number,
        loss=3.0 / number,
        grad_norm=1.5,
        learning_rate=5e-4,
        tokens_per_second=900,
        step_time=0.5,
        peak_bytes=3 << 29,
        applied=True,
    )
    return training_pb2.JobEvent(step=told)


def state(which: training_pb2.JobState, reason: str = "", message: str = "") -> training_pb2.JobEvent:
    return training_pb2.JobEvent(state=training_pb2.StateChanged(state=which, reason=reason, message=message))


def report() -> training_pb2.DatasetReport:
    tokens = [("user: ", False), ("hi", False), ("Ahoy", True), (".", True), ("\n", False)]
    row = training_pb2.RowShown(
        tokens=[training_pb2.TokenShown(id=i, text=text, trained=on) for i, (text, on) in enumerate(tokens)]
    )
    return training_pb2.DatasetReport(
        rows=240, eval_rows=12, tokens=16000, trained_tokens=4000, longest=71, dropped=2, truncated=1, preview=[row]
    )


def plan(steps: int) -> training_pb2.MemoryPlan:
    return training_pb2.MemoryPlan(
        lines={"weights": 270 << 20, "gradients": 4 << 20},
        free_bytes=8 << 30,
        micro_tokens=2048,
        recompute="none",
        steps=steps,
        trained_parameters=2_442_240,
    )


class ScriptedTraining(training_pb2_grpc.TrainingServiceServicer):
    """One job as `script` says it; `breaks` are the events after which a watch loses its connection, once each."""

    def __init__(self, folder: Path) -> None:
        self.store = FolderStore(folder / "artifacts")
        self.uploads = Uploads(self.store, max_bytes=1 << 30)
        self.jobs: dict[str, training_pb2.Job] = {}
        self.asked: list[tuple[str, str]] = []
        self.cursors: list[int] = []
        self.breaks: list[int] = []
        self.break_upload_after: int | None = None  # pieces
        self.pieces = 0
        self.adapters: list[training_pb2.Adapter] = []
        self.exported: list[training_pb2.ExportRequest] = []
        self.script = [state(QUEUED), state(RUNNING), training_pb2.JobEvent(phase="training")]
        self.script += [training_pb2.JobEvent(plan=plan(4)), *(step(n) for n in range(1, 5)), state(COMPLETED)]

    async def ValidateJob(self, request, context):
        if request.spec.method not in ("", "lora", "full"):
            raise InvalidArgumentError(f"method {request.spec.method!r} is neither lora nor full", field="spec.method")
        self.asked.append(("validate", request.spec.dataset.source))
        return training_pb2.ValidateJobResponse(dataset=report(), plan=plan(60))

    async def CreateJob(self, request, context):
        job = training_pb2.Job(
            job_id=request.job_id, spec=request.spec, publish_as=request.publish_as, state=QUEUED, attempts=1
        )
        job.created.GetCurrentTime()
        self.jobs[request.job_id] = job
        return training_pb2.CreateJobResponse(job=job)

    async def GetJob(self, request, context):
        return training_pb2.GetJobResponse(job=self._job(request.job_id))

    async def ListJobs(self, request, context):
        return training_pb2.ListJobsResponse(jobs=self.jobs.values())

    async def WatchJob(self, request, context) -> AsyncIterator[training_pb2.WatchJobResponse]:
        self.cursors.append(request.after)
        for seq, event in enumerate(self.script, 1):
            if seq <= request.after:
                continue
            sent = training_pb2.JobEvent()
            sent.CopyFrom(event)
            sent.seq = seq
            yield training_pb2.WatchJobResponse(events=[sent])
            if seq in self.breaks:
                self.breaks.remove(seq)
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the gateway goes away")

    async def StopJob(self, request, context):
        self.asked.append(("stop", self._job(request.job_id).job_id))
        return training_pb2.StopJobResponse()

    async def CancelJob(self, request, context):
        self.asked.append(("cancel", self._job(request.job_id).job_id))
        return training_pb2.CancelJobResponse()

    async def ResumeJob(self, request, context):
        self.asked.append(("resume", request.job_id))
        return training_pb2.ResumeJobResponse(job=self._job(request.job_id))

    async def ListAdapters(self, request, context):
        found = [adapter for adapter in self.adapters if request.model in ("", adapter.model)]
        return training_pb2.ListAdaptersResponse(adapters=found)

    async def PublishAdapter(self, request, context):
        if request.artifact:
            read_folder(self.store, request.artifact)
        version = 1 + sum(adapter.name == request.name for adapter in self.adapters)
        adapter = training_pb2.Adapter(
            name=request.name,
            model=request.model or MODEL,
            version=version,
            digest=f"{version:064x}",
            artifact=request.artifact,
            manifest='{"job": {"lora": {"r": 8}}}',
            job_id=request.job_id,
            workers=1,
        )
        self.adapters.append(adapter)
        return training_pb2.PublishAdapterResponse(adapter=adapter)

    async def DeleteAdapter(self, request, context):
        self.asked.append(("delete", f"{request.model}:{request.name}@{request.version}"))
        return training_pb2.DeleteAdapterResponse()

    async def Export(self, request, context):
        self.exported.append(request)
        folder = self.store.drafts / "export"
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "sub" / "weights.bin").write_bytes(bytes(range(256)) * 10_000)  # more than two pieces
        return training_pb2.ExportResponse(artifact=put_folder(self.store, folder), survival=0.9987)

    async def Upload(self, requests, context):
        first, there = None, 0
        async for piece in requests:
            if first is None:
                first = piece
                there = self.uploads.begin(piece.digest, piece.size)
            if piece.data:
                if self.pieces == self.break_upload_after:
                    self.break_upload_after = None
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the gateway goes away")
                self.pieces += 1
                there = self.uploads.append(first.digest, piece.offset, piece.data, size=first.size)
        if there == first.size:
            self.uploads.commit(first.digest, size=first.size)
        return training_pb2.UploadResponse(received=there)

    async def Download(self, request, context) -> AsyncIterator[training_pb2.DownloadResponse]:
        with self.store.open(request.digest) as file:
            file.seek(request.offset)
            while data := file.read(1 << 20):
                yield training_pb2.DownloadResponse(data=data)
                if self.breaks:
                    self.breaks.pop()
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the gateway goes away")

    def _job(self, job_id: str) -> training_pb2.Job:
        if job_id not in self.jobs:
            raise JobNotFoundError(f"there is no job {job_id}")
        return self.jobs[job_id]


@contextmanager
def served_training(folder: Path) -> Iterator[tuple[str, ScriptedTraining]]:
    """A running training service's address, and the service."""
    service = ScriptedTraining(folder)
    with loop_thread() as loop:

        async def start() -> tuple[GrpcServer, int]:
            server = GrpcServer("127.0.0.1:0", domain="lmesh.training")
            add = training_pb2_grpc.add_TrainingServiceServicer_to_server
            server.add(add, service, "lmesh.training.v1.TrainingService")
            return server, await server.start()

        server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
        yield f"127.0.0.1:{port}", service
        asyncio.run_coroutine_threadsafe(server.drain(0), loop).result(10)
