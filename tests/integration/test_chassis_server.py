"""The chassis over real sockets: what a client gets from errors, health, reflection, keepalive and a drain."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from lmesh.inference.v1 import inference_pb2, inference_pb2_grpc
from lmesh_chassis import logs, metrics, tracing
from lmesh_chassis.channel import connect
from lmesh_chassis.errors import RemoteError, ServiceError, from_rpc_error
from lmesh_chassis.keepalive import Keepalive
from lmesh_chassis.server import GrpcServer

NAME = "lmesh.inference.v1.InferenceService"
SECRET = "hunter2 at /etc/passwd"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class QueueFullError(ServiceError):
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"
    retryable = True


class Servicer(inference_pb2_grpc.InferenceServiceServicer):
    """Fails in the ways that services fail."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.traceparent = ""

    async def ListModels(self, request: Any, context: Any) -> Any:
        raise QueueFullError("the queue is full", field="prompt", retry_after_ms=1500, metadata={"queued": "9"})

    async def Cancel(self, request: Any, context: Any) -> Any:
        raise RuntimeError(SECRET)

    async def GetRequest(self, request: Any, context: Any) -> Any:
        self.traceparent = tracing.inject()
        logging.getLogger("handler").info("seen")
        return inference_pb2.GetRequestResponse()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        yield inference_pb2.GenerateResponse()
        await self.release.wait()
        yield inference_pb2.GenerateResponse()
        raise RuntimeError(SECRET)


@asynccontextmanager
async def serving(
    keepalive: Keepalive | None = None,
) -> AsyncIterator[tuple[Servicer, GrpcServer, grpc.aio.Channel]]:
    servicer = Servicer()
    server = GrpcServer("127.0.0.1:0", domain="lmesh.test", keepalive=keepalive)
    server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, servicer, NAME)
    port = await server.start()
    async with connect(f"127.0.0.1:{port}", keepalive=keepalive) as channel:
        yield servicer, server, channel
    servicer.release.set()
    await server.drain(1)


def stub(channel: grpc.aio.Channel) -> Any:
    return inference_pb2_grpc.InferenceServiceStub(channel)


async def test_a_service_error_arrives_with_its_details() -> None:
    async with serving() as (_, _, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub(channel).ListModels(inference_pb2.ListModelsRequest(), timeout=10)
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    metadata = {"retryable": "true", "queued": "9"}
    told = RemoteError(code, "QUEUE_FULL", "the queue is full", "prompt", 1500, metadata)
    assert from_rpc_error(caught.value) == told


async def test_internal_text_never_reaches_a_client_and_the_log_has_it(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as (servicer, _, channel):
        with pytest.raises(grpc.aio.AioRpcError) as single:
            await stub(channel).Cancel(inference_pb2.CancelRequest(), timeout=10)
        servicer.release.set()
        received = []
        with pytest.raises(grpc.aio.AioRpcError) as streamed:
            async for response in stub(channel).Generate(inference_pb2.GenerateRequest(), timeout=10):
                received.append(response)  # noqa: PERF401 - what came before the failure must be kept
    assert len(received) == 2  # what was sent before the failure stays valid
    for caught in (single, streamed):
        error = from_rpc_error(caught.value)
        assert (error.code, error.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        everything = f"{caught.value!r} {caught.value.trailing_metadata()!r}"
        assert "hunter2" not in everything
        assert "RuntimeError" not in everything
        error_id = error.message.rsplit(" ", 1)[1]
        assert any(getattr(r, "error_id", "") == error_id and SECRET in str(r.exc_info) for r in caplog.records)


async def test_calls_are_counted_by_their_final_code() -> None:
    sample = {"method": f"/{NAME}/ListModels", "code": "RESOURCE_EXHAUSTED"}
    before = metrics.REGISTRY.get_sample_value("lmesh:grpc_requests_total", sample) or 0
    async with serving() as (_, _, channel):
        with pytest.raises(grpc.aio.AioRpcError):
            await stub(channel).ListModels(inference_pb2.ListModelsRequest(), timeout=10)
    assert metrics.REGISTRY.get_sample_value("lmesh:grpc_requests_total", sample) == before + 1


async def test_health_follows_the_service_and_ends_with_the_drain() -> None:
    async with serving() as (_, server, channel):
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=NAME), timeout=30)
        assert (await watch.read()).status == NOT_SERVING
        server.set_serving(NAME, True)
        assert (await watch.read()).status == SERVING
        assert (await health.Check(health_pb2.HealthCheckRequest(service=""), timeout=10)).status == NOT_SERVING
        server.set_all_serving(True)
        assert (await health.Check(health_pb2.HealthCheckRequest(service=""), timeout=10)).status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await health.Check(health_pb2.HealthCheckRequest(service="no.such.Service"), timeout=10)
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
        await server.drain(20)  # returns at once: the watch is ended by it
        assert (await watch.read()).status == NOT_SERVING
        assert await watch.read() is grpc.aio.EOF


async def test_reflection_lists_the_services() -> None:
    async with serving() as (_, _, channel):
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=10)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer = await call.read()
        await call.done_writing()
    names = {service.name for service in answer.list_services_response.service}
    assert names >= {NAME, "grpc.health.v1.Health"}


async def test_a_quiet_stream_survives_many_keepalive_intervals() -> None:
    keepalive = Keepalive(time_s=0.05, timeout_s=5)
    async with serving(keepalive) as (servicer, _, channel):
        call = stub(channel).Generate(inference_pb2.GenerateRequest(), timeout=60)
        assert await call.read() is not grpc.aio.EOF
        # Thirty intervals of silence: punished pings would end the connection, and the stream, within a few.
        asyncio.get_running_loop().call_later(30 * keepalive.time_s, servicer.release.set)
        assert await call.read() is not grpc.aio.EOF
        call.cancel()


async def test_trace_context_and_request_id_reach_the_handler_and_its_log() -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(logs.JsonFormatter("test"))
    logger = logging.getLogger("handler")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        async with serving() as (servicer, _, channel):
            metadata = ((tracing.TRACEPARENT_KEY, traceparent), ("x-request-id", "r-1"))
            await stub(channel).GetRequest(inference_pb2.GetRequestRequest(), timeout=10, metadata=metadata)
    finally:
        logger.removeHandler(handler)
    assert servicer.traceparent == traceparent
    line = json.loads(out.getvalue())
    assert line["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert line["request_id"] == "r-1"
    assert (line["service"], line["level"], line["logger"], line["message"]) == ("test", "info", "handler", "seen")
    assert line["ts"].endswith("+00:00")


def test_logs_hold_no_credentials() -> None:
    record = logging.makeLogRecord(
        {
            "name": "n",
            "levelname": "INFO",
            "msg": "calling redis://user:pw1@host/0 with Bearer pw2",
            "headers": {"Authorization": "pw3", "accept": "json"},
            "password": "pw4",
            "url": "redis://:pw5@host",
        }
    )
    text = logs.JsonFormatter("test").format(record)
    assert "pw" not in text.replace("password", "")
    assert json.loads(text)["headers"]["accept"] == "json"


async def test_the_metrics_page_answers_scrapers_and_probes() -> None:
    healthy = True
    page = await metrics.serve(0, healthy=lambda: healthy)

    async def get(path: str) -> tuple[int, str]:
        reader, writer = await asyncio.open_connection("127.0.0.1", page.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        text = (await reader.read()).decode()
        writer.close()
        return int(text.split(" ")[1]), text

    status, text = await get("/metrics")
    assert (status, "# TYPE lmesh:grpc_requests_total counter" in text) == (200, True)
    assert (await get("/health"))[0] == 200
    healthy = False
    assert (await get("/healthz"))[0] == 503
    assert (await get("/other"))[0] == 404
    await page.close()


DRAINING_SERVICE = """
import asyncio, json, sys
from pathlib import Path
from lmesh.inference.v1 import inference_pb2 as pb, inference_pb2_grpc as rpc
from lmesh_chassis import lifecycle, logs
from lmesh_chassis.server import GrpcServer

class Servicer(rpc.InferenceServiceServicer):
    async def Generate(self, request, context):
        yield pb.GenerateResponse()
        while not Path(sys.argv[1]).exists():
            await asyncio.sleep(0.01)
        yield pb.GenerateResponse()

async def main(shutdown):
    logs.setup("sample")
    server = GrpcServer("127.0.0.1:0", domain="lmesh.sample")
    server.add(rpc.add_InferenceServiceServicer_to_server, Servicer(), "lmesh.inference.v1.InferenceService")
    print(await server.start(), flush=True)
    server.set_all_serving(True)
    await shutdown.wait()
    await server.drain(30)

sys.exit(lifecycle.run(main))
"""


async def test_sigterm_drains_in_order(tmp_path: Path) -> None:
    release = tmp_path / "release"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-c", DRAINING_SERVICE, str(release), stdout=-1, stderr=-1
    )
    try:
        assert process.stdout and process.stderr
        port = int(await process.stdout.readline())
        async with connect(f"127.0.0.1:{port}") as channel:
            call = stub(channel).Generate(inference_pb2.GenerateRequest(), timeout=60)
            assert await call.read() is not grpc.aio.EOF
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=NAME), timeout=60)
            while (await watch.read()).status != SERVING:
                pass
            process.send_signal(signal.SIGTERM)
            assert (await watch.read()).status == NOT_SERVING  # first health ...
            await _refused(port)  # ... then nothing new ...
            assert process.returncode is None
            release.touch()
            assert await call.read() is not grpc.aio.EOF  # ... while what runs goes on to its end
            assert await call.read() is grpc.aio.EOF
        assert await asyncio.wait_for(process.wait(), 20) == 0
        lines = [json.loads(line) for line in (await process.stderr.read()).decode().splitlines()]
        assert lines[-1]["message"] == "server stopped"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _refused(port: int) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=5):
                    await asyncio.sleep(0.01)
            except ConnectionRefusedError:
                return
            except ConnectionResetError:
                continue  # in the listener's queue when it closed


async def test_a_second_signal_forces_the_exit(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-c", DRAINING_SERVICE, str(tmp_path / "never"), stdout=-1
    )
    assert process.stdout
    port = int(await process.stdout.readline())
    async with connect(f"127.0.0.1:{port}") as channel:
        call = stub(channel).Generate(inference_pb2.GenerateRequest(), timeout=60)
        assert await call.read() is not grpc.aio.EOF
        process.send_signal(signal.SIGTERM)
        await _refused(port)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 130
