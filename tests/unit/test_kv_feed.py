"""When the scheduler is told of the prefix cache, and in how many pieces."""

from __future__ import annotations

import asyncio

from lmesh_worker.kv_changes import split_hashes
from lmesh_worker.kv_feed import KvFeed

HASHES = [bytes([n]) * 16 for n in range(10)]


async def test_a_link_begins_with_a_snapshot_even_of_nothing() -> None:
    feed = KvFeed(interval_s=1000)
    first = feed.next()
    assert first is not None
    assert (first.seq, first.snapshot, first.added, first.removed) == (1, True, b"", b"")
    assert feed.next() is None


async def test_a_large_snapshot_goes_in_parts() -> None:
    feed = KvFeed(interval_s=1000, most_bytes=3 * 16)
    feed.take(b"".join(HASHES), b"")
    deltas = [feed.next() for _ in range(4)]
    assert feed.next() is None
    assert [d.seq for d in deltas if d] == [1, 2, 3, 4]
    assert [d.snapshot for d in deltas if d] == [True, False, False, False]
    assert [len(d.added) // 16 for d in deltas if d] == [3, 3, 3, 1]
    assert b"".join(d.added for d in deltas if d) == b"".join(HASHES)
    feed.close()


async def test_changes_wait_for_each_other_and_a_snapshot_does_not() -> None:
    feed = KvFeed(interval_s=1000)
    feed.next()
    for block_hash in HASHES[:4]:
        feed.take(block_hash, b"")
    feed.take(b"", HASHES[0])
    assert feed.next() is None
    feed.snapshot()
    delta = feed.next()
    assert delta is not None
    assert (delta.seq, delta.snapshot, set(split_hashes(delta.added)), delta.removed) == (
        2,
        True,
        set(HASHES[1:4]),
        b"",
    )
    feed.restart()
    delta = feed.next()
    assert delta is not None
    assert (delta.seq, delta.snapshot, set(split_hashes(delta.added))) == (1, True, set(HASHES[1:4]))
    feed.close()


async def test_it_rings_once_for_what_gathered() -> None:
    feed, due = KvFeed(interval_s=0.02), asyncio.Event()
    feed.next()
    feed.on_due = due.set
    feed.take(HASHES[0], b"")
    feed.take(HASHES[1], b"")
    feed.take(b"", HASHES[0])
    async with asyncio.timeout(30):
        await due.wait()
    delta = feed.next()
    assert delta is not None
    assert (delta.seq, delta.snapshot, delta.added, delta.removed) == (2, False, HASHES[1], b"")
    due.clear()
    feed.take(b"", HASHES[1])
    async with asyncio.timeout(30):
        await due.wait()
    delta = feed.next()
    assert delta is not None
    assert (delta.added, delta.removed) == (b"", HASHES[1])
    feed.close()
