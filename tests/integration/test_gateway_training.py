"""The training API at the gateway: calls passed on for their tenant, streams that survive a scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from lmesh.training.v1 import training_pb2 as pb
from lmesh.training.v1 import training_pb2_grpc
from lmesh_chassis.api_keys import digest_of, draw_key
from lmesh_chassis.errors import InvalidArgumentError, ServiceError

from tests.scripted_training import SERVICE, UNARY, ScriptedTraining
from tests.training_scene import Scene, gateway_before, refused

MIB = 1 << 20
KEY = draw_key()
CALLER = {"metadata": (("authorization", f"Bearer {KEY}"),), "timeout": 10}


class JobNotFoundError(ServiceError):
    """As the scheduler has it."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "JOB_NOT_FOUND"


class NoTrainerError(ServiceError):
    """As the scheduler has it."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "NO_TRAINER"
    retryable = True


@pytest.fixture
async def scheduler() -> AsyncIterator[ScriptedTraining]:
    scripted = ScriptedTraining()
    await scripted.open()
    yield scripted
    await scripted.close()


@pytest.fixture
async def scene(scheduler: ScriptedTraining) -> AsyncIterator[Scene]:
    async with gateway_before(scheduler) as scene:
        yield scene


@pytest.fixture
async def secured(scheduler: ScriptedTraining, tmp_path: Path) -> AsyncIterator[Scene]:
    (tmp_path / "t.toml").write_text(f'[tenants.acme]\nkey_digests = ["{digest_of(KEY)}"]\n')
    async with gateway_before(scheduler, tenants_file=str(tmp_path / "t.toml")) as scene:
        yield scene


async def seqs(call: Any) -> list[int]:
    found = []
    while (response := await call.read()) is not grpc.aio.EOF:
        found += [event.seq for event in response.events]
    return found


class TestPassingOn:
    @pytest.mark.parametrize("name", UNARY)
    async def test_every_call_goes_to_the_scheduler_for_its_tenant(self, secured: Scene, name: str) -> None:
        request = getattr(pb, f"{name}Request")()
        for field in ("job_id", "name", "format"):
            if field in request.DESCRIPTOR.fields_by_name:
                setattr(request, field, f"some {field}")
        metadata = (*CALLER["metadata"], ("x-lmesh-tenant", "beta"))  # type: ignore[misc]
        answer = await getattr(secured.stub, name)(request, metadata=metadata, timeout=10)
        assert isinstance(answer, getattr(pb, f"{name}Response"))
        called, told, sent = await secured.scheduler.asked()
        assert (called, told) == (name, request)
        assert sent["x-lmesh-tenant"] == "acme" and "authorization" not in sent
        assert secured.scheduler.remaining_s is not None and 5 < secured.scheduler.remaining_s < 12  # gRPC rounds it up

    async def test_the_clients_tenant_is_not_believed_on_an_open_mesh_either(self, scene: Scene) -> None:
        await scene.stub.GetJob(pb.GetJobRequest(job_id="j"), metadata=(("x-lmesh-tenant", "acme"),))
        _, _, sent = await scene.scheduler.asked()
        assert sent["x-lmesh-tenant"] == ""
        assert scene.scheduler.remaining_s is not None and 500 < scene.scheduler.remaining_s < 610

    async def test_without_a_key_nothing_is_passed_on(self, secured: Scene) -> None:
        calls = [
            secured.stub.ListJobs(pb.ListJobsRequest(), timeout=10),
            seqs(secured.watch(timeout=10)),
            secured.stub.Upload(iter([pb.UploadRequest()]), timeout=10),
            secured.stub.Download(pb.DownloadRequest(), timeout=10).read(),
        ]
        for call in calls:
            assert (await refused(call)).reason == "UNAUTHENTICATED"
        assert not secured.scheduler.calls

    async def test_what_the_scheduler_refuses_is_passed_back_unchanged(self, scene: Scene) -> None:
        scene.scheduler.error = InvalidArgumentError("spec.model: is no model", field="spec.model")
        error = await refused(scene.stub.CreateJob(pb.CreateJobRequest(), timeout=10))
        assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
        assert (error.field, error.message) == ("spec.model", "spec.model: is no model")
        scene.scheduler.error = NoTrainerError("none is free", retry_after_ms=2500, metadata={"trainers": "0"})
        error = await refused(scene.stub.ValidateJob(pb.ValidateJobRequest(), timeout=10))
        assert (error.code, error.reason, error.retry_after_ms) == (grpc.StatusCode.UNAVAILABLE, "NO_TRAINER", 2500)
        assert error.metadata == {"trainers": "0", "retryable": "true"}
        assert len(scene.scheduler.calls) == 2  # trying again is for the client to decide
        scene.scheduler.error = JobNotFoundError("no job j", field="job_id")
        error = await refused(seqs(scene.watch(timeout=10)))
        assert (error.reason, error.field, error.message) == ("JOB_NOT_FOUND", "job_id", "no job j")

    async def test_the_client_cancels(self, scene: Scene) -> None:
        scene.scheduler.hold = True
        call = scene.stub.Export(pb.ExportRequest(), timeout=30)
        await scene.scheduler.asked()
        call.cancel()
        await scene.scheduler.changes.until(lambda: scene.scheduler.cancelled == ["Export"])

    async def test_the_clients_deadline(self, scene: Scene) -> None:
        scene.scheduler.hold = True
        error = await refused(scene.stub.Export(pb.ExportRequest(), timeout=0.3))
        assert error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        await scene.scheduler.changes.until(lambda: scene.scheduler.cancelled == ["Export"])

    async def test_no_scheduler(self, scene: Scene) -> None:
        await scene.scheduler.close()
        error = await refused(scene.stub.GetJob(pb.GetJobRequest(job_id="j"), timeout=10))
        assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "SCHEDULER_UNAVAILABLE")
        assert error.retry_after_ms

    async def test_a_scheduler_without_training(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        base = training_pb2_grpc.TrainingServiceServicer

        async def unimplemented(self: Any, request: Any, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no such method")

        assert hasattr(base, "GetJob")
        monkeypatch.setattr(ScriptedTraining, "GetJob", unimplemented)
        await scene.scheduler.close()
        await scene.scheduler.open()
        error = await refused(scene.stub.GetJob(pb.GetJobRequest(job_id="j"), timeout=10, wait_for_ready=True))
        assert error.reason == "SCHEDULER_UNAVAILABLE"

    async def test_health_and_reflection_know_it(self, scene: Scene) -> None:
        check = health_pb2_grpc.HealthStub(scene.channel).Check
        found = await check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=10)
        assert found.status == health_pb2.HealthCheckResponse.NOT_SERVING  # as there is no model yet
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        call = reflection_pb2_grpc.ServerReflectionStub(scene.channel).ServerReflectionInfo(iter([question]))
        (answer,) = [message async for message in call]
        assert SERVICE in {s.name for s in answer.list_services_response.service}


class TestWatch:
    async def test_events_come_as_they_happen_and_end_with_the_job(self, scene: Scene) -> None:
        scene.scheduler.happen(3)
        call = scene.watch(after=1, timeout=30)
        assert [event.seq for event in (await call.read()).events] == [2, 3]
        scene.scheduler.happen(last=True)
        assert [event.state.state for event in (await call.read()).events] == [pb.JOB_STATE_COMPLETED]
        assert await call.read() is grpc.aio.EOF and await call.code() is grpc.StatusCode.OK
        _, request, sent = await scene.scheduler.asked()
        assert request == pb.WatchJobRequest(job_id="j", after=1) and sent["x-lmesh-tenant"] == ""

    @pytest.mark.parametrize("overlap", [0, 1, 3])
    async def test_a_restart_of_the_scheduler_is_not_seen(self, scene: Scene, overlap: int) -> None:
        scene.scheduler.overlap = overlap
        scene.scheduler.happen(5)
        call = scene.watch(timeout=30)
        got = [event.seq for _ in range(3) for event in (await call.read()).events]
        for _ in range(2):
            await scene.scheduler.close()
            scene.scheduler.happen(4)
            await asyncio.sleep(0.3)
            await scene.scheduler.open()
            while len(got) < len(scene.scheduler.events):
                got += [event.seq for event in (await call.read()).events]
        scene.scheduler.happen(last=True)
        got += await seqs(call)
        assert got == list(range(1, 15))

    @pytest.mark.parametrize("before", [0, 3])
    async def test_a_scheduler_that_leaves_ends_its_streams_and_not_the_clients(
        self, scene: Scene, before: int
    ) -> None:
        scene.scheduler.happen(before)
        call = scene.watch(timeout=30)
        got: list[int] = []
        while len(got) < before:
            got += [event.seq for event in (await call.read()).events]
        await scene.scheduler.asked()
        scene.scheduler.leave()
        await asyncio.sleep(0.3)
        await scene.scheduler.close()
        scene.scheduler.leaving = False
        await scene.scheduler.open()
        scene.scheduler.happen(2, last=True)
        assert got + await seqs(call) == list(range(1, before + 3))

    async def test_a_job_that_has_ended(self, scene: Scene) -> None:
        scene.scheduler.happen(3, last=True)
        assert await seqs(scene.watch(after=3, timeout=10)) == []
        assert await seqs(scene.watch(after=1, timeout=10)) == [2, 3]

    async def test_within_the_clients_deadline(self, scene: Scene) -> None:
        scene.scheduler.happen(1)
        call = scene.watch(timeout=1.0)
        assert len((await call.read()).events) == 1
        await scene.scheduler.close()
        assert (await refused(call.read())).code is grpc.StatusCode.DEADLINE_EXCEEDED

    async def test_a_scheduler_that_does_not_come(self, scheduler: ScriptedTraining) -> None:
        await scheduler.close()
        async with gateway_before(scheduler, scheduler_grace_s=0.3) as scene:
            error = await refused(seqs(scene.watch(timeout=20)))
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "SCHEDULER_UNAVAILABLE")

    async def test_a_scheduler_that_comes_late(self, scheduler: ScriptedTraining) -> None:
        await scheduler.close()
        async with gateway_before(scheduler) as scene:
            call = asyncio.create_task(seqs(scene.watch(timeout=20)))
            await asyncio.sleep(0.3)
            scheduler.happen(2, last=True)
            await scheduler.open()
            assert await call == [1, 2]

    async def test_the_client_cancels(self, scene: Scene) -> None:
        scene.scheduler.happen(1)
        call = scene.watch()
        await call.read()
        call.cancel()
        await scene.scheduler.changes.until(lambda: scene.scheduler.cancelled == ["WatchJob"])
        await asyncio.sleep(0.2)
        assert len(scene.scheduler.calls) == 1  # it is not opened again

    async def test_the_gateway_leaves(self, scheduler: ScriptedTraining) -> None:
        scheduler.happen(1)
        async with gateway_before(scheduler, drain_timeout_s=30.0) as scene:
            call = scene.watch()
            await call.read()
            async with asyncio.timeout(10):  # it does not use up the drain's time
                await scene.gateway.drain()
            error = await refused(call.read())
            assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")

    async def test_a_slow_client_holds_the_scheduler_back(self, scene: Scene) -> None:
        scene.scheduler.events = [pb.JobEvent(seq=i + 1, phase="x" * MIB) for i in range(99)]
        scene.scheduler.happen(last=True)
        call = scene.watch(timeout=60)
        first = await call.read()
        await asyncio.sleep(1.5)
        assert scene.scheduler.written < 80  # of 100 MiB: what the windows of two connections hold
        rest = await seqs(call)
        assert [event.seq for event in first.events] + rest == list(range(1, 101))
