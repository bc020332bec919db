"""The processes of a simulated mesh: real services with a simulated network, engine and Redis under them."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import lmesh_chassis.channel
import lmesh_chassis.server
import lmesh_gateway.gateway
import lmesh_gateway.models
import lmesh_scheduler.service
import redis.asyncio
from lmesh_chassis.lifecycle import Shutdown
from lmesh_gateway.config import GatewaySettings
from lmesh_gateway.gateway import Gateway
from lmesh_kernels.text.generation import GenerationDefaults
from lmesh_scheduler.config import SchedulerSettings
from lmesh_scheduler.inheritance import read_inheritance
from lmesh_scheduler.scripts import INCARNATION_KEY, NEXT_INCARNATION, Call, Script, run
from lmesh_scheduler.service import SchedulerService
from lmesh_worker.config import WorkerSettings
from lmesh_worker.watchdog import Watchdog
from lmesh_worker.worker import ModelIdentity, Worker
from prometheus_client import CollectorRegistry
from redis.exceptions import RedisError

from tests.chaos.oracle import MODEL, TOKENIZER
from tests.chaos.rpc import SimChannel, SimServer
from tests.chaos.sim_engine import FAST_STEP_S, SLOW_STEP_S, SimEngine
from tests.chaos.sim_redis import SimRedis, SimStore
from tests.chaos.virtual_loop import Process, VirtualLoop
from tests.chaos.wires import Net

SCHEDULER = "scheduler:1"
DRAIN_S = 4.0
# Shorter than in life, in the same proportions: there is less to wait for.
SCHEDULER_SETTINGS = {
    "heartbeat_interval_s": 1.0,
    "lease_ttl_s": 3.0,
    "gateway_grace_s": 5.0,
    "gateway_lost_s": 15.0,
    "model_grace_s": 20.0,
    "drain_timeout_s": DRAIN_S,
}
GATEWAY_SETTINGS = {
    "run_resume_grace_s": 3.0,
    "scheduler_grace_s": 8.0,
    "default_deadline_s": 300.0,
    "drain_timeout_s": DRAIN_S,
}
WORKER_SETTINGS = {"run_grace_s": 6.0, "step_bound_s": 4.0, "max_unacked_steps": 256, "drain_timeout_s": DRAIN_S}
WHOLE_MODEL = ModelIdentity(model_id=MODEL, source="sim:m", digest="d" * 64, text_digest="t" * 64)


class Node:
    """One process of the mesh over all its boots. `main` is the life of one boot; `part` what it is made of."""

    def __init__(self, mesh: Mesh, name: str) -> None:
        self.mesh, self.name = mesh, name
        self.process = Process(name, 0)
        self.process.alive = False
        self.shutdown: Shutdown | None = None
        self.part: Any = None
        self._boots = 0

    @property
    def up(self) -> bool:
        """Whether a boot of it lives, paused or not."""
        return self.process.alive

    def boot(self) -> None:
        """Starts it, if it is not up."""
        if self.up:
            return
        self._boots += 1
        self.process = Process(self.name, self._boots)
        self.mesh.loop.spawn(self.process, self._live(self.process))

    async def _live(self, process: Process) -> None:
        self.shutdown = Shutdown()
        try:
            await self.main(self.shutdown)
        except Exception as error:
            self.mesh.loop.failures.append(f"{process} ended by {error!r}")
        if self.mesh.loop.disposing:
            return
        self.mesh.note(f"{process} exits")
        if process is self.process:
            self.kill()
            self.mesh.restart(self)

    async def main(self, shutdown: Shutdown) -> None:
        """One boot."""
        raise NotImplementedError

    def kill(self) -> None:
        """SIGKILL."""
        self.process.alive = False
        self.mesh.net.died(self.process)

    def replace(self) -> Process:
        """Its host is given up: a new boot begins, and the old one, unreachable and stopped, does not know."""
        old = self.process
        old.paused = True
        self.mesh.net.died(old)
        self.process = Process(self.name, self._boots)
        self.process.alive = False
        self.boot()
        return old

    def pause(self) -> None:
        """SIGSTOP."""
        self.process.paused = True

    def go_on(self) -> None:
        """SIGCONT."""
        if self.process.paused:
            self.mesh.loop.resume(self.process)


class SchedulerNode(Node):
    """Its memory goes with each boot; what it finds is what Redis kept."""

    async def main(self, shutdown: Shutdown) -> None:
        store = SimRedis(self.mesh.store)
        try:
            (incarnation,) = await run(store, [Call(_next_incarnation(), [INCARNATION_KEY], [])])  # type: ignore[arg-type]
            inherited = await read_inheritance(store)  # type: ignore[arg-type]
        except RedisError:
            return
        settings = SchedulerSettings(address=SCHEDULER, **SCHEDULER_SETTINGS)
        self.part = SchedulerService(settings, store, incarnation, inherited)  # type: ignore[arg-type]
        try:
            await self.part.run(shutdown)
        except OSError as error:  # another boot has its address: it was replaced while it slept
            self.mesh.note(f"{self.process} cannot serve: {error}")


def _next_incarnation() -> Script:
    """The scheduler's own script, by the virtual clock."""
    text = NEXT_INCARNATION.text
    assert "redis.call('TIME')[1]" in text
    return Script(text.replace("redis.call('TIME')[1]", f"{time.time():.0f}"))


class GatewayNode(Node):
    """Each boot has an id of its own."""

    async def main(self, shutdown: Shutdown) -> None:
        settings = {"scheduler": SCHEDULER, "grpc_address": f"{self.name}:1", **GATEWAY_SETTINGS}
        if "redis_url" in GatewaySettings.__dataclass_fields__:
            settings["redis_url"] = "redis://sim"
        self.part = Gateway(GatewaySettings(**settings), lambda *_: None)
        await self.part.run(shutdown)


class WorkerNode(Node):
    """A server process and an engine process, which dies with it."""

    def __init__(self, mesh: Mesh, name: str, rng: random.Random) -> None:
        super().__init__(mesh, name)
        self._rng = rng
        self._pace = rng.choice((FAST_STEP_S, FAST_STEP_S, SLOW_STEP_S))
        self.engine: SimEngine | None = None

    async def main(self, shutdown: Shutdown) -> None:
        process = Process(f"{self.name}.engine", self._boots)
        self.engine = SimEngine(self.mesh.loop, process, self._rng, self._pace, self.mesh.on_start)
        settings = WorkerSettings(
            address=f"{self.name}:1",
            advertise=f"{self.name}:1",
            scheduler=SCHEDULER,
            id=self.name,
            model="sim:m",
            **WORKER_SETTINGS,
        )
        self.part = Worker(settings, WHOLE_MODEL, self.engine, registry=CollectorRegistry())  # type: ignore[arg-type]
        await self.part.run(shutdown)

    def kill(self) -> None:
        super().kill()
        if self.engine is not None:
            self.engine.kill()


class Mesh:
    """All nodes over one network. `on_start` looks at what engines are given, `note` writes the trace."""

    def __init__(
        self,
        loop: VirtualLoop,
        net: Net,
        store: SimStore,
        rng: random.Random,
        *,
        on_start: Callable[[Any], None],
        note: Callable[[str], None],
        gateways: int = 2,
        workers: int = 2,
    ) -> None:
        self.loop, self.net, self.store = loop, net, store
        self._rng = rng
        self.on_start, self.note = on_start, note
        self.scheduler = SchedulerNode(self, "scheduler")
        self.gateways = [GatewayNode(self, f"g{i}") for i in range(gateways)]
        self.workers = [WorkerNode(self, f"w{i}", rng) for i in range(workers)]

    @property
    def nodes(self) -> list[Node]:
        return [self.scheduler, *self.gateways, *self.workers]

    def boot(self) -> None:
        for node in self.nodes:
            node.boot()

    def restart(self, node: Node, after_s: float | None = None) -> None:
        """Its supervisor starts it again."""
        delay = self._rng.uniform(0.1, 1.0) if after_s is None else after_s
        self.net.at(self.loop.now + delay, node.boot)


class _NoHttp:
    """The HTTP face is not part of the simulation."""

    port = 0

    def __init__(self, *_: object, **__: object) -> None:
        pass

    async def start(self) -> None:
        pass

    async def drain(self) -> None:
        pass


class _NoSandbox:
    def __init__(self, **_: object) -> None:
        pass

    async def close(self) -> None:
        pass


def _text(model: object) -> Any:
    return lmesh_gateway.models._Text(TOKENIZER, GenerationDefaults(), 8)


@contextmanager
def simulated_edges(loop: VirtualLoop, net: Net, store: SimStore) -> Iterator[None]:
    """Whatever a service of the mesh would open to the outside is the simulation's."""

    class RedisClass(SimRedis):
        @classmethod
        def from_url(cls, *_: object, **__: object) -> SimRedis:
            return SimRedis(store)

    edges = {
        id(lmesh_chassis.server.GrpcServer): lambda address, **options: SimServer(net, address, **options),
        id(lmesh_chassis.channel.connect): lambda address, **_: SimChannel(net, address),
        id(redis.asyncio.Redis): RedisClass,
    }
    modules = [module for name, module in sys.modules.items() if name.startswith("lmesh_") and module is not None]
    with ExitStack() as stack:
        for module in modules:
            for name, value in list(vars(module).items()):
                if (edge := edges.get(id(value))) is not None:
                    stack.enter_context(mock.patch.object(module, name, edge))
        for target, name, value in (
            (lmesh_gateway.gateway, "HttpServer", _NoHttp),
            (lmesh_gateway.gateway, "bind", lambda *_, **__: None),
            (lmesh_gateway.gateway, "TemplateSandbox", _NoSandbox),
            (lmesh_gateway.gateway, "_READY_POLL_S", 0.5),
            (lmesh_gateway.models, "_load_text", _text),
            (lmesh_scheduler.service, "TICK_S", 0.2),
            (lmesh_scheduler.service, "FLEET_WRITE_S", 5.0),
            (lmesh_scheduler.service.metrics, "exposed", lambda *_: nullcontext()),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        clock = {**(Watchdog.__init__.__kwdefaults__ or {}), "clock": loop.time}
        stack.enter_context(mock.patch.object(Watchdog.__init__, "__kwdefaults__", clock))
        yield
