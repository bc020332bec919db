"""The scheduler's core with adapters: requests wait for theirs, and nobody waits for another's."""

from __future__ import annotations

import pytest
from lmesh_scheduler.adapters.registry import Published
from lmesh_scheduler.adapters.residency import RETRY_S
from lmesh_scheduler.gateways import Queued, Refused, Revoked
from lmesh_scheduler.inheritance import Inheritance
from lmesh_scheduler.requests import State

from tests.scheduler_bench import Bench, told


def published(name: str = "a", *, tenant: str = "", digest: str = "") -> Published:
    return Published(
        tenant=tenant, model="m", name=name, version=1, digest=digest or f"{name}1", artifact="f", created=0.0
    )


@pytest.fixture
def bench() -> Bench:
    return Bench(inherited=Inheritance(adapters=[published(), published("b", tenant="t")]))


def test_a_request_waits_for_its_adapter_and_others_do_not_wait_for_it(bench: Bench) -> None:
    gateway, worker = bench.gateway(), bench.worker(max_seqs=4)
    bench.submit(gateway, "tuned", adapter="a1")
    bench.submit(gateway, "plain")
    assert (bench.state("tuned"), bench.state("plain")) == (State.QUEUED, State.PLACED)
    shelf = bench.core.residency.shelf(worker)
    assert ("a1", "f") in shelf.loads
    bench.core.residency.told(worker, "a1", held=True)
    bench.core.placements.place("m")
    assert bench.state("tuned") is State.PLACED


def test_it_is_placed_only_where_its_adapter_is(bench: Bench) -> None:
    gateway = bench.gateway()
    workers = [bench.worker(f"w{i}", max_seqs=8) for i in range(3)]
    bench.core.residency.told(workers[1], "a1", held=True)
    for i in range(4):
        bench.submit(gateway, f"r{i}", adapter="a1")
    assert {bench.request(f"r{i}").worker_id for i in range(4)} == {"w1"}


def test_what_is_not_published_for_the_tenant_is_refused(bench: Bench) -> None:
    gateway = bench.gateway()
    bench.worker()
    bench.submit(gateway, "r1", adapter="b1")  # another's
    bench.submit(gateway, "r2", adapter="x")
    bench.submit(gateway, "r3", adapter="b1", tenant="t")
    assert [e.reason for e in told(gateway) if isinstance(e, Refused)] == ["ADAPTER_NOT_FOUND"] * 2
    assert bench.state("r3") is State.QUEUED


def test_a_request_whose_adapter_no_worker_can_load_fails(bench: Bench) -> None:
    gateway, worker = bench.gateway(), bench.worker()
    bench.submit(gateway, "r", adapter="a1")
    bench.core.residency.told(worker, "a1", held=False, reason="UNKNOWN_TENSORS", message="no slot")
    bench.pass_time(0.5)
    assert bench.state("r") is State.FAILED
    assert told(gateway) == [Queued("r", 0), Revoked("r", 0, "UNKNOWN_TENSORS")]
    bench.pass_time(RETRY_S)  # later it is tried anew
    bench.core.residency.shelf(worker).loads.clear()
    bench.submit(gateway, "again", adapter="a1")
    assert bench.core.residency.shelf(worker).loads == [("a1", "f")]


def test_a_worker_that_is_lost_takes_its_shelf_along(bench: Bench) -> None:
    gateway, worker = bench.gateway(), bench.worker()
    bench.core.residency.told(worker, "a1", held=True)
    bench.submit(gateway, "r", adapter="a1")
    worker.linked = False
    bench.now += 10
    bench.core.tick()
    bench.beating.clear()
    again = bench.worker(epoch="e2")
    assert bench.state("r") is State.QUEUED and ("a1", "f") in bench.core.residency.shelf(again).loads
    bench.core.residency.told(again, "a1", held=True)
    bench.core.placements.place("m")
    assert bench.state("r") is State.PLACED and bench.request("r").epoch == "e2"


def test_a_deleted_adapter_serves_what_runs(bench: Bench) -> None:
    gateway, worker = bench.gateway(), bench.worker()
    bench.core.residency.told(worker, "a1", held=True)
    bench.submit(gateway, "r", adapter="a1")
    (entry,) = bench.core.adapters.with_digest("a1")
    bench.core.adapters.remove(entry)
    shelf = bench.core.residency.shelf(worker)
    bench.pass_time(0.5)
    assert bench.state("r") is State.PLACED and "a1" not in shelf.drops
    bench.finish("r")
    bench.pass_time(0.5)
    assert "a1" in shelf.drops
