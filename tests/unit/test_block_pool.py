"""The block pool against a model that keeps everything the slow, obvious way."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from lmesh_worker.engine.block_pool import BlockPool, PoolExhaustedError

BLOCKS = 5
CONTENTS = [bytes([n]) for n in range(4)]


class PoolMachine(RuleBasedStateMachine):
    """References in a dict, contents in a dict, and free blocks in a list in the order of their eviction."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS)
        self.references = dict.fromkeys(range(BLOCKS), 0)
        self.content: dict[int, bytes] = {}
        self.plain = list(range(BLOCKS))  # free, nothing in them
        self.findable = []  # free, least recently released first

    def held(self) -> list[int]:
        return [block for block, count in self.references.items() if count]

    @precondition(lambda self: self.plain or self.findable)
    @rule()
    def allocate(self) -> None:
        block = self.pool.allocate()
        if self.plain:
            assert block in self.plain, "what nobody can find goes first"
            self.plain.remove(block)
        else:
            assert block == self.findable.pop(0), "then what was released longest ago"
            del self.content[block]
        self.references[block] = 1

    @precondition(lambda self: len(self.held()) == BLOCKS)
    @rule()
    def exhaust(self) -> None:
        with pytest.raises(PoolExhaustedError):
            self.pool.allocate()

    @rule(content=st.sampled_from(CONTENTS))
    def share(self, content: bytes) -> None:
        block = self.pool.find(content)
        if block is None:
            assert content not in self.content.values()
            return
        assert self.content[block] == content
        if block in self.findable:
            self.findable.remove(block)
        self.pool.share(block)
        self.references[block] += 1

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.held()))
        self.pool.release(block)
        self.references[block] -= 1
        if not self.references[block]:
            (self.findable if block in self.content else self.plain).append(block)

    @precondition(lambda self: self.held())
    @rule(data=st.data(), content=st.sampled_from(CONTENTS))
    def register(self, data: st.DataObject, content: bytes) -> None:
        block = data.draw(st.sampled_from(self.held()))
        fresh = content not in self.content.values()
        assert self.pool.register(block, content) is fresh
        if fresh:
            self.content[block] = content

    @rule(block=st.integers(0, BLOCKS - 1))
    def withdraw(self, block: int) -> None:
        self.pool.withdraw(block)
        self.content.pop(block, None)
        if block in self.findable:
            self.findable.remove(block)
            self.plain.append(block)

    @invariant()
    def same(self) -> None:
        assert [self.pool.references(block) for block in range(BLOCKS)] == list(self.references.values())
        assert self.pool.num_held == len(self.held())
        assert self.pool.num_free == len(self.plain) + len(self.findable)
        where = {content: block for block, content in self.content.items()}
        assert [self.pool.find(content) for content in CONTENTS] == [where.get(content) for content in CONTENTS]


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


def test_a_release_too_many_is_a_bug() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(block)


def test_the_first_of_two_equal_blocks_stays_the_findable_one() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(), pool.allocate()
    assert pool.register(first, b"x")
    assert not pool.register(second, b"x")
    pool.release(second)
    assert pool.find(b"x") == first
