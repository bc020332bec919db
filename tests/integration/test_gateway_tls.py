"""A gateway with mutual TLS on all its links and both its faces, and the command line into it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import pytest
from lmesh.inference.v1 import inference_pb2_grpc
from lmesh.worker.v1 import run_pb2 as rp
from lmesh_chassis import tls
from lmesh_chassis.channel import connect
from lmesh_chassis.server import GrpcServer
from lmesh_chassis.settings import ChassisSettings
from lmesh_cli import access, mesh_link, probes
from lmesh_gateway.config import GatewaySettings
from lmesh_gateway.gateway import Gateway

from tests.certificates import Authority
from tests.gateway_scene import MODEL, app, collect, request, served_text
from tests.scripted_peers import ScriptedScheduler, ScriptedWorker

HOST = "127.0.0.1"
LENGTH = rp.SEQUENCE_FINISH_LENGTH


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def files(authority: Authority, name: str, *, mutual: bool) -> dict[str, Any]:
    pair = authority.issue(name, HOST)
    return {
        "tls_cert_file": pair.cert,
        "tls_key_file": pair.key,
        "tls_ca_file": authority.ca,
        "tls_require_client_cert": mutual,
    }


@asynccontextmanager
async def running(authority: Authority, *, mutual: bool) -> AsyncIterator[tuple[Gateway, ScriptedWorker]]:
    """A gateway whose peers take nobody without a certificate."""
    peers = tls.from_settings(ChassisSettings(**files(authority, "peer", mutual=True)))
    worker = ScriptedWorker()
    await worker.server.drain(0)
    worker.server = GrpcServer(f"{HOST}:0", domain="lmesh.worker", tls=peers)
    scheduler = ScriptedScheduler(served_text(), worker)
    await scheduler.server.drain(0)
    scheduler.server = GrpcServer(f"{HOST}:0", domain="lmesh.scheduler", tls=peers)
    await worker.open()
    await scheduler.open()
    settings = GatewaySettings(
        grpc_address=f"{HOST}:0",
        http_address=f"{HOST}:0",
        scheduler=f"{HOST}:{scheduler.port}",
        drain_timeout_s=1.0,
        drain_linger_s=0.0,
        **files(authority, "gateway", mutual=mutual),
    )
    gateway = Gateway(settings, app(settings))
    await gateway.start()
    watch = asyncio.create_task(gateway._watch())
    try:
        async with asyncio.timeout(30):
            while not (gateway.ready and gateway._grpc.serving()):  # noqa: ASYNC110 - properties, to be asked
                await asyncio.sleep(0.01)
        yield gateway, worker
    finally:
        watch.cancel()
        await gateway.drain()
        await scheduler.close()
        await worker.close()


async def test_all_links_and_faces(authority: Authority) -> None:
    client = authority.issue("client", "client")
    trusting = ssl.create_default_context(cafile=authority.ca)
    known = ssl.create_default_context(cafile=authority.ca)
    known.load_cert_chain(client.cert, client.key)
    caller = tls.from_settings(ChassisSettings(**files(authority, "caller", mutual=False)))
    async with running(authority, mutual=True) as (gateway, worker):
        grpc_port, http_port = gateway.ports
        async with connect(f"{HOST}:{grpc_port}", tls=caller) as channel:
            call = asyncio.create_task(collect(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request())))
            (await worker.sequence(0)).give([5], LENGTH)
            assert (await call).ids[0] == [5]
        async with grpc.aio.insecure_channel(f"{HOST}:{grpc_port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await collect(inference_pb2_grpc.InferenceServiceStub(channel).Generate(request(), timeout=10))
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        url = f"https://{HOST}:{http_port}/health"
        async with httpx.AsyncClient(verify=known) as http:
            assert (await http.get(url)).status_code == 200
        async with httpx.AsyncClient(verify=trusting) as http:
            with pytest.raises(httpx.TransportError):
                await http.get(url)
        async with httpx.AsyncClient() as http:
            with pytest.raises(httpx.TransportError):
                await http.get(url.replace("https", "http"))


async def test_the_command_line_gets_in(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(authority, mutual=False) as (gateway, worker):
        grpc_address, http_address = (f"{HOST}:{port}" for port in gateway.ports)
        assert not await mesh_link.is_serving(grpc_address)
        assert not await probes.http_health(http_address)()
        monkeypatch.setenv(access.CA_FILE, authority.ca)
        assert await mesh_link.is_serving(grpc_address)
        assert await probes.http_health(http_address)()
        assert await mesh_link.served_models(grpc_address) == {MODEL}
        assert await asyncio.to_thread(mesh_link.list_models, grpc_address) == [MODEL]
        options = mesh_link.ChatOptions(max_tokens=1)
        pieces = asyncio.to_thread(
            lambda: list(mesh_link.chat(grpc_address, MODEL, [("user", "hi")], options, timeout_s=30))
        )
        answer = asyncio.create_task(pieces)
        (await worker.sequence(0)).give([5], LENGTH)
        assert (await answer)[-1].completion_tokens == 1


async def test_a_ca_that_cannot_be_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(access.CA_FILE, "/nowhere/ca.pem")
    for work in (access.http_context, lambda: access.channel("127.0.0.1:1")):
        with pytest.raises(access.AccessError, match=access.CA_FILE):
            work()
