"""Probes of services that are several processes at one port."""

from __future__ import annotations

from itertools import cycle

import pytest
from lmesh_cli.probes import Probe, everywhere


def answers(*processes: bool) -> tuple[Probe, list[int]]:
    """A probe that each process of a port answers in turn, and how often it was asked."""
    turn, asked = cycle(processes), [0]

    async def probe() -> bool:
        asked[0] += 1
        return next(turn)

    return probe, asked


@pytest.mark.parametrize(
    ("processes", "ready"),
    [((True,), True), ((False,), False), ((True,) * 4, True), ((True, True, True, False), False)],
)
async def test_a_port_is_ready_when_all_of_its_processes_are(processes: tuple[bool, ...], ready: bool) -> None:
    probe, asked = answers(*processes)
    assert await everywhere(probe, len(processes))() is ready
    assert asked[0] == 1 if len(processes) == 1 else asked[0] > 3 * len(processes)
