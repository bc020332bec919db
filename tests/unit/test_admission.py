"""The bounded queue: order, fairness, its bound, and the times at which what waits expires."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from lmesh_scheduler.admission import FIRST_GUESS_MS, LEAST_MS, MOST_MS, AdmissionQueue, QueueFullError
from lmesh_scheduler.deadlines import SWEEP_FROM, Deadlines
from lmesh_scheduler.requests import Request, State, Submission
from lmesh_scheduler.shares import Shares


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def request(request_id: str, *, tenant: str = "", priority: int = 0, **times: float) -> Request:
    submission = Submission(
        request_id=request_id, model="m", prompt_ids=(1,), max_tokens=1, tenant=tenant, priority=priority
    )
    return Request(submission=submission, gateway_id="g", prompt_tokens=1, **times)  # type: ignore[arg-type]


def add(queue: AdmissionQueue, shares: Shares, one: Request) -> None:
    queue.add(one)
    shares.enter(one.submission.tenant)


def anyone(_: Request) -> bool:
    return True


def drain(queue: AdmissionQueue, shares: Shares) -> list[str]:
    taken = []
    while (one := queue.next(anyone)) is not None:
        queue.take(one)
        shares.charge(one)
        taken.append(one.id)
    return taken


class TestOrder:
    def test_arrival(self) -> None:
        shares = Shares({})
        queue = AdmissionQueue(10, shares, Clock())
        for name in "abc":
            add(queue, shares, request(name))
        assert drain(queue, shares) == ["a", "b", "c"]

    def test_priority_before_arrival(self) -> None:
        shares = Shares({})
        queue = AdmissionQueue(10, shares, Clock())
        for name, priority in (("late", 5), ("normal", 0), ("soon", -1), ("normal2", 0)):
            add(queue, shares, request(name, priority=priority))
        assert drain(queue, shares) == ["soon", "normal", "normal2", "late"]

    def test_tenants_take_turns(self) -> None:
        shares = Shares({})
        queue = AdmissionQueue(10, shares, Clock())
        for name in ("a1", "a2", "a3", "a4", "b1", "b2", "c1"):
            add(queue, shares, request(name, tenant=name[0]))
        assert drain(queue, shares) == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]

    def test_a_tenant_that_comes_late_waits_one_turn(self) -> None:
        shares = Shares({})
        queue = AdmissionQueue(10, shares, Clock())
        for name in ("a1", "a2", "a3"):
            add(queue, shares, request(name, tenant="a"))
        first = queue.next(anyone)
        assert first is not None
        queue.take(first)
        shares.charge(first)
        add(queue, shares, request("b1", tenant="b"))
        assert drain(queue, shares) == ["a2", "b1", "a3"]

    def test_who_may_not_be_placed_keeps_the_place(self) -> None:
        shares = Shares({})
        queue = AdmissionQueue(10, shares, Clock())
        for name in ("a1", "a2", "b1"):
            add(queue, shares, request(name, tenant=name[0]))
        passed = queue.next(lambda r: not r.id.startswith("a"))
        assert passed is not None
        assert passed.id == "b1"
        queue.take(passed)
        shares.charge(passed)
        assert queue.next(lambda r: r.id == "a3") is None
        assert drain(queue, shares) == ["a1", "a2"]

    def test_earlier_deadlines_first_within_a_tenant(self) -> None:
        shares = Shares({})
        queue = AdmissionQueue(10, shares, Clock())
        for name, deadline in (("late", 9.0), ("soon", 3.0), ("never", math.inf), ("late2", 9.0)):
            add(queue, shares, request(name, deadline=deadline))
        queue.add_first(request("again", deadline=50.0))
        assert drain(queue, shares) == ["again", "soon", "late", "late2", "never"]


class TestBound:
    def test_full(self) -> None:
        shares = Shares({})
        queue = AdmissionQueue(2, shares, Clock())
        queue.add(request("a"))
        queue.add(request("b", tenant="other", priority=-3))
        with pytest.raises(QueueFullError) as refused:
            queue.add(request("c"))
        assert refused.value.retry_after_ms == FIRST_GUESS_MS
        assert len(queue) == 2

    def test_an_ended_request_makes_room_and_leaves_nothing(self) -> None:
        shares = Shares({})
        queue = AdmissionQueue(1, shares, Clock())
        for i in range(100):
            one = request(str(i), tenant=str(i), priority=i)
            queue.add(one)
            queue.remove(one)
        assert len(queue) == 0
        assert queue.waiting() == []
        assert queue.next(anyone) is None

    @pytest.mark.parametrize(("interval_s", "expected"), [(2.0, 4000), (1e-6, LEAST_MS), (1e6, MOST_MS)])
    def test_retry_follows_the_pace(self, interval_s: float, expected: int) -> None:
        clock = Clock()
        queue = AdmissionQueue(4, Shares({}), clock)
        for name in "abcd":
            queue.add(request(name))
        for name in "efg":
            one = queue.next(anyone)
            assert one is not None
            queue.take(one)
            clock.now += interval_s
            queue.add(request(name))
        with pytest.raises(QueueFullError) as refused:
            queue.add(request("x"))
        assert refused.value.retry_after_ms == expected


@hypothesis_settings(max_examples=150, deadline=None)
@given(
    arrivals=st.lists(st.sampled_from("abc"), min_size=1, max_size=20),
    removed=st.sets(st.integers(0, 19)),
)
def test_position_is_what_really_goes_before(arrivals: list[str], removed: set[int]) -> None:
    shares = Shares({})
    queue = AdmissionQueue(100, shares, Clock())
    requests = [request(str(i), tenant=tenant) for i, tenant in enumerate(arrivals)]
    for one in requests:
        add(queue, shares, one)
    for i in removed & set(range(len(requests))):
        queue.remove(requests[i])
    left = [one for i, one in enumerate(requests) if i not in removed]
    positions = {one.id: queue.position(one) for one in left}
    assert sorted(one.id for one in queue.waiting()) == sorted(positions)
    assert drain(queue, shares) == sorted(positions, key=lambda request_id: positions[request_id])
    assert sorted(positions.values()) == list(range(len(left)))


class TestDeadlines:
    def test_queue_deadline_only_while_queued(self) -> None:
        deadlines = Deadlines()
        waits = request("waits", deadline=10.0, queue_deadline=5.0)
        placed = request("placed", deadline=10.0, queue_deadline=5.0)
        for one in (waits, placed):
            deadlines.add(one)
        placed.state = State.PLACED
        assert deadlines.due(4.9) == []
        assert deadlines.due(5.0) == [waits]
        waits.state = State.EXPIRED
        assert deadlines.due(10.0) == [placed]
        assert len(deadlines) == 0

    def test_each_once_even_when_both_have_passed(self) -> None:
        deadlines = Deadlines()
        one = request("a", deadline=2.0, queue_deadline=1.0)
        deadlines.add(one)
        assert deadlines.due(3.0) == [one]
        assert deadlines.due(3.0) == []

    def test_none(self) -> None:
        deadlines = Deadlines()
        deadlines.add(request("a"))
        assert len(deadlines) == 0
        assert deadlines.due(math.inf) == []

    def test_what_ended_early_does_not_pile_up(self) -> None:
        deadlines = Deadlines()
        kept = request("kept", deadline=600.0)
        deadlines.add(kept)
        for i in range(20 * SWEEP_FROM):
            one = request(str(i), deadline=600.0 + i)
            deadlines.add(one)
            one.state = State.FINISHED
        assert len(deadlines) <= SWEEP_FROM + 1
        assert deadlines.due(600.0) == [kept]
