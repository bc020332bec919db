"""Publishing on a base of another quantisation: refused unless it is asked for; then served, logged and counted."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any, cast

import pytest
from lmesh_chassis.errors import ServiceError
from lmesh_scheduler.adapters.publishing import Offer, Publisher
from lmesh_scheduler.adapters.registry import Published
from lmesh_scheduler.adapters.store import AdapterStore
from lmesh_scheduler.fleet import Worker
from lmesh_scheduler.requests import State
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.scheduler_bench import Bench

WARNING = "adapter on another recipe"


class Written:
    """What would be in Redis; `broken` when it does not answer."""

    def __init__(self) -> None:
        self.entries: list[Published] = []
        self.broken = False

    async def put(self, entry: Published) -> None:
        if self.broken:
            raise RedisConnectionError("gone")
        self.entries.append(entry)

    async def delete(self, entries: Sequence[Published]) -> None:
        self.entries = [entry for entry in self.entries if entry not in entries]


class Scene:
    """A worker of model `m`, which loads what it is told, and a publisher."""

    def __init__(self, served: str) -> None:
        self.bench, self.store = Bench(), Written()
        self.publisher = Publisher(self.bench.core, cast("AdapterStore", self.store))
        self.worker = self.bench.worker(digest=served)
        self.fault = ""

    async def publish(self, trained_on: str, *, waived: bool = False, name: str = "a") -> Published:
        manifest = json.dumps({"base": {"digest": trained_on}})
        offer = Offer(
            tenant="",
            model="m",
            name=name,
            digest="content",
            artifact="folder",
            manifest=manifest,
            job_id="j",
            allow_recipe_mismatch=waived,
        )
        publishing = asyncio.create_task(self.publisher.publish(offer))
        while not publishing.done():
            self._load(self.worker)
            await asyncio.sleep(0)
        return publishing.result()

    def _load(self, worker: Worker) -> None:
        residency = self.bench.core.residency
        loads, residency.shelf(worker).loads = residency.shelf(worker).loads, []
        for digest, _ in loads:
            residency.told(worker, digest, held=not self.fault, reason=self.fault)

    @property
    def versions(self) -> list[Published]:
        return self.bench.core.adapters.versions("", "m", "a")

    def served_anew(self, digest: str) -> None:
        """The model's workers come back with other weights."""
        self.worker.linked = False
        self.bench.now += 10
        self.bench.core.tick()
        self.bench.beating.clear()
        self.worker = self.bench.worker(epoch="e2", digest=digest)


def warnings(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [record for record in caplog.records if record.getMessage() == WARNING]


async def refused(scene: Scene, trained_on: str, **options: Any) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        await scene.publish(trained_on, **options)
    return caught.value


@pytest.mark.parametrize(
    ("trained_on", "served", "said"),
    [
        ("base+nf4", "base", "trained on nf4 weights, and m is served with unquantised ones"),
        ("base", "base+nf4", "trained on unquantised weights, and m is served with nf4 ones"),
    ],
)
async def test_another_recipe_is_an_opt_in(
    trained_on: str, served: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    scene = Scene(served)
    error = await refused(scene, trained_on)
    assert (error.reason, error.field) == ("ADAPTER_BASE_MISMATCH", "allow_recipe_mismatch")
    assert said in str(error) and "allow_recipe_mismatch" in str(error)
    assert not scene.versions and not scene.store.entries and not scene.publisher.recipe_mismatches
    with caplog.at_level(logging.INFO):
        entry = await scene.publish(trained_on, waived=True)
    assert entry.recipe_mismatch and scene.versions == scene.store.entries == [entry]
    assert scene.publisher.recipe_mismatches == 1
    (told,) = warnings(caplog)
    assert (told.levelno, told.adapter, told.base) == (logging.WARNING, "a", trained_on)
    gateway = scene.bench.gateway()
    scene.bench.submit(gateway, "r", adapter="content")
    assert scene.bench.state("r") is State.PLACED
    # A worker that comes later is given it as any other.
    later = scene.bench.worker("w2", digest=served)
    assert scene.bench.core.residency.shelf(later).loads == [("content", "folder")]


async def test_the_same_recipe_counts_as_none(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene("base+nf4")
    with caplog.at_level(logging.INFO):
        entry = await scene.publish("base+nf4", waived=True)
    assert not entry.recipe_mismatch and not scene.publisher.recipe_mismatches and not warnings(caplog)


async def test_other_weights_are_no_recipe() -> None:
    scene = Scene("base")
    for waived in (False, True):
        error = await refused(scene, "other+nf4", waived=waived)
        assert (error.reason, error.field) == ("ADAPTER_BASE_MISMATCH", "model")
    assert not scene.versions and not scene.publisher.recipe_mismatches


async def test_what_was_not_published_is_not_counted(caplog: pytest.LogCaptureFixture) -> None:
    scene = Scene("base")
    scene.fault = "UNKNOWN_TENSORS"
    assert (await refused(scene, "base+nf4", waived=True)).reason == "ADAPTER_REFUSED"
    scene.fault, scene.store.broken = "", True
    assert (await refused(scene, "base+nf4", waived=True)).reason == "REGISTRY_UNAVAILABLE"
    assert not scene.versions and not scene.publisher.recipe_mismatches and not warnings(caplog)


async def test_what_is_there_is_given_again_while_it_is_served() -> None:
    """The same job's content twice is one version; when the model is served otherwise by now, it is asked for anew."""
    scene = Scene("base")
    first = await scene.publish("base")
    assert await scene.publish("base") == first and scene.store.entries == [first]
    scene.served_anew("base+nf4")
    assert (await refused(scene, "base")).reason == "ADAPTER_BASE_MISMATCH"
    second = await scene.publish("base", waived=True)
    assert (second.version, second.recipe_mismatch) == (2, True)
    assert await scene.publish("base") == second  # nothing is to be waived once more
    assert scene.publisher.recipe_mismatches == 1
