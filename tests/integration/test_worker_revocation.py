"""What the scheduler and a worker tell each other of leases: what it still runs, and what it is to drop."""

from __future__ import annotations

import asyncio

from lmesh.scheduler.v1 import fleet_pb2

from tests.worker_process import ABORTED, LENGTH, running_worker, start, until


def revoke(*leases: int) -> fleet_pb2.FleetResponse:
    return fleet_pb2.FleetResponse(revoked_leases=leases)


async def test_a_scheduler_that_comes_back_is_told_what_runs() -> None:
    async with running_worker(drain_timeout_s=0.2) as running:
        gateway = await running.attached()
        await gateway.start(
            start(1, "hold-a", lease=50, max_tokens=9),
            start(2, "hold-a", lease=50, choice=1, max_tokens=9),
            start(3, "hold-b", lease=60, max_tokens=9),
            start(4, "count", lease=70),
        )
        await gateway.read_until_finished((4, 70))
        running.scheduler.commands.put_nowait(None)
        await until(lambda: len(running.scheduler.hellos) == 2)
        held = {(h.request_id, h.lease): h.sequences for h in running.scheduler.hellos[1].held}
        assert held == {("hold-a", 50): 2, ("hold-b", 60): 1}


async def test_revoked_leases_end_their_sequences_and_no_others() -> None:
    async with running_worker(drain_timeout_s=0.2) as running:
        one, two = await running.attached("one"), await running.attached("two")
        await one.start(start(1, "hold-a", lease=50, max_tokens=9), start(2, "hold-b", lease=51, max_tokens=9))
        await two.start(start(1, "hold-c", lease=52, max_tokens=9))
        await until(lambda: running.worker.sessions.live == 3 and running.metric("lmesh:kv_blocks_used") == 6)
        running.scheduler.commands.put_nowait(revoke(50, 52, 999))
        await asyncio.gather(one.read_until_finished((1, 50)), two.read_until_finished((1, 52)))
        assert one.received[1, 50].finish == two.received[1, 52].finish == ABORTED
        assert one.received[2, 51].finish == 0
        await until(lambda: running.metric("lmesh:kv_blocks_used") == 2)
        assert running.metric("lmesh:revoked_sequences_total") == 2
        # A start that was on its way when its lease was revoked is not taken; its slot and link go on.
        await one.start(start(1, "count", lease=999), start(3, "count", lease=53))
        await one.read_until_finished((1, 999), (3, 53))
        assert (one.received[1, 999].finish, one.received[1, 999].ids) == (ABORTED, [])
        assert one.received[3, 53].finish == LENGTH


async def test_a_revoked_lease_without_its_gateway_is_dropped_too() -> None:
    async with running_worker(run_grace_s=600.0) as running:
        gateway = await running.attached()
        await gateway.start(start(1, "hold", lease=50, max_tokens=9))
        await gateway.read()
        gateway.call.cancel()
        running.scheduler.commands.put_nowait(revoke(50))
        await until(lambda: running.metric("lmesh:kv_blocks_used") == 0)
        assert running.worker.sessions.live == 0


async def test_starts_for_an_engine_that_does_not_read_are_bounded() -> None:
    """What does not fit is dropped, so that its gateway has it placed elsewhere; what fits is run once it reads."""
    async with running_worker(max_engine_backlog_bytes=1000) as running:
        gateway = await running.attached()
        writer = running.engine._writer
        assert writer is not None
        sent = writer.write
        kept: list[bytes] = []
        writer.write = kept.append  # type: ignore[method-assign]
        backlog = [0]
        writer.transport.get_write_buffer_size = lambda: backlog[0]  # type: ignore[method-assign]
        await gateway.start(start(1))
        await until(lambda: running.worker.sessions.live == 1)
        backlog[0] = 1001
        await gateway.start(start(2))
        await gateway.read_until_finished((2, 102))
        assert gateway.received[2, 102].finish == ABORTED
        backlog[0] = 0
        writer.write = sent  # type: ignore[method-assign]
        for frame in kept:
            sent(frame)
        await gateway.read_until_finished((1, 101))
        assert gateway.received[1, 101].finish == LENGTH


async def test_the_cache_is_told_from_a_snapshot_on() -> None:
    def known(deltas: list[fleet_pb2.KvDelta]) -> set[int]:
        ids: set[int] = set()
        for delta in deltas:
            ids = set() if delta.snapshot else ids
            ids |= {int.from_bytes(delta.added[i : i + 16], "little") for i in range(0, len(delta.added), 16)}
            ids -= {int.from_bytes(delta.removed[i : i + 16], "little") for i in range(0, len(delta.removed), 16)}
        return ids

    async with running_worker() as running:
        scheduler = running.scheduler
        await until(lambda: bool(scheduler.deltas))
        assert (scheduler.deltas[0].seq, scheduler.deltas[0].snapshot, scheduler.deltas[0].added) == (1, True, b"")
        gateway = await running.attached()
        await gateway.start(start(1, "kv+", ids=[10], max_tokens=200))
        await gateway.read_until_finished((1, 101))
        await gateway.start(start(1, "kv-", ids=[10], max_tokens=50))
        await gateway.read_until_finished((1, 101))
        await until(lambda: known(scheduler.deltas) == set(range(61, 211)))
        assert running.metric("lmesh:kv_granules") == 150
        deltas = scheduler.deltas
        assert [d.seq for d in deltas] == list(range(1, len(deltas) + 1))
        assert len(deltas) < 200, "not a message a step"

        scheduler.commands.put_nowait(fleet_pb2.FleetResponse(kv_snapshot=True))  # it saw a gap
        await until(lambda: scheduler.deltas[-1].snapshot)
        assert scheduler.deltas[-1].seq == len(deltas) + 1
        assert known(scheduler.deltas[-1:]) == set(range(61, 211))

        before = len(scheduler.deltas)
        scheduler.commands.put_nowait(None)  # a new link
        await until(lambda: len(scheduler.deltas) > before)
        assert (scheduler.deltas[before].seq, scheduler.deltas[before].snapshot) == (1, True)
        assert known(scheduler.deltas[before:]) == set(range(61, 211))
