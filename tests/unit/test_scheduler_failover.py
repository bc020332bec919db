"""Requests that outlive a worker, a gateway or the scheduler itself, on a virtual clock."""

from __future__ import annotations

import pytest
from lmesh_scheduler.failover import Leg
from lmesh_scheduler.fleet import Heartbeat, Held
from lmesh_scheduler.gateways import Gateway, Placed, Queued, Refused, Revoked
from lmesh_scheduler.inheritance import Inheritance
from lmesh_scheduler.requests import State, Submission

from tests.scheduler_bench import Bench, told

OLD_LEASE = 7 << 32


@pytest.fixture
def bench() -> Bench:
    return Bench()


def submission(request_id: str, **changes: object) -> Submission:
    fields = {"model": "m", "prompt_ids": (1, 2, 3), "max_tokens": 8, **changes}
    return Submission(request_id=request_id, **fields)  # type: ignore[arg-type]


def announce(bench: Bench, gateway: Gateway, request_id: str, *, worker: str = "w1", epoch: str = "e1") -> None:
    leg = Leg(worker_id=worker, epoch=epoch, lease=OLD_LEASE)
    bench.core.announce(gateway, submission(request_id), leg, started=True)


class TestLostWorkers:
    def test_its_requests_go_to_another_in_their_order(self, bench: Bench) -> None:
        gateway = bench.gateway()
        bench.worker("w1", max_seqs=3)
        for name in "abc":
            bench.submit(gateway, name)
        bench.submit(gateway, "waits")
        leases = {name: bench.request(name).lease for name in "abc"}
        bench.beating.clear()
        bench.pass_time(6)
        told(gateway)
        bench.worker("w2", max_seqs=2)
        placed = [event for event in told(gateway) if isinstance(event, Placed)]
        assert [(event.request_id, event.worker_id) for event in placed] == [("a", "w2"), ("b", "w2")]
        assert all(event.lease > leases[event.request_id] for event in placed)
        assert [bench.state(name) for name in ("c", "waits")] == [State.QUEUED, State.QUEUED]
        assert [e.event for e in bench.request("a").timeline] == ["queued", "placed", "queued", "placed"]

    def test_what_was_said_under_the_old_lease_is_dropped(self, bench: Bench) -> None:
        gateway = bench.gateway()
        first = bench.worker("w1")
        bench.worker("w2")
        bench.submit(gateway, "r")
        old = bench.request("r").lease
        bench.core.worker_unlinked(first)
        bench.core.worker_unreachable("w1", "e1")
        assert bench.request("r").worker_id == "w2"
        bench.core.started("r", old)
        bench.finish("r", lease=old)
        assert bench.state("r") is State.PLACED
        bench.finish("r")
        assert bench.state("r") is State.FINISHED

    def test_a_request_whose_workers_keep_dying_ends(self) -> None:
        bench = Bench(max_placements=2)
        gateway, worker = bench.gateway(), bench.worker(epoch="e0")
        bench.submit(gateway, "r")
        for boot in ("e1", "e2"):
            bench.core.worker_unlinked(worker)
            bench.beating.clear()
            worker = bench.worker(epoch=boot)
        assert (bench.state("r"), bench.request("r").reason) == (State.FAILED, "WORKER_LOST")
        last = told(gateway)[-1]
        assert isinstance(last, Revoked)
        assert (last.reason, last.requeued) == ("WORKER_LOST", False)
        assert worker.placed == 0

    def test_a_stuck_worker_loses_its_requests_and_is_told(self, bench: Bench) -> None:
        gateway, stuck = bench.gateway(), bench.worker("w1")
        bench.submit(gateway, "r")
        lease = bench.request("r").lease
        bench.core.worker_beat(stuck, Heartbeat(stuck=True), draining=False)
        assert bench.state("r") is State.QUEUED
        assert (stuck.revoked, stuck.placed) == ([lease], 0)
        bench.core.worker_beat(stuck, Heartbeat(stuck=True), draining=False)
        assert stuck.revoked == [lease]
        bench.core.worker_beat(stuck, Heartbeat(), draining=False)  # it is well again, and takes work
        assert bench.request("r").worker_id == "w1"

    def test_a_leg_that_a_gateway_lost(self, bench: Bench) -> None:
        gateway, worker = bench.gateway(), bench.worker("w1")
        bench.submit(gateway, "r")
        lease = bench.request("r").lease
        bench.core.failover.leg_lost("r", lease, "WORKER_LOST")
        assert worker.revoked == [lease]
        again = bench.request("r").lease
        assert again > lease
        bench.core.failover.leg_lost("r", lease, "WORKER_LOST")  # a repeat
        assert bench.request("r").lease == again

    def test_the_queue_timeout_is_for_the_first_wait_only(self, bench: Bench) -> None:
        gateway = bench.gateway()
        bench.worker()
        bench.submit(gateway, "r", queue_timeout_s=7.0)
        bench.beating.clear()
        bench.pass_time(20)
        assert bench.state("r") is State.QUEUED

    def test_a_gateway_that_missed_it_hears_it_on_its_next_link(self, bench: Bench) -> None:
        gateway = bench.gateway()
        bench.worker()
        bench.submit(gateway, "r")
        lease = bench.request("r").lease
        bench.core.gateway_left(gateway)
        bench.beating.clear()
        bench.pass_time(6)
        again = bench.gateway()
        assert told(again) == [Revoked("r", lease, "WORKER_LOST", requeued=True), Queued("r", 0)]


class TestRestart:
    def test_announced_requests_go_on_under_their_lease(self, bench: Bench) -> None:
        gateway, worker = bench.gateway(), bench.worker()
        announce(bench, gateway, "r")
        assert (bench.state("r"), bench.request("r").lease, worker.placed) == (State.RUNNING, OLD_LEASE, 1)
        announce(bench, gateway, "r")
        assert told(gateway)[-1] == Placed("r", "w1", "e1", "w1:1", OLD_LEASE)
        bench.finish("r")
        assert (bench.state("r"), worker.placed) == (State.FINISHED, 0)

    def test_a_gateway_that_comes_before_the_worker(self, bench: Bench) -> None:
        gateway = bench.gateway()
        announce(bench, gateway, "r")
        bench.pass_time(2)
        worker = bench.worker()
        assert (worker.placed, bench.state("r")) == (1, State.RUNNING)

    def test_a_worker_that_comes_before_the_gateway_keeps_its_room(self, bench: Bench) -> None:
        held = (Held(request_id="r", lease=OLD_LEASE, sequences=2),)
        worker, other = bench.worker(held=held), bench.gateway("other")
        assert worker.placed == 2
        bench.submit(other, "s")
        assert bench.state("s") is State.QUEUED  # the room is taken, though nobody has claimed it
        gateway = bench.gateway("g")
        bench.core.announce(
            gateway, submission("r", n=2), Leg(worker_id="w1", epoch="e1", lease=OLD_LEASE), started=False
        )
        assert (worker.placed, bench.state("r")) == (2, State.PLACED)
        bench.pass_time(30)
        assert worker.revoked == []

    def test_what_nobody_announces_is_dropped_where_it_runs(self, bench: Bench) -> None:
        worker = bench.worker(held=(Held(request_id="r", lease=OLD_LEASE, sequences=1),))
        bench.pass_time(9)
        assert worker.revoked == []
        bench.pass_time(3)
        assert (worker.revoked, worker.placed) == ([OLD_LEASE], 0)

    def test_a_link_that_breaks_meanwhile_counts_nothing_twice(self, bench: Bench) -> None:
        held = (Held(request_id="r", lease=OLD_LEASE, sequences=1),)
        bench.core.worker_unlinked(bench.worker(held=held))
        bench.beating.clear()
        again = bench.worker(held=held)
        assert again.placed == 1
        bench.core.worker_unlinked(again)
        bench.beating.clear()
        assert bench.worker().placed == 0

    def test_a_worker_that_stays_away_is_lost(self, bench: Bench) -> None:
        gateway = bench.gateway()
        bench.worker("w2")
        announce(bench, gateway, "r")
        bench.pass_time(6)
        assert bench.request("r").worker_id == "w2"
        assert Revoked("r", OLD_LEASE, "WORKER_LOST", requeued=True) in told(gateway)

    @pytest.mark.parametrize("first", ["worker", "gateway"])
    def test_another_boot_of_its_worker_has_lost_it(self, bench: Bench, first: str) -> None:
        gateway = bench.gateway()
        if first == "worker":
            bench.worker(epoch="e2")
        announce(bench, gateway, "r")
        if first == "gateway":
            bench.worker(epoch="e2")
        assert (bench.request("r").epoch, bench.state("r")) == ("e2", State.PLACED)
        assert bench.request("r").lease != OLD_LEASE

    def test_models_of_the_scheduler_before_are_waited_for(self) -> None:
        bench = Bench(inherited=Inheritance(fleet={("w1", "e1"): "m", ("w2", "e1"): "other"}))
        gateway = bench.gateway()
        bench.submit(gateway, "r")
        assert told(gateway) == [Queued("r", 0)]
        assert not bench.core.fleet.settled
        bench.worker("w1")
        assert bench.state("r") is State.PLACED  # all of its model's workers are back
        assert not bench.core.fleet.settled
        gateway.catalog_due = False
        bench.pass_time(5.5)
        assert bench.core.fleet.settled
        assert gateway.catalog_due


class TestTakeOver:
    def test_a_live_request_changes_gateways(self, bench: Bench) -> None:
        before, after, worker = bench.gateway("g1"), bench.gateway("g2"), bench.worker()
        bench.submit(before, "r")
        lease = bench.request("r").lease
        told(before)
        bench.core.take_over(after, submission("r", delivered_tokens=3), 1)
        assert told(before) == [Revoked("r", lease, "RESUMED_ELSEWHERE")]
        assert worker.revoked == [lease]
        again = bench.request("r")
        assert (again.gateway_id, again.state, worker.placed) == ("g2", State.PLACED, 1)
        assert [e.event for e in again.timeline] == ["queued", "placed", "resumed", "placed"]
        bench.finish("r", lease=lease)  # what the first one says now is of no weight
        assert bench.state("r") is State.PLACED

    def test_a_queued_one_goes_first(self, bench: Bench) -> None:
        before, after = bench.gateway("g1"), bench.gateway("g2")
        bench.worker(max_seqs=1)
        for name in ("runs", "a", "b"):
            bench.submit(before, name)
        bench.core.take_over(after, submission("b"), 1)
        bench.finish("runs")
        assert bench.state("b") is State.PLACED
        assert bench.state("a") is State.QUEUED

    def test_the_larger_epoch_has_it(self, bench: Bench) -> None:
        first, second, third = bench.gateway("g1"), bench.gateway("g2"), bench.gateway("g3")
        bench.worker()
        bench.submit(first, "r")
        bench.core.take_over(second, submission("r"), 2)
        bench.core.take_over(third, submission("r"), 1)
        assert [e.reason for e in told(third) if isinstance(e, Refused)] == ["RESUMED_ELSEWHERE"]
        assert bench.request("r").gateway_id == "g2"

    def test_ended_ones_stay_ended_unless_their_gateway_or_their_end_was_lost(self, bench: Bench) -> None:
        gateway, after = bench.gateway("g1"), bench.gateway("g2")
        bench.worker()
        bench.submit(gateway, "gone")
        bench.core.cancel("gone")
        bench.core.take_over(after, submission("gone"), 1)
        assert [e.reason for e in told(after) if isinstance(e, Refused)] == ["REQUEST_ENDED"]
        bench.submit(gateway, "lost")
        bench.core.gateway_left(gateway)
        bench.pass_time(61)
        assert bench.request("lost").reason == "GATEWAY_LOST"
        bench.core.take_over(after, submission("lost"), 1)
        assert bench.state("lost") is State.PLACED
        bench.submit(gateway, "done")
        bench.finish("done")
        bench.core.take_over(after, submission("done"), 1)  # the ledger had no end of it when it was claimed
        assert bench.state("done") is State.PLACED
        assert [e.event for e in bench.request("done").timeline][-2:] == ["resumed", "placed"]

    def test_an_unknown_one_is_taken_from_the_ledger(self, bench: Bench) -> None:
        gateway = bench.gateway()
        bench.worker()
        bench.core.take_over(gateway, submission("r"), 4)
        assert bench.state("r") is State.PLACED
        announce(bench, bench.gateway("late"), "r")
        assert bench.request("r").gateway_id == "g"
