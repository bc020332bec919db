"""10^5 random events over a pool of a quarter of the demand: no count, no content, no sequence goes wrong."""

from __future__ import annotations

import logging

import pytest
from lmesh_worker.engine.block_pool import BlockPool

from tests.pool_driver import BLOCKS, Driver

EVENTS = 100_000


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("lmesh_worker.engine.quarantine").setLevel(logging.CRITICAL)  # planted failures by the thousand


@pytest.mark.parametrize("seed", [1, 2])
def test_random_events(seed: int) -> None:
    driver = Driver(seed)
    counts = driver.run(EVENTS // 2)
    assert 0.25 * counts.demand / counts.events >= BLOCKS, "the pool was meant to be scarce"
    assert counts.finished > 1_000
    assert counts.aborts > 500
    assert counts.failures > 50
    assert driver.batcher.preemptions > 500
    assert driver.batcher.prefix_hit_tokens > 10_000


class LeakyPool(BlockPool):
    """Forgets a release now and then."""

    calls = 0

    def release(self, block: int) -> None:
        LeakyPool.calls += 1
        if LeakyPool.calls % 500:
            super().release(block)


class StalePool(BlockPool):
    """Leaves an evicted block findable."""

    def allocate(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._references[block] = 1
        return block


class HastyPool(BlockPool):
    """Frees a shared block with its first release."""

    def release(self, block: int) -> None:
        self._references[block] = 1
        super().release(block)


@pytest.mark.parametrize("broken", [LeakyPool, StalePool, HastyPool])
def test_a_planted_fault_is_found(broken: type[BlockPool]) -> None:
    with pytest.raises((AssertionError, KeyError)):
        Driver(3, broken(BLOCKS)).run(20_000)


def test_a_dropped_rollback_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that a failed step had announced must not stay findable."""
    driver = Driver(4)
    plain = driver.batcher.roll_back

    def forgetful(plans: list) -> list:
        for plan in plans:
            plan.registered.clear()
        return plain(plans)

    monkeypatch.setattr(driver.batcher, "roll_back", forgetful)
    with pytest.raises(AssertionError, match="reads"):
        driver.run(50_000)
