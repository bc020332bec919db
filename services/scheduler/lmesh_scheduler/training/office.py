"""Training as a whole: the desk, its journal, publications and questions, wired and kept going."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable

from lmesh_chassis.errors import ServiceError
from redis.asyncio import Redis

from lmesh_scheduler.adapters.publishing import Offer, Publisher
from lmesh_scheduler.adapters.registry import AdapterRegistry, Published
from lmesh_scheduler.adapters.store import AdapterStore
from lmesh_scheduler.config import SchedulerSettings
from lmesh_scheduler.errors import AdapterNotFoundError
from lmesh_scheduler.scheduler import Scheduler
from lmesh_scheduler.training.desk import TrainingDesk
from lmesh_scheduler.training.jobs import Job, Place
from lmesh_scheduler.training.query_link import Queries
from lmesh_scheduler.training.store import JobStore
from lmesh_scheduler.training.wire import order_spec, published_event, state_event

log = logging.getLogger(__name__)


class Office:
    """One of a scheduler process."""

    def __init__(
        self, settings: SchedulerSettings, redis: Redis, scheduler: Scheduler, *, jobs: Iterable[Job] = ()
    ) -> None:
        self._scheduler = scheduler
        incarnation = scheduler.incarnation
        self.store = JobStore(redis, incarnation=incarnation, ended_ttl_s=settings.job_ttl_s)
        self.publisher = Publisher(scheduler, AdapterStore(redis, incarnation=incarnation))
        self.desk = TrainingDesk(
            incarnation=incarnation,
            lease_ttl_s=settings.lease_ttl_s,
            alive_s=2 * settings.heartbeat_interval_s,
            max_attempts=settings.job_attempts,
            clock=time.monotonic,
            wall=time.time,
            changed=self.store.changed,
            state_event=state_event,
            order_spec=order_spec,
            publish=self._publish,
            jobs=jobs,
        )
        self.store.written = self.desk.written
        self.queries = Queries(self.desk.trainers, source_of=self._source)
        self._publishing: set[asyncio.Task[None]] = set()

    @property
    def adapters(self) -> AdapterRegistry:
        """What is published."""
        return self._scheduler.adapters

    def holders(self, entry: Published) -> int:
        """Workers that hold it now."""
        return self._scheduler.residency.holders(entry.model, entry.digest)

    def place(self, tenant: str, model: str, start: str) -> Place:
        """Where the model's files are, and those of the adapter that it starts from.

        `start` is a published adapter's digest, name or name@version, or artifact:<digest>.
        Raises AdapterNotFoundError.
        """
        if not start or start.startswith("artifact:"):
            return Place(self._source(model), start)
        name, at, version = start.partition("@")
        number = int(version) if version.isdecimal() else -1 if at else 0
        found = self.adapters.find(tenant, model, name, number)
        same = [entry for entry in self.adapters.with_digest(start) if entry.tenant == tenant]
        if found is None and not same:
            raise AdapterNotFoundError(f"there is no adapter {start!r} of {model}", field="spec.lora.start")
        return Place(self._source(model), f"artifact:{(found or same[0]).artifact}")

    def create(
        self, job_id: str, tenant: str, model: str, spec: bytes, place: Place, publish_as: str, *, nodes: int = 1
    ) -> Job:
        """A new job."""
        source, start = place
        job = Job(
            id=job_id,
            tenant=tenant,
            model=model,
            source=source,
            start=start,
            spec=spec,
            publish_as=publish_as,
            nodes=nodes,
        )
        self.desk.create(job)
        return job

    def _source(self, model: str) -> str:
        """Where a served model's files are; any other name is taken for a source."""
        served = (entry.model for entry in self._scheduler.fleet.catalog())
        return next((found.source for found in served if found.id == model), model)

    def _publish(self, job: Job) -> None:
        task = asyncio.create_task(self._published(job))
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def _published(self, job: Job) -> None:
        offer = Offer(
            tenant=job.tenant,
            model=job.model,
            name=job.publish_as,
            digest=job.adapter_digest,
            artifact=job.artifact,
            manifest=job.manifest,
            job_id=job.id,
        )
        try:
            entry = await self.publisher.publish(offer)
        except ServiceError as error:
            self.desk.not_published(job, error.reason, error.message)
        except Exception as error:
            log.exception("a publication failed", extra={"job_id": job.id})
            self.desk.not_published(job, "INTERNAL", type(error).__name__)
        else:
            self.desk.published(job, published_event(entry, self.holders(entry)))

    async def close(self) -> None:
        """Gives up publications; their trainers say again that their jobs are done."""
        for task in self._publishing:
            task.cancel()
        await asyncio.gather(*self._publishing, return_exceptions=True)
