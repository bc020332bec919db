"""Seeded lives of a whole mesh on virtual time: whatever breaks, clients get what they are owed and nothing is left.

CHAOS_SECONDS bounds the long test and CHAOS_SEED is its first seed; `make chaos` sets both. Without them a fixed range
of seeds is run, as far as a minute goes: what fails then fails again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import redis

from tests.chaos.simulation import Shape, simulate
from tests.chaos.soak import soak, store

SECONDS = float(os.environ.get("CHAOS_SECONDS") or 60)
SEEDS = 10**9 if "CHAOS_SECONDS" in os.environ else 400
FIRST = int(os.environ.get("CHAOS_SEED") or 0)


@pytest.fixture(scope="module")
def client() -> Iterator[redis.Redis]:
    with store() as found:
        yield found


def test_a_calm_mesh_gives_everybody_everything(client: redis.Redis) -> None:
    for seed in range(10):
        outcome = simulate(seed, client, Shape(faults=0))
        assert not outcome.violations, outcome.told()
        assert set(outcome.outcomes) <= {"finish", "left", "CANCELLED"}, outcome.told()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_seed_is_one_life(client: redis.Redis, seed: int) -> None:
    lives = [simulate(seed, client, Shape(faults=6)) for _ in range(2)]
    assert lives[0].trace == lives[1].trace and lives[0].steps == lives[1].steps


@pytest.mark.timeout(SECONDS + 240)
def test_whatever_breaks_requests_end_once_with_the_right_ids() -> None:
    soaked = soak(seconds=SECONDS, seeds=SEEDS, first=FIRST, shape=Shape(), most_bad=3)
    print(soaked.summary())
    assert not soaked.bad, "\n\n".join(outcome.told() for outcome in soaked.bad)
    assert soaked.seeds >= 20 and soaked.outcomes["finish"] > soaked.seeds
