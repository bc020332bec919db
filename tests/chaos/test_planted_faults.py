"""The simulation finds planted faults: a check that it cannot miss is one that it does check."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import redis

from tests.chaos.plants import PLANTS
from tests.chaos.simulation import simulate
from tests.chaos.soak import store


@pytest.fixture(scope="module")
def client() -> Iterator[redis.Redis]:
    logging.disable(logging.CRITICAL)
    with store() as found:
        yield found
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_found(client: redis.Redis, name: str) -> None:
    plant = PLANTS[name]
    with plant.apply():
        tried = (simulate(seed, client, plant.shape) for seed in range(plant.seeds))
        found = next((outcome for outcome in tried if outcome.violations), None)
    assert found is not None, f"{name}: not found in {plant.seeds} lives"
    print(f"{name}: found in life {found.seed}: {found.violations[0]}")
