"""One gateway between a scripted scheduler and a scripted worker, and what a client gets from it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from lmesh.inference.v1 import inference_pb2 as pb
from lmesh.inference.v1 import inference_pb2_grpc
from lmesh_chassis.errors import RemoteError, from_rpc_error
from lmesh_gateway.config import GatewaySettings
from lmesh_gateway.gateway import Gateway
from lmesh_gateway.http.app import build_app
from lmesh_kernels.text.digests import text_digest
from lmesh_kernels.text.resolve import resolve

from tests.scripted_peers import ScriptedScheduler, ScriptedWorker, ServedText

MODEL = "smollm2-135m-instruct"
SOURCE = f"packaged:{MODEL}"


def served_text() -> ServedText:
    """The packaged model, as its workers would announce it."""
    return ServedText(MODEL, SOURCE, text_digest(resolve(SOURCE)))


@dataclass
class Scene:
    """All parts of one test."""

    gateway: Gateway
    scheduler: ScriptedScheduler
    worker: ScriptedWorker
    channel: grpc.aio.Channel
    stub: Any

    def generate(self, text: str = "Hello", *, timeout: float | None = 30, **fields: Any) -> Any:
        return self.stub.Generate(request(text, **fields), timeout=timeout)


def request(text: str = "Hello", **fields: Any) -> pb.GenerateRequest:
    fields = {"sampling": pb.SamplingParams(temperature=0.0)} | fields
    if "tokens" not in fields and "chat" not in fields:
        fields["text"] = pb.TextInput(prompt=text)
    return pb.GenerateRequest(**{"model": MODEL} | fields)


def app(gateway_settings: GatewaySettings) -> Any:
    return lambda generator, directory, ready: build_app(
        generator, directory, max_body_bytes=gateway_settings.max_body_bytes, ready=ready
    )


@asynccontextmanager
async def opened(served: ServedText, **settings: Any) -> AsyncIterator[Scene]:
    worker = ScriptedWorker()
    scheduler = ScriptedScheduler(served, worker)
    await worker.open()
    await scheduler.open()
    chosen = GatewaySettings(
        **{
            "grpc_address": "127.0.0.1:0",
            "http_address": "127.0.0.1:0",
            "scheduler": f"127.0.0.1:{scheduler.port}",
            "drain_timeout_s": 1.0,
            "drain_linger_s": 0.0,
            "run_resume_grace_s": 5.0,
        }
        | settings
    )
    gateway = Gateway(chosen, app(chosen))
    await gateway.start()
    try:
        async with asyncio.timeout(30):
            while not gateway.ready:  # noqa: ASYNC110 - a property, to be asked
                await asyncio.sleep(0.01)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.ports[0]}") as channel:
            yield Scene(gateway, scheduler, worker, channel, inference_pb2_grpc.InferenceServiceStub(channel))
    finally:
        await gateway.drain()
        await scheduler.close()
        await worker.close()


@dataclass
class Collected:
    """What a client got."""

    accepted: pb.Accepted
    texts: dict[int, str]
    ids: dict[int, list[int]]
    finish: pb.Finish
    deltas: list[pb.Delta]


async def collect(call: Any) -> Collected:
    events = [event async for event in call]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "accepted" and kinds[-1] == "finish"
    assert set(kinds[1:-1]) <= {"delta"}
    deltas = [event.delta for event in events[1:-1]]
    texts: dict[int, str] = {}
    ids: dict[int, list[int]] = {}
    for delta in deltas:
        texts[delta.choice] = texts.get(delta.choice, "") + delta.text
        ids.setdefault(delta.choice, []).extend(delta.token_ids)
    return Collected(events[0].accepted, texts, ids, events[-1].finish, deltas)


async def failure(call: Any) -> tuple[RemoteError, list[Any]]:
    """The call's failure, and what came before it."""
    seen = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for event in call:
            seen.append(event)  # noqa: PERF401 - a comprehension would lose what came before the failure
    return from_rpc_error(caught.value), seen


async def first_delta(call: Any) -> pb.Delta:
    while True:
        event = await call.read()
        assert event is not grpc.aio.EOF
        if event.WhichOneof("event") == "delta":
            return event.delta
