"""What is told of the prefix cache: whoever applies it holds what the pool holds, whatever happened in between."""

from __future__ import annotations

import asyncio
import logging

from hypothesis import given, settings
from hypothesis import strategies as st
from lmesh_worker.engine.batcher import Batcher
from lmesh_worker.engine.block_pool import BlockPool
from lmesh_worker.engine.sequence import Sequence
from lmesh_worker.kv_changes import split_hashes
from lmesh_worker.kv_feed import Delta, KvFeed

from tests.pool_driver import Driver

BLOCKS = 6
# The odd ones end a granule: a hash stands for all that came before it, so it always ends one or never does.
HASHES = [bytes([n]) * 16 for n in range(12)]
GRANULES = HASHES[1::2]


class Receiver:
    """A scheduler's side: applies deltas as the protocol says."""

    def __init__(self) -> None:
        self.seq = 0
        self.known: set[bytes] = set()

    def apply(self, delta: Delta) -> None:
        self.seq += 1
        assert delta.seq == self.seq, "contiguous in one link"
        assert delta.snapshot or self.seq > 1, "a link begins with a snapshot"
        if delta.snapshot:
            self.known.clear()
        added, removed = split_hashes(delta.added), split_hashes(delta.removed)
        assert not self.known & set(added), "told twice"
        assert self.known >= set(removed), "never told"
        self.known |= set(added)
        self.known -= set(removed)


class Chain:
    """A pool, the server's feed and a scheduler, with time between them."""

    def __init__(self, most_hashes: int) -> None:
        self.pool = BlockPool(BLOCKS)
        self.feed = KvFeed(interval_s=0.0, most_bytes=16 * most_hashes)
        self.most = most_hashes
        self.receiver = Receiver()

    def act(self, action: str, value: int) -> None:
        held = [block for block in range(BLOCKS) if self.pool.references(block)]
        block, found = held[value % len(held)] if held else None, self.pool.find(HASHES[value])
        match action:
            case "allocate" if self.pool.num_free:
                self.pool.allocate()
            case "release" if block is not None:
                self.pool.release(block)
            case "register" if block is not None:
                self.pool.register(block, HASHES[value], ends_granule=HASHES[value] in GRANULES)
            case "share" if found is not None:
                self.pool.share(found)
            case "withdraw":
                self.pool.withdraw(value % BLOCKS)
            case "report":
                self.report()
            case "send":
                self.send()
            case "relink":
                self.receiver = Receiver()
                self.feed.restart()
            case "snapshot":
                self.feed.snapshot()

    def report(self) -> None:
        added, removed = self.pool.changes.take()
        assert len(added) + len(removed) <= 2 * BLOCKS * 16, "bounded by the pool"
        self.feed.take(added, removed)
        assert self.pool.changes.take() == (b"", b"")

    def send(self) -> bool:
        delta = self.feed.next()
        if delta is not None:
            assert len(delta.added) + len(delta.removed) <= self.most * 16
            self.receiver.apply(delta)
        return delta is not None

    @property
    def findable(self) -> set[bytes]:
        return {granule for granule in GRANULES if self.pool.find(granule) is not None}


KINDS = ("allocate", "release", "register", "register", "share", "withdraw", "report", "send", "relink", "snapshot")
ACTIONS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, len(HASHES) - 1)), max_size=120)


@settings(max_examples=300, deadline=None)
@given(ACTIONS, st.integers(1, 4))
def test_the_scheduler_ends_with_what_the_pool_has(actions: list[tuple[str, int]], most_hashes: int) -> None:
    async def replay() -> None:
        chain = Chain(most_hashes)
        for action in actions:
            chain.act(*action)
        chain.report()
        while chain.send():
            pass
        assert chain.receiver.known == chain.findable
        assert len(chain.feed) == len(chain.findable)
        chain.feed.close()

    asyncio.run(replay())


@settings(max_examples=200, deadline=None)
@given(ACTIONS)
def test_each_report_brings_a_mirror_up_to_date(actions: list[tuple[str, int]]) -> None:
    chain, mirror = Chain(1), set()
    for action, value in actions:
        if action not in ("report", "send", "relink", "snapshot"):
            chain.act(action, value)
            continue
        added, removed = (set(split_hashes(told)) for told in chain.pool.changes.take())
        assert not added & mirror
        assert removed <= mirror
        mirror = (mirror | added) - removed
        assert mirror == chain.findable


class Telling(Driver):
    """The batcher under random events, with granules of two blocks, and a mirror beside it."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.batcher._granule_blocks = 2
        self.seen: list[Sequence] = []
        self.mirror: set[bytes] = set()
        self.evicted = 0
        add = self.batcher.add

        def noted(sequence: Sequence) -> None:
            self.seen.append(sequence)
            add(sequence)

        self.batcher.add = noted  # type: ignore[method-assign]

    def compare(self) -> None:
        super().compare()
        added, removed = (split_hashes(told) for told in self.pool.changes.take())
        self.evicted += len(removed)
        self.mirror |= set(added)
        self.mirror -= set(removed)
        if self.counts.events % 100 == 0:
            ends = {end for sequence in self.seen for end in sequence.hashes[1::2]}
            assert self.mirror == {end for end in ends if self.pool.find(end) is not None}


def test_a_busy_engines_granules_are_told() -> None:
    """With chunks, preemptions, aborts and failed steps that take back what they had announced."""
    logging.getLogger("lmesh_worker.engine.quarantine").setLevel(logging.CRITICAL)
    driver = Telling(5)
    driver.run(10_000)
    assert driver.evicted > 500
    assert driver.batcher.preemptions > 50
    assert driver.counts.failures > 10


def test_nothing_is_told_of_a_cache_that_is_off() -> None:
    pool = BlockPool(64)
    batcher = Batcher(pool, block_size=16, max_seqs=2, max_step_tokens=256, max_model_len=512, prefix_cache=False)
    assert batcher.schedule() is None
    assert not pool.changes
