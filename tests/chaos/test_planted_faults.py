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
    for seed in range(plant.seeds):
        with plant.apply():
            found = simulate(seed, client, plant.shape).violations
        if found and not simulate(seed, client, plant.shape).violations:  # it is the plant that was found
            print(f"{name}: found in life {seed}: {found[0]}")
            return
    pytest.fail(f"{name}: not found in {plant.seeds} lives")
