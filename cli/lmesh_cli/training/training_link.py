"""The command's calls to lmesh.training.v1."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import grpc
from lmesh.training.v1 import training_pb2, training_pb2_grpc
from lmesh_chassis.backoff import Backoff

from lmesh_cli import access
from lmesh_cli.mesh_link import MeshError, reach
from lmesh_cli.training import records, records_link
from lmesh_cli.training.job_file import JobFile
from lmesh_cli.training.spec_link import job_spec

T = TypeVar("T")
_CALL_TIMEOUT_S = 30.0
_LONG_TIMEOUT_S = 3600.0  # a dataset is read, or a model written
_ATTEMPTS = 5


class TrainingLink:
    """A gateway's training service; every call raises MeshError."""

    def __init__(self, address: str, *, lost_for_s: float = 300.0) -> None:
        self.address = address
        self._lost_for_s = lost_for_s  # how long a watch looks for a gateway that is gone

    def validate(self, job: JobFile) -> tuple[records.DatasetReport, records.MemoryPlan]:
        """What the job would begin with."""
        request = training_pb2.ValidateJobRequest(spec=job_spec(job.values))

        def ask() -> training_pb2.ValidateJobResponse:
            with self._stub() as stub:
                return stub.ValidateJob(request, timeout=_LONG_TIMEOUT_S, metadata=access.api_key())

        answer = retried(ask, _ATTEMPTS)  # a trainer that has just started may not have joined
        return records_link.dataset(answer.dataset), records_link.plan(answer.plan)

    def create(self, job: JobFile, job_id: str) -> records.Job:
        """Queues the job. Asked again for the same id it gives the same job, so a lost answer costs nothing."""
        request = training_pb2.CreateJobRequest(job_id=job_id, spec=job_spec(job.values), publish_as=job.publish_as)

        def ask() -> training_pb2.CreateJobResponse:
            with self._stub() as stub:
                return stub.CreateJob(request, timeout=_CALL_TIMEOUT_S, metadata=access.api_key())

        return records_link.job(retried(ask, _ATTEMPTS).job)

    def get(self, job_id: str) -> records.Job:
        """A job."""
        with self._stub() as stub:
            request = training_pb2.GetJobRequest(job_id=job_id)
            answer = stub.GetJob(request, timeout=_CALL_TIMEOUT_S, metadata=access.api_key())
        return records_link.job(answer.job)

    def jobs(self) -> list[records.Job]:
        """All jobs, newest first."""
        with self._stub() as stub:
            request = training_pb2.ListJobsRequest()
            answer = stub.ListJobs(request, timeout=_CALL_TIMEOUT_S, metadata=access.api_key())
        return [records_link.job(job) for job in answer.jobs]

    def stop(self, job_id: str) -> None:
        """Asks a job to save and stop."""
        with self._stub() as stub:
            request = training_pb2.StopJobRequest(job_id=job_id)
            stub.StopJob(request, timeout=_CALL_TIMEOUT_S, metadata=access.api_key())

    def cancel(self, job_id: str) -> None:
        """Asks a job to end at once."""
        with self._stub() as stub:
            request = training_pb2.CancelJobRequest(job_id=job_id)
            stub.CancelJob(request, timeout=_CALL_TIMEOUT_S, metadata=access.api_key())

    def resume(self, job_id: str) -> records.Job:
        """Queues an ended job again."""
        with self._stub() as stub:
            request = training_pb2.ResumeJobRequest(job_id=job_id)
            answer = stub.ResumeJob(request, timeout=_CALL_TIMEOUT_S, metadata=access.api_key())
        return records_link.job(answer.job)

    def watch(self, job_id: str) -> Iterator[records.Event]:
        """A job's events from the first to the one that ends it; a broken connection is opened again after the last."""
        seen, state = 0, records.JobState.UNKNOWN
        backoff, heard = Backoff(first_s=0.2, most_s=5.0), time.monotonic()
        while True:
            try:
                for message in self._events(job_id, seen):
                    backoff.reset()
                    heard = time.monotonic()
                    if message.seq <= seen:
                        continue
                    seen = message.seq
                    event = records_link.event(message)
                    if isinstance(event, records.StateChanged):
                        state = event.state
                    if event is not None:
                        yield event
                # A job that was resumed has ended before, so only the stream's end says that this was the last.
                if state.ended:
                    return
                heard = time.monotonic()
            except MeshError as error:
                if not error.lost or time.monotonic() - heard > self._lost_for_s:
                    raise
            time.sleep(backoff.next_s())

    def _events(self, job_id: str, after: int) -> Iterator[training_pb2.JobEvent]:
        with self._stub() as stub:
            request = training_pb2.WatchJobRequest(job_id=job_id, after=after)
            call = stub.WatchJob(request, metadata=access.api_key())
            try:
                for answer in call:
                    yield from answer.events
            finally:
                call.cancel()

    def adapters(self, model: str = "") -> list[records.Adapter]:
        """All published versions, of one model or of all."""
        with self._stub() as stub:
            request = training_pb2.ListAdaptersRequest(model=model)
            answer = stub.ListAdapters(request, timeout=_CALL_TIMEOUT_S, metadata=access.api_key())
        return [records_link.adapter(adapter) for adapter in answer.adapters]

    def publish(
        self, name: str, *, model: str = "", job_id: str = "", artifact: str = "", allow_recipe_mismatch: bool = False
    ) -> records.Adapter:
        """Makes what a job made, or an uploaded folder, the newest version of a name."""
        request = training_pb2.PublishAdapterRequest(
            model=model, name=name, allow_recipe_mismatch=allow_recipe_mismatch
        )
        if job_id:
            request.job_id = job_id
        else:
            request.artifact = artifact
        with self._stub() as stub:
            answer = stub.PublishAdapter(request, timeout=_LONG_TIMEOUT_S, metadata=access.api_key())
        return records_link.adapter(answer.adapter)

    def delete(self, model: str, name: str, version: int = 0) -> None:
        """Takes a version, or with 0 all, out of service."""
        with self._stub() as stub:
            request = training_pb2.DeleteAdapterRequest(model=model, name=name, version=version)
            stub.DeleteAdapter(request, timeout=_CALL_TIMEOUT_S, metadata=access.api_key())

    def export(self, *, job_id: str = "", adapter_digest: str = "", form: str, dtype: str = "") -> records.Export:
        """Writes what a job made or an adapter in another form, into the mesh's store."""
        request = training_pb2.ExportRequest(format=form, dtype=dtype)
        if job_id:
            request.job_id = job_id
        else:
            request.adapter_digest = adapter_digest
        with self._stub() as stub:
            answer = stub.Export(request, timeout=_LONG_TIMEOUT_S, metadata=access.api_key())
        return records.Export(artifact=answer.artifact, survival=answer.survival)

    @contextmanager
    def _stub(self) -> Iterator[training_pb2_grpc.TrainingServiceStub]:
        with reach_training(self.address) as stub:
            yield stub


@contextmanager
def reach_training(address: str) -> Iterator[training_pb2_grpc.TrainingServiceStub]:
    """The training service at host:port. What fails is raised as MeshError."""
    try:
        with reach(address) as channel:
            yield training_pb2_grpc.TrainingServiceStub(channel)
    except MeshError as error:
        if error.reason == grpc.StatusCode.UNAVAILABLE.name:  # no service said so: none was reached
            raise MeshError("", f"no gateway answers at {address}; `lmesh up` starts one", lost=True) from error
        raise


def retried(ask: Callable[[], T], attempts: int) -> T:
    """What `ask` gives, asked again when the connection was lost. Raises its last MeshError."""
    backoff = Backoff(first_s=0.2, most_s=2.0)
    for _ in range(attempts - 1):
        try:
            return ask()
        except MeshError as error:
            if not error.lost:
                raise
        time.sleep(backoff.next_s())
    return ask()
