"""API keys at the gateway's two faces: who is let in, as whom, and what one tenant can see of another."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from lmesh.inference.v1 import inference_pb2 as pb
from lmesh.worker.v1 import run_pb2 as rp
from lmesh_chassis.api_keys import digest_of, draw_key
from lmesh_chassis.errors import from_rpc_error
from lmesh_chassis.settings import SettingsError
from lmesh_cli import access, mesh_link, probes
from lmesh_gateway.config import GatewaySettings
from lmesh_gateway.gateway import Gateway

from tests.gateway_scene import MODEL, Scene, app, collect, failure, opened, request, served_text

A, B = draw_key(), draw_key()
LENGTH = rp.SEQUENCE_FINISH_LENGTH


def bearer(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    tables = "".join(f'[tenants.{n}]\nkey_digests = ["{digest_of(k)}"]\n' for n, k in (("acme", A), ("beta", B)))
    (tmp_path / "tenants.toml").write_text(tables)
    async with opened(served_text(), tenants_file=str(tmp_path / "tenants.toml"), cache_salt_key="salty") as scene:
        yield scene


def url(scene: Scene, path: str) -> str:
    return f"http://127.0.0.1:{scene.gateway.ports[1]}{path}"


async def refused(call: Any) -> tuple[grpc.StatusCode, str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = from_rpc_error(caught.value)
    return error.code, error.reason, error.message


async def test_a_key_makes_the_tenant(scene: Scene) -> None:
    for index, metadata in enumerate((bearer(A), (("x-api-key", A),))):
        call = asyncio.create_task(collect(scene.stub.Generate(request(), timeout=30, metadata=metadata)))
        running = await scene.worker.sequence(index)
        submit = (await scene.scheduler.record(index)).submit
        salt = hmac.new(b"salty", b"acme", hashlib.sha256).hexdigest()
        assert (submit.tenant, submit.cache_salt, running.start.cache_salt) == ("acme", salt, salt)
        running.give([5], LENGTH)
        assert (await call).ids[0] == [5]


@pytest.mark.parametrize("metadata", [(), bearer("wrong"), (("x-api-key", "wrong"),), bearer("")])
async def test_without_a_known_key_nothing_is_done(scene: Scene, metadata: Any) -> None:
    error, before = await failure(scene.stub.Generate(request(), timeout=30, metadata=metadata))
    assert (error.code, error.reason, before) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", [])
    for call in (
        scene.stub.ListModels(pb.ListModelsRequest(), timeout=10, metadata=metadata),
        scene.stub.Cancel(pb.CancelRequest(request_id="r"), timeout=10, metadata=metadata),
        scene.stub.GetRequest(pb.GetRequestRequest(request_id="r"), timeout=10, metadata=metadata),
    ):
        code, reason, message = await refused(call)
        assert (code, reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
        assert "wrong" not in message
    assert not scene.scheduler.records


async def test_health_and_reflection_are_open(scene: Scene) -> None:
    check = health_pb2_grpc.HealthStub(scene.channel).Check
    assert (await check(health_pb2.HealthCheckRequest(), timeout=10)).status != health_pb2.HealthCheckResponse.UNKNOWN
    question = reflection_pb2.ServerReflectionRequest(list_services="")
    call = reflection_pb2_grpc.ServerReflectionStub(scene.channel).ServerReflectionInfo(iter([question]), timeout=10)
    (answer,) = [message async for message in call]
    assert "lmesh.inference.v1.InferenceService" in {s.name for s in answer.list_services_response.service}


async def test_anothers_request_is_not_found(scene: Scene) -> None:
    call = asyncio.create_task(collect(scene.stub.Generate(request(request_id="r"), timeout=30, metadata=bearer(A))))
    running = await scene.worker.sequence(0)

    def cancel(key: str, name: str = "r") -> Any:
        return scene.stub.Cancel(pb.CancelRequest(request_id=name), timeout=10, metadata=bearer(key))

    def get(key: str, name: str = "r") -> Any:
        return scene.stub.GetRequest(pb.GetRequestRequest(request_id=name), timeout=10, metadata=bearer(key))

    unknown = await refused(get(B, "q"))
    assert unknown[:2] == (grpc.StatusCode.NOT_FOUND, "REQUEST_NOT_FOUND")
    foreign = (*unknown[:2], unknown[2].replace("q", "r"))  # nothing tells it from one that does not exist

    def hidden(told: tuple[Any, ...]) -> bool:
        return told[:2] == foreign[:2] and told[2] == unknown[2].replace(" q ", " r ")

    assert hidden(await refused(get(B))) and hidden(await refused(cancel(B)))
    assert (await get(A)).state == pb.REQUEST_STATE_PLACED
    running.give([5], LENGTH)
    assert (await call).ids[0] == [5]
    await scene.scheduler.ended()
    assert hidden(await refused(get(B))) and hidden(await refused(cancel(B)))
    assert (await get(A)).state == pb.REQUEST_STATE_FINISHED
    assert (await refused(cancel(A)))[1] == "REQUEST_ENDED"


async def test_the_owner_cancels(scene: Scene) -> None:
    call = asyncio.create_task(failure(scene.stub.Generate(request(request_id="r"), timeout=30, metadata=bearer(A))))
    await scene.worker.sequence(0)
    await scene.stub.Cancel(pb.CancelRequest(request_id="r"), timeout=10, metadata=(("x-api-key", A),))
    assert (await call)[0].reason == "CANCELLED"


class TestHttp:
    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/v1/models"),
            ("GET", f"/v1/models/{MODEL}"),
            ("POST", "/v1/completions"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/nothing"),
            ("GET", "/health/"),
            ("GET", "//health"),
        ],
    )
    async def test_no_key_no_answer(self, scene: Scene, method: str, path: str) -> None:
        body = {"model": MODEL, "prompt": "x"}
        async with httpx.AsyncClient() as http:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}):
                got = await http.request(method, url(scene, path), json=body, headers={**headers, "x-request-id": "r"})
                assert got.status_code == 401
                error = got.json()["error"]
                assert (error["type"], error["code"]) == ("authentication_error", "UNAUTHENTICATED")
                assert (got.headers["www-authenticate"], got.headers["x-request-id"]) == ("Bearer", "r")
        assert not scene.scheduler.records

    @pytest.mark.parametrize("path", ["/health", "/metrics", "/version", "/docs", "/openapi.json"])
    async def test_what_is_open(self, scene: Scene, path: str) -> None:
        async with httpx.AsyncClient() as http:
            assert (await http.get(url(scene, path))).status_code == 200

    @pytest.mark.parametrize("headers", [{"authorization": f"Bearer {B}"}, {"x-api-key": B}])
    async def test_a_key_makes_the_tenant(self, scene: Scene, headers: dict[str, str]) -> None:
        async with httpx.AsyncClient(timeout=30) as http:
            body = {"model": MODEL, "prompt": "Hello", "max_tokens": 1}
            call = asyncio.create_task(http.post(url(scene, "/v1/completions"), json=body, headers=headers))
            (await scene.worker.sequence(0)).give([5], LENGTH)
            assert (await call).status_code == 200
            assert (await scene.scheduler.record()).submit.tenant == "beta"
            assert (await http.get(url(scene, "/v1/models"), headers=headers)).json()["data"][0]["id"] == MODEL

    async def test_refusals_are_counted_and_keep_the_connection(self, scene: Scene) -> None:
        async with httpx.AsyncClient() as http:
            for _ in range(2):
                assert (await http.post(url(scene, "/v1/completions"), content=b"x" * 100_000)).status_code == 401
            page = (await http.get(url(scene, "/metrics"))).text
        counted = [line for line in page.splitlines() if line.startswith('lmesh:unauthenticated_total{face="http"}')]
        assert len(counted) == 1 and float(counted[0].split()[-1]) >= 2

    async def test_openai_client(self, scene: Scene) -> None:
        async with openai.AsyncOpenAI(base_url=url(scene, "/v1"), api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        async with openai.AsyncOpenAI(base_url=url(scene, "/v1"), api_key=A, max_retries=0) as client:
            assert [model.id async for model in client.models.list()] == [MODEL]


async def test_the_command_line_brings_its_key(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{scene.gateway.ports[0]}"
    monkeypatch.delenv(access.API_KEY, raising=False)
    assert await mesh_link.served_models(address) is None
    assert await probes.models(address, frozenset({"any"}))()  # nobody can ask: health has to do
    with pytest.raises(mesh_link.MeshError, match="UNAUTHENTICATED"):
        await asyncio.to_thread(mesh_link.list_models, address)
    monkeypatch.setenv(access.API_KEY, "wrong")
    assert await mesh_link.served_models(address) == frozenset()
    monkeypatch.setenv(access.API_KEY, A)
    assert await mesh_link.served_models(address) == {MODEL}
    assert not await probes.models(address, frozenset({"any"}))()
    assert await asyncio.to_thread(mesh_link.list_models, address) == [MODEL]


async def test_a_key_in_no_log_line(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with httpx.AsyncClient() as http:
        for key in (A, "wrong-key"):
            await http.get(url(scene, "/v1/models"), headers={"authorization": f"Bearer {key}"})
    ours = [record for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert not [r for r in ours if A in str(vars(r)) or "wrong-key" in str(vars(r))]


async def test_a_faulty_file_stops_the_boot(tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text("[tenants.a]\n")
    settings = GatewaySettings(tenants_file=str(tmp_path / "t.toml"))
    with pytest.raises(SettingsError, match=r"LMESH_GATEWAY_TENANTS_FILE: .*key_digests: must be given"):
        Gateway(settings, app(settings))
