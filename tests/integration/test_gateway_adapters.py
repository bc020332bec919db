"""`model:adapter` at the gateway: whose it is, which version runs, and that a request keeps the one it began with."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from lmesh.inference.v1 import inference_pb2 as pb
from lmesh.scheduler.v1 import dispatch_pb2 as dp
from lmesh.worker.v1 import run_pb2 as rp
from lmesh_chassis.api_keys import digest_of, draw_key
from lmesh_gateway.ledger_record import record_key
from redis.asyncio import Redis

from tests.gateway_scene import MODEL, Scene, collect, failure, first_delta, opened, request, served_text
from tests.redis_server import RedisServer, running_redis
from tests.scripted_peers import ScriptedWorker, ServedText

LENGTH = rp.SEQUENCE_FINISH_LENGTH
NOT_LOADED = rp.SlotError(entry=0, reason="ADAPTER_NOT_LOADED", message="no such adapter here")
ADA = f"{MODEL}:ada"
KEYS = {"acme": draw_key(), "beta": draw_key()}


@pytest.fixture(scope="module")
def served() -> ServedText:
    return served_text()


@pytest.fixture
async def scene(served: ServedText) -> AsyncIterator[Scene]:
    async with opened(served) as scene:
        await publish(scene, "", "ada", 1, 2)
        yield scene


@pytest.fixture
async def shared(served: ServedText, tmp_path: Path) -> AsyncIterator[Scene]:
    tables = "".join(f'[tenants.{n}]\nkey_digests = ["{digest_of(k)}"]\n' for n, k in KEYS.items())
    (tmp_path / "tenants.toml").write_text(tables)
    async with opened(served, tenants_file=str(tmp_path / "tenants.toml")) as scene:
        await publish(scene, "beta", "secret", 3)
        await publish(scene, "acme", "ada", 1, 2)
        yield scene


@pytest.fixture
async def redis() -> AsyncIterator[RedisServer]:
    async with running_redis() as running:
        yield running


async def publish(scene: Scene, tenant: str, name: str, *versions: int) -> None:
    """Returns once the gateway knows it."""
    scene.scheduler.publish(tenant, name, *versions)
    async with asyncio.timeout(10):
        while True:
            shown = {model.id: model.adapter for model in scene.gateway.directory.list(tenant)}
            newest = f"{tenant}-{name}-{max(versions)}" if versions else None
            if shown.get(f"{MODEL}:{name}") == newest:
                return
            await asyncio.sleep(0.005)


def bearer(tenant: str) -> dict[str, Any]:
    return {"metadata": (("authorization", f"Bearer {KEYS[tenant]}"),), "timeout": 30}


def url(scene: Scene, path: str) -> str:
    return f"http://127.0.0.1:{scene.gateway.ports[1]}{path}"


@pytest.mark.parametrize(("asked", "digest"), [(ADA, "-ada-2"), (f"{ADA}@1", "-ada-1"), (f"{ADA}@2", "-ada-2")])
async def test_the_base_is_submitted_with_the_adapters_content(scene: Scene, asked: str, digest: str) -> None:
    call = asyncio.create_task(collect(scene.generate(model=asked, sampling=pb.SamplingParams(n=2))))
    both = [await scene.worker.sequence(i) for i in range(2)]
    submit = (await scene.scheduler.record()).submit
    assert (submit.model, submit.adapter) == (MODEL, digest)
    assert [running.start.adapter for running in both] == [digest, digest]
    for running in both:
        running.give([5], LENGTH)
    assert (await call).ids == {0: [5], 1: [5]}


async def test_the_base_alone_has_none(scene: Scene) -> None:
    call = asyncio.create_task(collect(scene.generate()))
    running = await scene.worker.sequence(0)
    assert (running.start.adapter, (await scene.scheduler.record()).submit.adapter) == ("", "")
    running.give([5], LENGTH)
    await call


@pytest.mark.parametrize("asked", [f"{ADA}@3", f"{ADA}@0", f"{ADA}@01", f"{ADA}@", f"{MODEL}:", f"{MODEL}:x", ":ada"])
async def test_what_is_not_there(scene: Scene, asked: str) -> None:
    error, _ = await failure(scene.generate(model=asked))
    assert (error.code, error.reason, error.field) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "model")
    assert error.message.endswith(f"served now: {MODEL}, {ADA}")
    assert not scene.scheduler.records


async def test_anothers_adapter_does_not_exist(shared: Scene) -> None:
    for asked in (ADA, f"{ADA}@1"):
        error, _ = await failure(shared.stub.Generate(request(model=asked), **bearer("beta")))
        assert error.reason == "MODEL_NOT_FOUND"
        assert error.message.endswith(f"served now: {MODEL}, {MODEL}:secret")
    call = asyncio.create_task(collect(shared.stub.Generate(request(model=ADA), **bearer("acme"))))
    running = await shared.worker.sequence(0)
    assert running.start.adapter == "acme-ada-2"
    running.give([5], LENGTH)
    await call


async def test_models_are_listed_with_the_callers_adapters(shared: Scene) -> None:
    for tenant, shown in (("acme", ADA), ("beta", f"{MODEL}:secret")):
        models = (await shared.stub.ListModels(pb.ListModelsRequest(), **bearer(tenant))).models
        assert [model.id for model in models] == [MODEL, shown]
        async with httpx.AsyncClient(headers={"x-api-key": KEYS[tenant]}) as http:
            base, adapter = (await http.get(url(shared, "/v1/models"))).json()["data"]
            assert (base["id"], base["root"], base["parent"]) == (MODEL, MODEL, None)
            assert (adapter["id"], adapter["root"], adapter["parent"]) == (shown, MODEL, MODEL)
            assert adapter["created"] > base["created"] and adapter["max_model_len"] == base["max_model_len"]
            assert (await http.get(url(shared, f"/v1/models/{shown}"))).json() == adapter
            one = await http.get(url(shared, f"/v1/models/{ADA}@1"))
            assert one.status_code == (200 if tenant == "acme" else 404)


async def test_http_answers_show_the_adapter_and_metrics_the_base(scene: Scene) -> None:
    body = {"model": ADA, "prompt": "Hello", "max_tokens": 1, "echo": True}
    async with httpx.AsyncClient(timeout=30) as http:
        call = asyncio.create_task(http.post(url(scene, "/v1/completions"), json=body))
        (await scene.worker.sequence(0)).give([5], LENGTH)
        assert (await call).json()["model"] == ADA
        chat = {"model": f"{ADA}@1", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        call = asyncio.create_task(http.post(url(scene, "/v1/chat/completions"), json=chat))
        (await scene.worker.sequence(1)).give([5], LENGTH)
        chunks = [line[6:] for line in (await call).text.splitlines() if line.startswith("data: {")]
        assert {json.loads(chunk)["model"] for chunk in chunks} == {f"{ADA}@1"}
        page = (await http.get(url(scene, "/metrics"))).text
    assert ":ada" not in page and f'model_name="{MODEL}"' in page


async def test_a_worker_without_it_costs_the_placement_only(scene: Scene) -> None:
    other = ScriptedWorker("worker-2", "epoch-2")
    await other.open()
    call = asyncio.create_task(collect(scene.generate(model=ADA)))
    running = await scene.worker.sequence(0)
    running.give([5])
    record = await scene.scheduler.begun()
    await publish(scene, "", "ada", 1, 2, 3)
    scene.worker.step([(running, [], rp.SEQUENCE_FINISH_ERROR)], errors=[NOT_LOADED])
    await scene.scheduler.changes.until(lambda: scene.scheduler.legs_lost)
    assert scene.scheduler.legs_lost[0].reason == "ADAPTER_NOT_LOADED"
    scene.scheduler.worker = other
    scene.scheduler.place(record)
    again = await other.sequence(0)
    assert again.start.adapter == "-ada-2" and list(again.start.ids)[-1] == 5
    again.give([6], LENGTH)
    assert (await call).ids[0] == [5, 6]
    assert not scene.scheduler.workers_lost
    await other.close()


async def test_a_new_scheduler_is_told_of_the_adapter(scene: Scene) -> None:
    call = asyncio.create_task(collect(scene.generate(model=ADA)))
    running = await scene.worker.sequence(0)
    running.give([5])
    await scene.scheduler.begun()
    scene.scheduler.restart()
    await scene.scheduler.changes.until(lambda: scene.scheduler.announces)
    told = scene.scheduler.announces[0].submit
    assert (told.model, told.adapter) == (MODEL, "-ada-2")
    running.give([6], LENGTH)
    assert (await call).ids[0] == [5, 6]


@pytest.mark.parametrize(
    ("reason", "code", "told"),
    [
        ("ADAPTER_NOT_FOUND", grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND"),
        ("ADAPTER_MISFIT", grpc.StatusCode.FAILED_PRECONDITION, "ADAPTER_REFUSED"),
        ("WORKER_LOST", grpc.StatusCode.UNAVAILABLE, "WORKER_LOST"),
    ],
)
async def test_what_the_scheduler_says_of_it(scene: Scene, reason: str, code: Any, told: str) -> None:
    def revoke(record: Any) -> None:
        scene.scheduler.tell(revoked=[dp.Revoked(request_id=record.submit.request_id, reason=reason)])

    scene.scheduler.react = revoke
    error, _ = await failure(scene.generate(model=ADA))
    assert (error.code, error.reason) == (code, told)
    if told == "ADAPTER_REFUSED":
        assert error.metadata["worker_reason"] == reason


async def test_a_refusal_at_the_door(scene: Scene) -> None:
    def refuse(record: Any) -> None:
        refused = dp.Refused(request_id=record.submit.request_id, reason="ADAPTER_NOT_FOUND", message="it is gone")
        scene.scheduler.tell(refused=[refused])

    scene.scheduler.react = refuse
    error, _ = await failure(scene.generate(model=ADA))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "ADAPTER_NOT_FOUND")


class TestResume:
    @pytest.mark.parametrize("since", [(1, 2, 3), (1,), ()])  # a newer version, this one deleted, all deleted
    async def test_it_goes_on_with_the_version_it_began_with(
        self, served: ServedText, redis: RedisServer, since: tuple[int, ...]
    ) -> None:
        async with opened(served, redis_url=redis.url, drain_timeout_s=0.5) as scene:
            await publish(scene, "", "ada", 1, 2)
            call = asyncio.create_task(failure(scene.generate(model=ADA, request_id="r")))
            (await scene.worker.sequence(0)).give([5, 6])
            await scene.scheduler.begun()
            await scene.gateway.drain()
            assert (await call)[0].reason == "DRAINING"
        async with opened(served, redis_url=redis.url) as scene:
            await publish(scene, "", "ada", *since)
            headers = {"last-event-id": "r/1"}
            async with httpx.AsyncClient(timeout=30, headers=headers) as http:
                rest = asyncio.create_task(http.get(url(scene, "/v1/completions/r/stream")))
                running = await scene.worker.sequence(0)
                assert running.start.adapter == "-ada-2" and list(running.start.ids)[-2:] == [5, 6]
                submit = scene.scheduler.takeovers[0].submit
                assert (submit.model, submit.adapter) == (MODEL, "-ada-2")
                running.give([7], LENGTH)
                chunks = [line[6:] for line in (await rest).text.splitlines() if line.startswith("data: {")]
            assert {json.loads(chunk)["model"] for chunk in chunks} == {ADA}
            again = await collect(scene.stub.Resume(pb.ResumeRequest(request_id="r"), timeout=30))
            assert again.ids == {0: [5, 6, 7]}

    async def test_a_record_from_before_there_were_adapters(self, served: ServedText, redis: RedisServer) -> None:
        detach = {"on_disconnect": pb.ON_DISCONNECT_DETACH}
        async with opened(served, redis_url=redis.url, drain_timeout_s=0.5) as scene:
            call = scene.generate(request_id="r", **detach)
            (await scene.worker.sequence(0)).give([5])
            await first_delta(call)
            await scene.gateway.drain()
        async with Redis.from_url(redis.url) as client:
            plan = json.loads(await client.hget(record_key("r"), "plan") or b"")  # type: ignore[misc]
            del plan["base"], plan["adapter"]
            await client.hset(record_key("r"), "plan", json.dumps(plan))  # type: ignore[misc]
        async with opened(served, redis_url=redis.url) as scene:
            rest = asyncio.create_task(collect(scene.stub.Resume(pb.ResumeRequest(request_id="r"), timeout=30)))
            running = await scene.worker.sequence(0)
            assert running.start.adapter == ""
            running.give([6], LENGTH)
            assert (await rest).ids == {0: [5, 6]}
