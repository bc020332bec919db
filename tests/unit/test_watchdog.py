"""The watchdog's verdict over time."""

from __future__ import annotations

import pytest
from lmesh_worker.messages import Progress
from lmesh_worker.watchdog import Verdict, Watchdog


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watchdog(clock: Clock) -> Watchdog:
    return Watchdog(bound_s=10, compile_bound_s=100, clock=clock)


def test_idle_is_healthy_for_ever(clock: Clock, watchdog: Watchdog) -> None:
    clock.now += 1e6
    assert watchdog.verdict(live=0) == Verdict.OK


def test_the_bound_begins_when_work_comes_to_an_idle_engine(clock: Clock, watchdog: Watchdog) -> None:
    clock.now += 1e6
    assert watchdog.verdict(live=1) == Verdict.OK
    clock.now += 10
    assert watchdog.verdict(live=1) == Verdict.OK
    clock.now += 0.1
    assert watchdog.verdict(live=1) == Verdict.STUCK


def test_a_committed_step_renews_it_and_a_report_without_one_does_not(clock: Clock, watchdog: Watchdog) -> None:
    watchdog.verdict(live=1)
    clock.now += 9
    watchdog.step(1)
    clock.now += 9
    assert watchdog.verdict(live=1) == Verdict.OK
    watchdog.step(1)  # gauges only
    clock.now += 2
    assert watchdog.verdict(live=1) == Verdict.STUCK
    watchdog.step(2)
    assert watchdog.verdict(live=1) == Verdict.OK


def test_a_stuck_engine_is_not_well_before_it_is_heard_of(clock: Clock, watchdog: Watchdog) -> None:
    """Taking its work away, as the scheduler does, mends nothing; new work would be lost as well."""
    watchdog.verdict(live=1)
    clock.now += 11
    assert watchdog.verdict(live=1) == Verdict.STUCK
    assert watchdog.verdict(live=0) == Verdict.STUCK
    clock.now += 1e6
    assert watchdog.verdict(live=0) == Verdict.STUCK
    assert watchdog.verdict(live=1) == Verdict.STUCK
    watchdog.verdict(live=0)
    watchdog.step(0)  # it answers the aborts
    assert watchdog.verdict(live=0) == Verdict.OK
    assert watchdog.verdict(live=1) == Verdict.OK


def test_compiling_has_a_bound_of_its_own(clock: Clock, watchdog: Watchdog) -> None:
    watchdog.verdict(live=1)
    watchdog.progress(Progress.COMPILING)
    clock.now += 99
    assert watchdog.verdict(live=1) == Verdict.COMPILING
    clock.now += 2
    assert watchdog.verdict(live=1) == Verdict.STUCK
    watchdog.progress(Progress.OK)
    assert watchdog.verdict(live=1) == Verdict.OK
