"""A gateway before a scripted training service, and a client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from lmesh.training.v1 import training_pb2 as pb
from lmesh.training.v1 import training_pb2_grpc
from lmesh_chassis.errors import RemoteError, from_rpc_error
from lmesh_gateway.config import GatewaySettings
from lmesh_gateway.gateway import Gateway

from tests.gateway_scene import app
from tests.scripted_training import ScriptedTraining


@dataclass
class Scene:
    """A gateway before a scripted scheduler."""

    gateway: Gateway
    scheduler: ScriptedTraining
    channel: grpc.aio.Channel
    stub: Any

    def watch(self, after: int = 0, **options: Any) -> Any:
        return self.stub.WatchJob(pb.WatchJobRequest(job_id="j", after=after), **options)


@asynccontextmanager
async def gateway_before(scheduler: ScriptedTraining, **settings: Any) -> AsyncIterator[Scene]:
    addresses = {"grpc_address": "127.0.0.1:0", "http_address": "127.0.0.1:0", "drain_linger_s": 0.0}
    address = f"127.0.0.1:{scheduler.port}"
    chosen = GatewaySettings(**{**addresses, "scheduler": address, "drain_timeout_s": 1.0} | settings)
    gateway = Gateway(chosen, app(chosen))
    await gateway.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.ports[0]}") as channel:
            yield Scene(gateway, scheduler, channel, training_pb2_grpc.TrainingServiceStub(channel))
    finally:
        await gateway.drain()


async def refused(call: Any) -> RemoteError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)
