"""The scheduler process: the core, its links, its journal and its clock, from boot to drain."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any

from lmesh.scheduler.v1 import dispatch_pb2_grpc, fleet_pb2_grpc, trainers_pb2_grpc
from lmesh.training.v1 import training_pb2_grpc
from lmesh_chassis import lifecycle, tls
from lmesh_chassis import metrics as chassis_metrics
from lmesh_chassis.lifecycle import Shutdown
from lmesh_chassis.server import GrpcServer
from lmesh_chassis.tasks import end
from lmesh_chassis.tenants import load_tenants
from prometheus_client import REGISTRY
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from lmesh_scheduler import dispatch_servicer, fleet_servicer, metrics
from lmesh_scheduler.config import SchedulerSettings
from lmesh_scheduler.errors import DOMAIN
from lmesh_scheduler.fleet_store import FleetStore
from lmesh_scheduler.index_store import IndexStore
from lmesh_scheduler.inheritance import Inheritance, read_inheritance
from lmesh_scheduler.journal import Journal
from lmesh_scheduler.orphan_store import OrphanStore
from lmesh_scheduler.scheduler import Scheduler
from lmesh_scheduler.scripts import FencedError, next_incarnation
from lmesh_scheduler.tenant_store import TenantStore
from lmesh_scheduler.training import servicer as training_servicer
from lmesh_scheduler.training import trainers_servicer
from lmesh_scheduler.training.office import Office

log = logging.getLogger(__name__)

TICK_S = 0.05
FLEET_WRITE_S = 1.0
JOBS_WRITE_S = 0.1
FLUSH_S = 5.0
LINKS_END_S = 2.0


class SchedulerService:
    """One boot of the scheduler. Redis must answer at its start, and may go away afterwards."""

    def __init__(
        self, settings: SchedulerSettings, redis: Redis, incarnation: int, inherited: Inheritance | None = None
    ) -> None:
        self._settings = settings
        self._journal = Journal(
            redis,
            incarnation=incarnation,
            limit=settings.journal_limit,
            live_ttl_s=settings.live_record_ttl_s,
            ended_ttl_s=settings.record_ttl_s,
        )
        self.scheduler = Scheduler(
            settings,
            incarnation=incarnation,
            clock=time.monotonic,
            wall=time.time,
            journal=self._journal.note,
            inherited=inherited,
            tenants=load_tenants(settings.tenants_file) if settings.tenants_file else None,
        )
        self._store = FleetStore(redis, incarnation=incarnation, ttl_s=max(10.0, 2 * settings.lease_ttl_s))
        ttl_s = max(60.0, 4 * settings.lease_ttl_s)
        self._index_store = IndexStore(redis, self.scheduler.index, incarnation=incarnation, ttl_s=ttl_s)
        self._orphan_store = OrphanStore(
            redis, self.scheduler.orphans, incarnation=incarnation, limit=settings.journal_limit
        )
        self._tenant_store = TenantStore(redis, self.scheduler.limits, incarnation=incarnation, wall=time.time)
        self._dispatch = dispatch_servicer.DispatchServicer(self.scheduler, self._journal)
        self._fleet = fleet_servicer.FleetServicer(
            self.scheduler, settings, clock=time.monotonic, journal_ok=lambda: self._journal.ok
        )
        self.office = Office(settings, redis, self.scheduler, jobs=inherited.jobs if inherited else ())
        self._training = training_servicer.TrainingServicer(self.office)
        self._trainers = trainers_servicer.TrainersServicer(
            self.office.desk, self.office.queries, settings, incarnation=incarnation
        )
        self.server = self._build_server()

    def _build_server(self) -> GrpcServer:
        settings = self._settings
        server = GrpcServer(
            settings.address, domain=DOMAIN, reflection=settings.reflection, tls=tls.from_settings(settings)
        )
        add_dispatch = dispatch_pb2_grpc.add_DispatchServiceServicer_to_server
        server.add(add_dispatch, self._dispatch, dispatch_servicer.SERVICE_NAME)
        server.add(fleet_pb2_grpc.add_FleetServiceServicer_to_server, self._fleet, fleet_servicer.SERVICE_NAME)
        add_trainers = trainers_pb2_grpc.add_TrainerServiceServicer_to_server
        server.add(add_trainers, self._trainers, trainers_servicer.SERVICE_NAME)
        add_training = training_pb2_grpc.add_TrainingServiceServicer_to_server
        server.add(add_training, self._training, training_servicer.SERVICE_NAME)
        return server

    async def run(self, shutdown: Shutdown) -> int:
        """Serves until `shutdown` (0) or until a newer scheduler takes over (1)."""
        with metrics.exposed(REGISTRY, self.scheduler, self._journal, self.office):
            page = await self._metrics_page()
            try:
                await self._find_orphans()
                port = await self.server.start()
                self.server.set_all_serving(True)
                lifecycle.settle()
                log.info("ready", extra={"port": port, "incarnation": self.scheduler.incarnation})
                return await self._serve(shutdown)
            finally:
                if page is not None:
                    await page.close()

    async def _find_orphans(self) -> None:
        """Before any gateway speaks, if Redis is quick; what does not get through is tried again with the writes."""
        try:
            async with asyncio.timeout(self._settings.redis_timeout_s):
                await self._orphan_store.read()
        except FencedError:
            pass  # the first write says so and ends this process in order
        except (RedisError, OSError) as error:
            self._journal.heard(False, str(error))

    async def _serve(self, shutdown: Shutdown) -> int:
        try:
            await self._tenant_store.read()
        except (RedisError, OSError) as error:
            self._journal.heard(False, str(error))
        work = [asyncio.create_task(w) for w in self._work()]
        asked = asyncio.create_task(shutdown.wait())
        leaving: asyncio.Task[None] | None = None
        try:
            await asyncio.wait({asked, *work}, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                # What ends while draining is still journaled, and being fenced off still ends everything at once.
                leaving = asyncio.create_task(self._drain())
                await asyncio.wait({leaving, *work}, return_when=asyncio.FIRST_COMPLETED)
            if leaving is not None and leaving.done():
                leaving.result()
            if failed := [task for task in work if task.done()]:
                return await self._failed(failed)
        finally:
            await end(*work, asked, *([leaving] if leaving else []))
        try:
            await self._journal.drain(FLUSH_S)
        except FencedError:  # by a scheduler that came while this one left: what is to be written is its own to know
            log.error("fenced")
            return 1
        return 0

    def _work(self) -> list[Coroutine[Any, Any, None]]:
        return [self._journal.run(), self._tick(), self._write_fleet(), self._write_jobs()]

    async def _metrics_page(self) -> chassis_metrics.MetricsServer | None:
        settings = self._settings
        if not settings.metrics_port:
            return None
        return await chassis_metrics.serve(
            settings.metrics_port, host=settings.metrics_host, healthy=self.server.serving
        )

    async def _failed(self, tasks: list[asyncio.Task[None]]) -> int:
        for task in tasks:
            if (error := task.exception()) is not None:
                fenced = isinstance(error, FencedError)
                log.error("fenced" if fenced else "the scheduler failed", exc_info=None if fenced else error)
        await self.server.drain(0)
        return 1

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.scheduler.tick()
            self.office.desk.tick()

    async def _write_fleet(self) -> None:
        while True:
            await asyncio.sleep(FLEET_WRITE_S)
            try:
                await self._store.write(self.scheduler.fleet.workers())
                await self._index_store.write()
                await self._tenant_store.write()
                await self._orphan_store.read()
            except (RedisError, OSError) as error:
                self._journal.heard(False, str(error))
            else:
                self._journal.heard(True)

    async def _write_jobs(self) -> None:
        while True:
            await asyncio.sleep(JOBS_WRITE_S)
            try:
                await self.office.store.write()
            except (RedisError, OSError) as error:
                self._journal.heard(False, str(error))

    async def _drain(self) -> None:
        """Nothing new; live requests end while the links stay up; then the links end, and the server."""
        self.scheduler.drain()
        self.server.stop_serving()
        log.info("draining", extra={"live": len(self.scheduler.requests)})
        deadline = time.monotonic() + self._settings.drain_timeout_s
        # Looked at as often as the clock ticks: a live request may end by any of a dozen events.
        while len(self.scheduler.requests) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(TICK_S)
        self.scheduler.revoke_queued()
        self._dispatch.close()
        self._fleet.close()
        self._trainers.close()
        self._training.close()
        await self.office.close()
        try:
            async with asyncio.timeout(FLUSH_S):
                await self.office.store.write()
        except (RedisError, OSError, TimeoutError) as error:
            self._journal.heard(False, str(error))
        await self.server.drain(LINKS_END_S)


async def open_redis(settings: SchedulerSettings) -> tuple[Redis, int, Inheritance]:
    """A connection that answers, this boot's incarnation, and what the scheduler before it left.

    Raises RedisError, OSError or (a bad URL) ValueError.
    """
    timeout = settings.redis_timeout_s
    redis = Redis.from_url(
        settings.redis_url,
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
        retry=Retry(NoBackoff(), 0),  # the journal has its own pace, and must notice at once
    )
    try:
        return redis, await next_incarnation(redis), await read_inheritance(redis)
    except BaseException:
        await redis.aclose()
        raise
