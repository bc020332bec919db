"""Requests that an earlier scheduler left live, on a virtual clock."""

from __future__ import annotations

import pytest
from lmesh_scheduler.failover import Leg
from lmesh_scheduler.fleet import Held
from lmesh_scheduler.gateways import Event, Gateway, Placed, Refused, Revoked
from lmesh_scheduler.requests import Request, State, Submission, TimelineEvent

from tests.scheduler_bench import Bench, told

OLD_LEASE = 7 << 32
LOST_S = 60.0


@pytest.fixture
def bench() -> Bench:
    return Bench(gateway_lost_s=LOST_S)


def orphan(request_id: str = "r", *, state: State = State.RUNNING, tenant: str = "", owner_epoch: int = 0) -> Request:
    submission = Submission(request_id=request_id, model="m", prompt_ids=(), max_tokens=0, tenant=tenant)
    lease, worker_id, epoch = (0, "", "") if state is State.QUEUED else (OLD_LEASE, "w1", "e1")
    return Request(
        submission=submission,
        gateway_id="g1",
        prompt_tokens=3,
        state=state,
        lease=lease,
        worker_id=worker_id,
        epoch=epoch,
        owner_epoch=owner_epoch,
        timeline=[TimelineEvent(1.0, "queued")],
    )


def submission(request_id: str = "r", *, tenant: str = "") -> Submission:
    return Submission(request_id=request_id, model="m", prompt_ids=(1, 2, 3), max_tokens=8, tenant=tenant)


def announce(bench: Bench, gateway: Gateway, lease: int = OLD_LEASE) -> None:
    bench.core.announce(gateway, submission(), Leg(worker_id="w1", epoch="e1", lease=lease), started=True)


def refusals(events: list[Event]) -> list[str]:
    return [event.reason for event in events if isinstance(event, Refused)]


class TestTheirTime:
    @pytest.mark.parametrize("state", [State.QUEUED, State.PLACED, State.RUNNING])
    def test_whose_gateway_does_not_come_back_ends(self, bench: Bench, state: State) -> None:
        bench.core.orphans.learn([orphan(state=state)])
        bench.pass_time(LOST_S - 1)
        assert bench.core.requests.find("r") is None
        bench.pass_time(2)
        ended = bench.request("r")
        assert (ended.state, ended.reason) == (State.FAILED, "GATEWAY_LOST")
        assert [e.event for e in ended.timeline] == ["queued", "failed"]
        assert bench.journaled == [("r", State.FAILED)]
        assert len(bench.core.requests) == len(bench.core.orphans) == 0

    def test_found_late_they_end_at_once_unless_they_are_known_by_then(self, bench: Bench) -> None:
        gateway = bench.gateway("g1")
        bench.worker()
        bench.submit(gateway, "known")
        bench.pass_time(LOST_S + 1)
        bench.core.orphans.learn([orphan("known"), orphan("lost")])
        bench.pass_time(1)
        assert (bench.state("known"), bench.state("lost")) == (State.PLACED, State.FAILED)

    def test_many_end_over_several_ticks(self, bench: Bench) -> None:
        bench.core.orphans.learn(orphan(str(i)) for i in range(2500))
        bench.now += LOST_S
        left = []
        for _ in range(3):
            bench.core.tick()
            left.append(len(bench.core.orphans))
        assert left == [1500, 500, 0]

    def test_a_gateway_that_comes_after_all(self, bench: Bench) -> None:
        bench.core.orphans.learn([orphan("runs"), orphan("waits", state=State.QUEUED)])
        bench.pass_time(LOST_S + 1)
        gateway = bench.gateway("g1")
        assert told(gateway) == [Revoked("waits", 0, "GATEWAY_LOST")]  # what runs needs no scheduler
        bench.finish("runs", lease=OLD_LEASE)
        assert (bench.state("runs"), bench.request("runs").completion_tokens) == (State.FAILED, 5)

    def test_what_a_late_gateway_announces_goes_on(self, bench: Bench) -> None:
        """Its worker may have dropped it by then, as nobody's: it must be possible to place it again."""
        bench.core.orphans.learn([orphan()])
        worker = bench.worker(held=(Held(request_id="r", lease=OLD_LEASE, sequences=1),))
        bench.pass_time(LOST_S + 1)
        assert (bench.state("r"), worker.revoked) == (State.FAILED, [OLD_LEASE])
        announce(bench, bench.gateway("g1"))
        assert (bench.state("r"), worker.placed) == (State.RUNNING, 1)
        bench.core.failover.leg_lost("r", OLD_LEASE, "WORKER_LOST")
        assert bench.state("r") is State.PLACED
        assert [e.event for e in bench.request("r").timeline][:3] == ["queued", "failed", "announced"]


class TestTheirGatewayComesBack:
    def test_announced_ones_are_adopted_with_their_past(self, bench: Bench) -> None:
        bench.core.orphans.learn([orphan(owner_epoch=4)])
        gateway, worker = bench.gateway("g1"), bench.worker()
        announce(bench, gateway)
        bench.pass_time(LOST_S + 1)
        adopted = bench.request("r")
        assert (adopted.state, adopted.lease, adopted.owner_epoch, worker.placed) == (State.RUNNING, OLD_LEASE, 4, 1)
        assert [e.event for e in adopted.timeline] == ["queued", "announced"]
        assert told(gateway) == []

    def test_queued_ones_are_submitted_again(self, bench: Bench) -> None:
        bench.core.orphans.learn([orphan(state=State.QUEUED)])
        gateway = bench.gateway("g1")
        bench.worker()
        bench.submit(gateway, "r")
        bench.pass_time(LOST_S + 1)
        assert bench.state("r") is State.PLACED
        assert [e.event for e in bench.request("r").timeline] == ["queued", "queued", "placed"]

    def test_a_withdrawal_made_meanwhile_counts(self, bench: Bench) -> None:
        bench.core.orphans.learn([orphan(state=State.QUEUED)])
        assert not bench.core.withdraw(bench.gateway("g2"), "r")
        assert bench.core.withdraw(bench.gateway("g1"), "r")
        assert bench.state("r") is State.CANCELLED

    def test_a_clients_cancel_ends_it_and_its_gateway_is_told(self, bench: Bench) -> None:
        bench.core.orphans.learn([orphan()])
        assert bench.core.cancel("r")
        assert bench.state("r") is State.CANCELLED
        owner = bench.gateway("g1")
        told(owner)
        announce(bench, owner)
        assert told(owner) == [Revoked("r", OLD_LEASE, "CANCELLED")]


class TestOtherGateways:
    def test_they_cannot_have_its_id_while_it_may_come_back(self, bench: Bench) -> None:
        bench.core.orphans.learn([orphan()])
        owner, other = bench.gateway("g1"), bench.gateway("g2")
        bench.worker()
        bench.submit(other, "r")
        assert refusals(told(other)) == ["DUPLICATE_REQUEST_ID"]
        announce(bench, owner)
        assert bench.request("r").gateway_id == "g1"

    def test_one_that_held_an_earlier_lease_is_told(self, bench: Bench) -> None:
        bench.core.orphans.learn([orphan()])
        other = bench.gateway("g2")
        announce(bench, other, OLD_LEASE - 1)
        assert told(other) == [Revoked("r", OLD_LEASE - 1, "RESUMED_ELSEWHERE")]
        assert bench.core.requests.find("r") is None

    def test_one_that_holds_a_later_lease_has_it(self, bench: Bench) -> None:
        """It had taken the request over, and the record did not get that far."""
        bench.core.orphans.learn([orphan()])
        announce(bench, bench.gateway("g2"), OLD_LEASE + 1)
        assert bench.request("r").gateway_id == "g2"


class TestTakeOver:
    def test_by_the_larger_epoch(self, bench: Bench) -> None:
        bench.core.orphans.learn([orphan(owner_epoch=1)])
        worker = bench.worker(held=(Held(request_id="r", lease=OLD_LEASE, sequences=1),))
        before, after = bench.gateway("g1"), bench.gateway("g2")
        bench.core.take_over(after, submission(), 1)
        assert refusals(told(after)) == ["RESUMED_ELSEWHERE"]
        bench.core.take_over(after, submission(), 2)
        assert (worker.revoked, worker.placed) == ([OLD_LEASE], 1)  # the old placement has gone at once
        assert bench.request("r").gateway_id == "g2"
        assert [e.event for e in bench.request("r").timeline] == ["queued", "resumed", "placed"]
        announce(bench, before)
        assert told(before)[-1] == Revoked("r", OLD_LEASE, "RESUMED_ELSEWHERE")
        bench.pass_time(LOST_S + 1)
        assert bench.state("r") is State.PLACED

    def test_by_nobody_elses_tenant(self, bench: Bench) -> None:
        bench.core.orphans.learn([orphan(tenant="a")])
        gateway = bench.gateway("g2")
        bench.worker()
        bench.core.take_over(gateway, submission(tenant="b"), 1)
        assert refusals(told(gateway)) == ["DUPLICATE_REQUEST_ID"]
        bench.core.take_over(gateway, submission(tenant="a"), 1)
        assert bench.state("r") is State.PLACED

    def test_said_again_to_the_new_scheduler(self, bench: Bench) -> None:
        bench.core.orphans.learn([orphan(state=State.QUEUED, owner_epoch=2)])
        gateway = bench.gateway("g1")
        bench.worker()
        for _ in range(2):
            bench.core.take_over(gateway, submission(), 2)
        assert refusals(told(gateway)) == []
        assert bench.request("r").placements == 1

    def test_after_it_was_given_up(self, bench: Bench) -> None:
        bench.core.orphans.learn([orphan(tenant="a")])
        bench.worker()
        bench.pass_time(LOST_S + 1)
        gateway = bench.gateway("g2")
        bench.core.take_over(gateway, submission(tenant="a"), 1)
        assert any(isinstance(event, Placed) for event in told(gateway))
        assert bench.core.shares.live("a") == 1
