"""Probes of services that are several processes at one port."""

from __future__ import annotations

from itertools import cycle

import pytest
from lmesh_chassis.server import GrpcServer
from lmesh_cli.probes import Probe, everywhere, grpc_health


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


async def test_each_question_has_a_connection_of_its_own() -> None:
    """Else whichever process took the one connection would answer for all."""
    ready = GrpcServer("127.0.0.1:0", domain="lmesh.test", reuse_port=True)
    port = await ready.start()
    other = GrpcServer(f"127.0.0.1:{port}", domain="lmesh.test", reuse_port=True)
    await other.start()
    ready.set_all_serving(True)
    probe = everywhere(grpc_health(f"127.0.0.1:{port}"), 2)
    try:
        # Ten connections get to the same one of two processes once in 512 times, five times never.
        assert not all([await probe() for _ in range(5)])
        other.set_all_serving(True)
        assert await probe()
    finally:
        await ready.drain(0)
        await other.drain(0)
