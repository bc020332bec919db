"""The trainer's server process as a whole: its parts, and how it leaves. Nothing here loads torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid

from lmesh_chassis import metrics as chassis_metrics
from lmesh_chassis import tls
from lmesh_chassis.artifacts.store import FolderStore
from lmesh_chassis.channel import connect
from lmesh_chassis.lifecycle import Shutdown
from lmesh_chassis.server import GrpcServer
from prometheus_client import REGISTRY, CollectorRegistry

from lmesh_trainer.config import TrainerSettings
from lmesh_trainer.errors import DOMAIN
from lmesh_trainer.job_folders import JobFolders
from lmesh_trainer.metrics import TrainerMetrics
from lmesh_trainer.queries.desk import QueryDesk
from lmesh_trainer.runs import Runs
from lmesh_trainer.scheduler_link import Identity, SchedulerLink
from lmesh_trainer.sources import Bench

_log = logging.getLogger(__name__)

_ANNOUNCE_S = 2.0  # how long the scheduler may take to hear that this trainer leaves
_REPORT_S = 5.0  # how long it may take to acknowledge the last reports
_TIDY_S = 3600.0
_HANG_UP_S = 1.0  # how long it may take to end its side of the link


class Trainer:
    """One boot of a trainer; `device` is in words. `run` is its whole life."""

    def __init__(self, settings: TrainerSettings, device: str, *, registry: CollectorRegistry = REGISTRY) -> None:
        self._settings, self._device, self._registry = settings, device, registry
        self.epoch = uuid.uuid4().hex
        bench = Bench(
            store=FolderStore(settings.artifacts),
            jobs=settings.jobs_folder,
            device=settings.device,
            threads=settings.threads,
            world=settings.world,
            hub=settings.hub,
        )
        self.runs = Runs(bench, slots=settings.slots, most_waiting=settings.max_waiting_reports)
        self._folders = JobFolders(
            settings.jobs_folder,
            keep_s=settings.keep_jobs_days * 86_400,
            keep_completed=settings.keep_completed_jobs,
        )
        self._metrics = TrainerMetrics(self.runs.in_hand, registry=registry)
        self.runs.on_event, self.runs.on_gone = self._metrics.take, self._metrics.forget
        self.desk = QueryDesk(bench, timeout_s=settings.query_timeout_s)
        self.server = GrpcServer(
            settings.address, domain=DOMAIN, reflection=settings.reflection, tls=tls.from_settings(settings)
        )

    async def run(self, shutdown: Shutdown) -> int:
        """Serves until `shutdown`; 0."""
        page = await self._metrics_page()
        try:
            await asyncio.to_thread(self.desk.sweep)
            port = await self.server.start()
            async with connect(
                self._settings.scheduler, domain=DOMAIN, retries=False, tls=tls.from_settings(self._settings)
            ) as channel:
                await self._serve(SchedulerLink(channel, self._identity(), self.runs, self.desk), port, shutdown)
        finally:
            await self.desk.close()
            await self.runs.kill()
            await self.server.drain(0)
            if page is not None:
                await page.close()
        return 0

    async def _metrics_page(self) -> chassis_metrics.MetricsServer | None:
        settings = self._settings
        if not settings.metrics_port:
            return None
        return await chassis_metrics.serve(
            settings.metrics_port, host=settings.metrics_host, healthy=self.server.serving, registry=self._registry
        )

    def _identity(self) -> Identity:
        settings = self._settings
        return Identity(
            trainer_id=settings.trainer_id,
            epoch=self.epoch,
            device=self._device,
            slots=settings.slots,
            rendezvous=settings.rendezvous,
        )

    async def _serve(self, link: SchedulerLink, port: int, shutdown: Shutdown) -> None:
        linked = asyncio.create_task(link.run())
        joined = asyncio.create_task(self._once_joined(link, port))
        tidying = asyncio.create_task(self._tidy(link))
        try:
            await shutdown.wait()
            await self._leave(link)
            await asyncio.wait({linked}, timeout=_HANG_UP_S)
        finally:
            for task in (joined, linked, tidying):
                task.cancel()
            await asyncio.gather(joined, linked, tidying, return_exceptions=True)

    async def _once_joined(self, link: SchedulerLink, port: int) -> None:
        await link.joined.wait()
        self.server.set_all_serving(True)
        _log.info("ready", extra={"port": port, "trainer_id": self._settings.trainer_id, "device": self._device})

    async def _tidy(self, link: SchedulerLink) -> None:
        """Removes old jobs' folders, after the join and then every hour."""
        await link.joined.wait()
        while True:
            try:
                old = await asyncio.to_thread(self._folders.old)
                # On the loop: no order comes between the look at what is held and the renaming.
                self._metrics.removed(self._folders.retire(old, self.runs.held()))
                await asyncio.to_thread(self._folders.sweep)
            except OSError as error:
                _log.warning("jobs' folders cannot be tidied", extra={"detail": str(error)})
            await asyncio.sleep(_TIDY_S)

    async def _leave(self, link: SchedulerLink) -> None:
        """Stops every run with a checkpoint, and says nothing terminal of it: the hello of no other boot holds these
        runs, so the scheduler gives them to another trainer, which goes on from there.
        """
        timeout_s = self._settings.drain_timeout_s
        _log.info("draining", extra={"runs": self.runs.live, "timeout_s": timeout_s})
        deadline = asyncio.get_running_loop().time() + timeout_s
        self.server.stop_serving()
        await link.announce_draining(min(_ANNOUNCE_S, timeout_s))
        await self.runs.leave(max(0.0, deadline - asyncio.get_running_loop().time()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_REPORT_S):
                await self.runs.reported()
        link.leave()
