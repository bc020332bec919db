"""The worker's server process as a whole: its parts, and what happens when the engine or the process ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lmesh.worker.v1 import run_pb2_grpc
from lmesh_chassis import lifecycle, tls
from lmesh_chassis import metrics as chassis_metrics
from lmesh_chassis.artifacts.store import FolderStore
from lmesh_chassis.channel import connect
from lmesh_chassis.lifecycle import Shutdown
from lmesh_chassis.server import GrpcServer
from prometheus_client import REGISTRY, CollectorRegistry

from lmesh_worker.adapter_shelf import AdapterShelf
from lmesh_worker.config import WorkerSettings, advertised_address
from lmesh_worker.engine_client import EngineClient
from lmesh_worker.errors import DOMAIN, EngineFailedError
from lmesh_worker.fleet_link import FleetLink, Identity
from lmesh_worker.kv_feed import KvFeed
from lmesh_worker.messages import DropAdapter, ProgressChange, Ready
from lmesh_worker.metrics import WorkerMetrics
from lmesh_worker.run_order import SessionLimits
from lmesh_worker.run_sessions import RunSessions
from lmesh_worker.servicer import SERVICE_NAME, RunServicer
from lmesh_worker.start_check import Limits
from lmesh_worker.watchdog import Verdict, Watchdog

_log = logging.getLogger(__name__)

_ANNOUNCE_S = 2.0  # how long the scheduler may take to hear that this worker leaves
_FLUSH_S = 5.0  # how long gateways may take to hear that the engine died
_ENGINE_STOP_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What this worker serves, as the fleet is told."""

    model_id: str
    source: str
    digest: str
    text_digest: str


class Worker:
    """One boot of a worker around a spawned engine. `run` is its whole life."""

    def __init__(
        self,
        settings: WorkerSettings,
        model: ModelIdentity,
        engine: EngineClient,
        *,
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        self._settings = settings
        self._model = model
        self._engine = engine
        self._registry = registry
        self.epoch = uuid.uuid4().hex
        limits = SessionLimits(
            grace_s=settings.run_grace_s,
            max_unacked_steps=settings.max_unacked_steps,
            max_unacked_bytes=settings.max_unacked_bytes,
        )
        self.sessions = RunSessions(
            epoch=self.epoch,
            limits=limits,
            send=engine.send,
            engine_behind=lambda: engine.backlog_bytes > settings.max_engine_backlog_bytes,
        )
        self._kv = KvFeed()
        self._adapters = AdapterShelf(
            FolderStore(Path(settings.artifacts)) if settings.artifacts else None,
            load=engine.load_adapter,
            drop=lambda digest: engine.send(DropAdapter(digest)),
        )
        self._engine_gone = False
        self._verdict_before = Verdict.OK
        self._watchdog = Watchdog(bound_s=settings.step_bound_s, compile_bound_s=settings.compile_bound_s)
        self._metrics = WorkerMetrics(
            model.model_id,
            slow_consumers=lambda: self.sessions.slow_consumers,
            revoked=lambda: self.sessions.revoked_sequences,
            kv_granules=lambda: len(self._kv),
            stuck=lambda: self._verdict_before == Verdict.STUCK,
            registry=registry,
        )
        self.server = GrpcServer(
            settings.address, domain=DOMAIN, reflection=settings.reflection, tls=tls.from_settings(settings)
        )
        self.worker_id = settings.id

    async def run(self, shutdown: Shutdown) -> int:
        """Serves until `shutdown` (0) or until the engine fails (1)."""
        page = await self._metrics_page()
        try:
            await self._engine.connect()
            port = await self._listen()
            if (ready := await self._wait_ready(shutdown)) is None:
                await self.server.drain(0)
                return 0
            return await self._serve(ready, port, shutdown)
        except EngineFailedError as error:
            _log.error("the engine could not start", extra={"reason": error.reason, "detail": error.message})
            await self.server.drain(0)
            return 1
        finally:
            self._engine.kill()
            self._metrics.close()
            if page is not None:
                await page.close()

    async def _metrics_page(self) -> chassis_metrics.MetricsServer | None:
        settings = self._settings
        if not settings.metrics_port:
            return None
        return await chassis_metrics.serve(
            settings.metrics_port, host=settings.metrics_host, healthy=self.server.serving, registry=self._registry
        )

    async def _listen(self) -> int:
        settings = self._settings
        servicer = RunServicer(self.sessions, epoch=self.epoch, worker_id=lambda: self.worker_id)
        self.server.add(run_pb2_grpc.add_RunServiceServicer_to_server, servicer, SERVICE_NAME)
        port = await self.server.start()
        self.address = settings.advertise or advertised_address(settings.address, port, settings.scheduler)
        self.worker_id = settings.id or f"worker-{self.address}"
        return port

    async def _wait_ready(self, shutdown: Shutdown) -> Ready | None:
        """The engine's Ready, or None when the shutdown came first."""
        ready = asyncio.create_task(self._engine.ready(self._settings.engine_start_timeout_s, self._watchdog.progress))
        asked = asyncio.create_task(shutdown.wait())
        try:
            await asyncio.wait({ready, asked}, return_when=asyncio.FIRST_COMPLETED)
            return ready.result() if ready.done() else None
        finally:
            ready.cancel()
            asked.cancel()
            await asyncio.gather(ready, asked, return_exceptions=True)

    async def _serve(self, ready: Ready, port: int, shutdown: Shutdown) -> int:
        self._metrics.ready(ready)
        limits = Limits(max_model_len=ready.max_model_len, vocab_size=ready.vocab_size)
        self.sessions.open(limits, ready.weights_version)
        async with connect(
            self._settings.scheduler, domain=DOMAIN, retries=False, tls=tls.from_settings(self._settings)
        ) as channel:
            fleet = FleetLink(
                channel,
                self._identity(),
                ready,
                load=lambda: self._metrics.load,
                verdict=self._verdict,
                held=self.sessions.held,
                kv=self._kv,
                adapters=self._adapters,
                on_drain=shutdown.request,
                on_revoked=self._revoked,
            )
            linked = asyncio.create_task(fleet.run())
            watched = asyncio.create_task(self._watch(fleet, port))
            try:
                return await self._until_end(fleet, shutdown)
            finally:
                watched.cancel()
                linked.cancel()
                await asyncio.gather(watched, linked, return_exceptions=True)
                await self._adapters.close()

    def _identity(self) -> Identity:
        model = self._model
        return Identity(
            worker_id=self.worker_id,
            epoch=self.epoch,
            address=self.address,
            model_id=model.model_id,
            source=model.source,
            digest=model.digest,
            text_digest=model.text_digest,
        )

    def _revoked(self, leases: Collection[int]) -> None:
        before = self.sessions.live
        self.sessions.revoke(leases)
        _log.info("leases revoked", extra={"leases": len(leases), "sequences": before - self.sessions.live})

    async def _until_end(self, fleet: FleetLink, shutdown: Shutdown) -> int:
        pump = asyncio.create_task(self._pump(fleet))
        end = asyncio.create_task(self._after_shutdown(fleet, shutdown))
        try:
            await asyncio.wait({pump, end}, return_when=asyncio.FIRST_COMPLETED)
            if not end.done():
                await self._engine_failed(fleet, pump)
                return 1
            end.result()
        finally:
            end.cancel()
            pump.cancel()
            await asyncio.gather(end, pump, return_exceptions=True)
        await self._engine.stop(0.0 if self._verdict() == Verdict.STUCK else _ENGINE_STOP_S)
        return 0

    async def _pump(self, fleet: FleetLink) -> None:
        async for report in self._engine.reports():
            if isinstance(report, ProgressChange):
                self._watchdog.progress(report.progress)
            else:
                self._watchdog.step(report.load.steps)
                self._metrics.take(report)
                self.sessions.take(report)
                self._kv.take(report.kv_added, report.kv_removed)
            if self._verdict_before != Verdict.OK:
                self._tell(fleet)  # it is heard of again: not a moment later than need be

    def _verdict(self) -> Verdict:
        return Verdict.STUCK if self._engine_gone else self._watchdog.verdict(self.sessions.live)

    async def _watch(self, fleet: FleetLink, port: int) -> None:
        """Keeps health and the scheduler's picture in step with the verdict."""
        await fleet.joined.wait()
        self.server.set_all_serving(True)
        lifecycle.settle()
        extra = {"address": self.address, "port": port, "worker_id": self.worker_id, "model": self._model.model_id}
        _log.info("ready", extra=extra)
        while True:
            await asyncio.sleep(min(1.0, self._settings.step_bound_s / 4))
            self._tell(fleet)

    def _tell(self, fleet: FleetLink) -> None:
        before, self._verdict_before = self._verdict_before, self._verdict()
        if self._verdict_before == before:
            return
        if Verdict.STUCK in (before, self._verdict_before):
            self.server.set_all_serving(self._verdict_before != Verdict.STUCK)
            level = logging.ERROR if self._verdict_before == Verdict.STUCK else logging.WARNING
            _log.log(level, "progress changed", extra={"progress": self._verdict_before.name, "was": before.name})
        fleet.report_now()

    async def _after_shutdown(self, fleet: FleetLink, shutdown: Shutdown) -> None:
        await shutdown.wait()
        timeout_s = self._settings.drain_timeout_s
        _log.info("draining", extra={"sequences": self.sessions.live, "timeout_s": timeout_s})
        deadline = asyncio.get_running_loop().time() + timeout_s
        self.server.stop_serving()
        await fleet.announce_draining(min(_ANNOUNCE_S, timeout_s))
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.sleep(self._settings.drain_linger_s)
                await self.sessions.drained()
        except TimeoutError:
            _log.warning("drain timeout, what is left is aborted", extra={"sequences": self.sessions.live})
        await self._close(fleet)

    async def _engine_failed(self, fleet: FleetLink, pump: asyncio.Task[None]) -> None:
        """Tells everyone, lets them hear it, and closes."""
        error = pump.exception()
        if not isinstance(error, EngineFailedError):
            _log.error("reading the engine failed", exc_info=error)
            error = EngineFailedError("ENGINE_DIED", "the worker lost its engine")
        _log.error("the engine died", extra={"reason": error.reason, "detail": error.message})
        self._engine_gone = True
        self.server.stop_serving()
        self.sessions.engine_died("the worker's engine died")
        await fleet.announce_draining(_ANNOUNCE_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                await self.sessions.drained()
        await self._close(fleet)

    async def _close(self, fleet: FleetLink) -> None:
        self.sessions.close()
        fleet.leave()
        await self.server.drain(1.0)
