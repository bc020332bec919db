"""Publishing and deleting adapters: workers load one before it is shown, so that it answers the moment it is."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from lmesh_chassis.errors import InvalidArgumentError
from redis.exceptions import RedisError

from lmesh_scheduler.adapters.registry import Published, fits
from lmesh_scheduler.adapters.store import AdapterStore
from lmesh_scheduler.errors import (
    AdapterBaseMismatchError,
    AdapterNotFoundError,
    AdapterRefusedError,
    ModelNotServedError,
    RegistryUnavailableError,
)
from lmesh_scheduler.fleet import ModelDescriptor
from lmesh_scheduler.scheduler import Scheduler

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LOAD_S = 120.0  # how long workers may take to load what is offered
_POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What is to be published; `model` is a served model's id or its source."""

    tenant: str
    model: str
    name: str
    digest: str
    artifact: str
    manifest: str = ""
    job_id: str = ""
    allow_recipe_mismatch: bool = False


class Publisher:
    """One publication of a mesh at a time, so that versions count up without gaps."""

    def __init__(self, scheduler: Scheduler, store: AdapterStore, *, wall: Callable[[], float] = time.time) -> None:
        self._scheduler, self._store, self._wall = scheduler, store, wall
        self._turn = asyncio.Lock()
        self.recipe_mismatches = 0  # published on another quantisation than they were trained on, as asked for

    async def publish(self, offer: Offer) -> Published:
        """Makes it the newest version of its name; the same content from the same job again gives what is there, unless
        the model's weights are others by now.

        Raises a ServiceError: InvalidArgumentError for the name, ModelNotServedError, AdapterBaseMismatchError,
        AdapterRefusedError, RegistryUnavailableError. Nothing has changed then.
        """
        check_name(offer.name)
        async with self._turn:
            model = self._served(offer.model)
            versions = self._scheduler.adapters.versions(offer.tenant, model.id, offer.name)
            if versions and _same(versions[-1], offer) and fits(versions[-1], model.digest):
                return versions[-1]
            entry = self._entry(offer, model, versions[-1].version + 1 if versions else 1)
            try:
                await self._loaded(entry)
                await self._written(self._store.put(entry))
                self._scheduler.adapters.put(entry)
            finally:
                self._scheduler.residency.withdraw(entry.digest)
        self._scheduler.catalog_changed()
        if entry.recipe_mismatch:
            self.recipe_mismatches += 1
            log.warning("adapter on another recipe", extra={"adapter": offer.name, "base": entry.base_digest})
        extra = {"adapter": f"{entry.model}:{entry.name}@{entry.version}", "digest": entry.digest}
        log.info("adapter published", extra=extra)
        return entry

    def _served(self, model: str) -> ModelDescriptor:
        served = [entry.model for entry in self._scheduler.fleet.catalog()]
        for found in served:
            if model in (found.id, found.source):
                return found
        known = ", ".join(found.id for found in served) or "none"
        raise ModelNotServedError(f"no worker serves {model!r}; served now: {known}", field="model")

    def _entry(self, offer: Offer, model: ModelDescriptor, version: int) -> Published:
        entry = Published(
            tenant=offer.tenant,
            model=model.id,
            name=offer.name,
            version=version,
            digest=offer.digest,
            artifact=offer.artifact,
            created=self._wall(),
            manifest=offer.manifest,
            job_id=offer.job_id,
            base_digest=base_digest_of(offer.manifest),
        )
        if fits(entry, model.digest):
            return entry
        waived = replace(entry, recipe_mismatch=True)
        if not fits(waived, model.digest):
            raise AdapterBaseMismatchError(
                f"it was trained on base {entry.base_digest[:12]}, and {model.id} has {model.digest[:12]}",
                field="model",
            )
        if not offer.allow_recipe_mismatch:
            raise AdapterBaseMismatchError(
                f"it was trained on {_recipe(entry.base_digest)} weights, and {model.id} is served with "
                f"{_recipe(model.digest)} ones: allow_recipe_mismatch serves it all the same",
                field="allow_recipe_mismatch",
            )
        return waived

    async def _loaded(self, entry: Published) -> None:
        """Waits until a worker holds it: every tensor is bound there, or the publication fails."""
        residency = self._scheduler.residency
        residency.offer(entry)
        try:
            async with asyncio.timeout(LOAD_S):
                while not residency.settled(entry):  # noqa: ASYNC110 - answered by any of several workers
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise AdapterRefusedError(f"no worker has loaded it within {LOAD_S:g} s") from None
        fault = residency.hopeless(entry.model, entry.digest)
        if fault is not None:
            raise AdapterRefusedError(
                f"no worker can load it: {fault.message}", metadata={"worker_reason": fault.reason}
            )

    async def delete(self, tenant: str, model: str, name: str, version: int) -> None:
        """Takes a version, or all for 0, out of service. Raises AdapterNotFoundError or RegistryUnavailableError."""
        async with self._turn:
            adapters = self._scheduler.adapters
            found = [e for e in adapters.versions(tenant, model, name) if version in (0, e.version)]
            if not found:
                raise AdapterNotFoundError(
                    f"there is no {model}:{name}{f'@{version}' if version else ''}", field="name"
                )
            await self._written(self._store.delete(found))
            for entry in found:
                adapters.remove(entry)
        self._scheduler.catalog_changed()

    @staticmethod
    async def _written(write: Awaitable[None]) -> None:
        try:
            await write
        except (RedisError, OSError) as error:
            raise RegistryUnavailableError("Redis does not answer; try again", retry_after_ms=1000) from error


def check_name(name: str) -> None:
    """Raises InvalidArgumentError: names stand in model ids and URLs."""
    if not NAME.fullmatch(name):
        raise InvalidArgumentError(
            "name must be 1 to 64 letters, digits, dots, dashes or underscores, and begin with a letter or digit",
            field="name",
        )


def _same(entry: Published, offer: Offer) -> bool:
    return (entry.digest, entry.job_id) == (offer.digest, offer.job_id)


def base_digest_of(manifest: str) -> str:
    """The base that a manifest names; empty where it names none."""
    try:
        return str(json.loads(manifest)["base"]["digest"])
    except (ValueError, KeyError, TypeError):
        return ""


def _recipe(base_digest: str) -> str:
    return base_digest.partition("+")[2] or "unquantised"
