"""The batcher's policy without a device: what is computed, in which order, and who gives way."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lmesh_worker.engine.batcher import Batcher
from lmesh_worker.engine.block_pool import BlockPool
from lmesh_worker.engine.commit import Committer
from lmesh_worker.engine.outputs import ReportBuilder
from lmesh_worker.engine.plan import StepPlan
from lmesh_worker.engine.runner import StepResult
from lmesh_worker.engine.sequence import Sequence, State
from lmesh_worker.messages import Params, Start

STOP = 7_777


def make(blocks: int = 4096, **overrides: Any) -> Batcher:
    defaults = {"block_size": 16, "max_seqs": 32, "max_step_tokens": 512, "max_model_len": 1024, "prefix_cache": True}
    return Batcher(BlockPool(blocks), **(defaults | overrides))


def sequence(key: int, ids: Iterable[int], *, priority: int = 0, salt: bytes = b"", **params: Any) -> Sequence:
    ids = list(ids)
    start = Start(key, str(key), 0, ids, len(ids), Params(**({"max_tokens": 1} | params)), "", priority)
    return Sequence(start, salt, key)


@dataclass
class Loop:
    """The engine's loop with a device that always samples `token`."""

    batcher: Batcher
    depth: int = 1
    token: int = 5
    plans: list[StepPlan] = field(default_factory=list)
    computed: list[tuple[int, int, int]] = field(default_factory=list)  # (key, start, count) of every row
    in_flight: deque[StepPlan] = field(default_factory=deque)

    def step(self) -> StepPlan | None:
        plan = self.batcher.schedule()
        if plan is not None:
            self.plans.append(plan)
            self.computed += [(row.sequence.key, row.start, row.count) for row in plan.rows]
            self.in_flight.append(plan)
        if self.in_flight and (plan is None or len(self.in_flight) > self.depth):
            self.commit(self.in_flight.popleft())
        return plan

    def commit(self, plan: StepPlan) -> None:
        count = sum(row.samples for row in plan.rows)
        result = StepResult(torch.full((count,), self.token), torch.ones(count, dtype=torch.bool))
        Committer(self.batcher, lambda s: None).apply(plan, result, ReportBuilder())

    def run(self, sequences: Iterable[Sequence]) -> Loop:
        for one in sequences:
            self.batcher.add(one)
        while self.batcher.running or self.batcher.waiting or self.in_flight:
            self.step()
        return self

    @property
    def tokens(self) -> int:
        return sum(count for _, _, count in self.computed)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_burst_computes_its_shared_prefix_once(depth: int) -> None:
    """32 requests that share 512 tokens and have 32 of their own, at a budget of 512."""
    batcher = make()
    prompts = [[*range(512), *(1000 * k + j for j in range(32))] for k in range(1, 33)]
    loop = Loop(batcher, depth).run(sequence(k, ids) for k, ids in enumerate(prompts))
    assert loop.tokens == 512 + 32 * 32
    assert [plan.num_tokens for plan in loop.plans] == [512, 512, 512], "and no step is left half empty"
    assert batcher.prefix_hit_tokens == 31 * 512


def test_a_prompt_that_is_wholly_cached_computes_its_last_block_again() -> None:
    batcher = make()
    first = Loop(batcher).run([sequence(1, range(64))])
    again = Loop(batcher).run([sequence(2, range(64))])
    assert (first.tokens, again.tokens) == (64, 16)


def test_without_the_cache_nothing_is_shared() -> None:
    batcher = make(prefix_cache=False)
    assert Loop(batcher).run(sequence(k, range(64)) for k in range(4)).tokens == 4 * 64


def test_another_salt_shares_nothing() -> None:
    batcher = make()
    loop = Loop(batcher).run(sequence(k, range(64), salt=bytes([k])) for k in range(4))
    assert loop.tokens == 4 * 64


def test_scores_of_a_prompt_are_computed_even_if_it_is_cached() -> None:
    batcher = make()
    Loop(batcher).run([sequence(1, range(64))])
    loop = Loop(batcher)
    batcher.add(sequence(2, range(64), prompt_logprobs=0))
    plan = loop.step()
    assert plan is not None
    assert [(row.start, row.count, row.prompt_logits) for row in plan.rows] == [(0, 64, True)]


def test_what_decoding_filled_is_shared_too() -> None:
    batcher = make()
    Loop(batcher).run([sequence(1, range(16), max_tokens=33)])
    turn = [*range(16), *[5] * 33, *range(100, 110)]  # the next turn of the same conversation
    loop = Loop(batcher).run([sequence(2, turn)])
    assert loop.tokens == len(turn) - 48


@pytest.mark.parametrize("depth", [0, 1])
def test_no_step_is_run_past_the_known_length(depth: int) -> None:
    loop = Loop(make(), depth).run([sequence(1, range(10), max_tokens=6)])
    assert loop.tokens == 10 + 5  # the sixth id needs no step of its own


def test_a_stop_token_costs_one_surplus_row_under_pipelining() -> None:
    alone, ahead = (
        Loop(make(), depth, token=STOP).run([sequence(1, range(10), max_tokens=6, stop_token_ids=(STOP,))])
        for depth in (0, 1)
    )
    assert (alone.tokens, ahead.tokens) == (10, 11)


def test_next_ids_come_before_chunks() -> None:
    batcher = make(max_seqs=4, max_step_tokens=20)
    loop = Loop(batcher, depth=0)
    for key in (1, 2):
        batcher.add(sequence(key, [key] * 5, max_tokens=20))
    loop.step()
    batcher.add(sequence(3, range(100), priority=-1))  # even a better rank does not hold up ids under way
    for _ in range(3):
        plan = loop.step()
        assert plan is not None
        assert [(row.sequence.key, row.count) for row in plan.rows] == [(1, 1), (2, 1), (3, 18)]
        assert plan.num_decodes == 2


def test_rank_is_priority_then_arrival() -> None:
    batcher = make(max_seqs=1, max_step_tokens=16)
    order = [(1, 1), (2, 0), (3, 0), (4, -1)]
    loop = Loop(batcher).run(sequence(key, [key], priority=priority) for key, priority in order)
    assert [key for key, _, _ in loop.computed] == [4, 2, 3, 1]


def running(batcher: Batcher, *sequences: Sequence) -> None:
    """Brings sequences to where each samples its next id."""
    for one in sequences:
        batcher.add(one)
    loop = Loop(batcher, depth=0)
    while any(one.state is not State.RUNNING or one.uncomputed > 1 for one in sequences):
        loop.step()


def preempted(batcher: Batcher) -> list[int]:
    """Who waits once the pool has run out."""
    loop = Loop(batcher, depth=0)
    while not batcher.preemptions:
        loop.step()
    return [one.key for one in batcher.waiting]


def test_the_victim_is_the_cheapest_for_each_block_that_it_frees() -> None:
    batcher = make(blocks=15, block_size=4, max_model_len=60)
    shared = list(range(100, 116))
    first = sequence(1, [1] * 6, max_tokens=50)
    holder = sequence(2, shared, max_tokens=50, salt=b"s")
    cheap = sequence(3, [*shared, 9], max_tokens=50, salt=b"s")  # one block of its own, and in it one token
    dear = sequence(4, [2] * 14, max_tokens=50)  # all its blocks are its own: four tokens for each
    running(batcher, first, holder, cheap, dear)
    assert preempted(batcher) == [3]


def test_the_worst_priority_gives_way_first() -> None:
    batcher = make(blocks=12, block_size=4, max_model_len=48)
    running(
        batcher,
        sequence(1, [1] * 5, max_tokens=40),
        sequence(2, [2] * 17, max_tokens=40, priority=1),
        sequence(3, [3] * 5, max_tokens=40),
    )
    assert preempted(batcher) == [2]


@pytest.mark.parametrize("depth", [0, 1])
def test_two_sequences_do_not_thrash_each_other(depth: int) -> None:
    """Each outgrows half the pool: one gives way once and comes back when the other has ended."""
    batcher = make(blocks=10, block_size=4, max_model_len=40)
    one, two = sequence(1, [1] * 4, max_tokens=36), sequence(2, [2] * 4, max_tokens=36)
    loop = Loop(batcher, depth).run([one, two])
    assert (one.preemptions, two.preemptions) == (0, 1)
    assert loop.tokens <= 2 * 39 + 40


def test_a_newcomer_is_not_admitted_to_be_preempted_at_once() -> None:
    batcher = make(blocks=8, block_size=4, max_model_len=32)
    grows, fits_exactly = sequence(1, [1] * 4, max_tokens=12), sequence(2, [2] * 28)
    loop = Loop(batcher).run([grows, fits_exactly])
    assert batcher.preemptions == 0
    assert loop.tokens == 4 + 11 + 28


@pytest.mark.parametrize("fails", [0, 1])
def test_blocks_of_a_failed_step_are_computed_by_those_who_shared_them(fails: int) -> None:
    batcher = make()
    loop = Loop(batcher)
    for key in range(3):
        batcher.add(sequence(key, [*range(512), key], max_tokens=4))
    loop.step()
    plans = [plan for plan in (loop.in_flight.popleft() if loop.in_flight else None, batcher.schedule()) if plan]
    if not fails:
        loop.commit(plans[0])
    batcher.roll_back(plans[0:] if fails else plans[1:])
    again = Loop(batcher).run([])
    assert {key for key, start, _ in again.computed if start == 0} == ({0} if fails else set())
    assert batcher.pool.num_held == 0


requests = st.lists(
    st.tuples(
        st.integers(1, 30),  # prompt
        st.integers(1, 20),  # new tokens
        st.integers(0, 2),  # stem
        st.integers(0, 1),  # priority
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(
    requests=requests,
    blocks=st.integers(13, 30),
    budget=st.integers(4, 40),
    depth=st.integers(0, 1),
    cache=st.booleans(),
    arrivals=st.integers(1, 4),
)
def test_everything_ends_with_its_length(
    requests: list[tuple[int, int, int, int]], blocks: int, budget: int, depth: int, cache: bool, arrivals: int
) -> None:
    """Any crowd over any pool that holds one sequence: budgets hold, nobody starves, nothing leaks."""
    batcher = make(
        blocks=blocks, block_size=4, max_seqs=4, max_step_tokens=budget, max_model_len=52, prefix_cache=cache
    )
    loop = Loop(batcher, depth)
    waiting = [
        sequence(key, [stem] * length, max_tokens=new, priority=priority)
        for key, (length, new, stem, priority) in enumerate(requests)
    ]
    every = list(waiting)
    steps = 0
    while waiting or batcher.running or batcher.waiting or loop.in_flight:
        for one in waiting[:arrivals]:
            batcher.add(one)
        del waiting[:arrivals]
        first = batcher.running[0] if batcher.running else None
        plan = loop.step()
        steps += 1
        assert plan is None or 0 < plan.num_tokens <= budget
        assert plan is None or all(row.count == 1 for row in plan.rows[: plan.num_decodes])
        assert first is None or first.state is not State.WAITING, "the first in rank never gives way"
        assert steps < 5_000
    for one, (length, new, _, _) in zip(every, requests, strict=True):
        assert len(one.ids) == length + new
        assert one.state is State.ENDED
    assert batcher.pool.num_held == 0


def test_prompts_that_nearly_fill_a_step_are_not_cut_by_what_one_leaves() -> None:
    batcher = make(max_step_tokens=528, prefix_cache=False)
    loop = Loop(batcher).run(sequence(key, [key] * 512, max_tokens=4) for key in range(4))
    assert [count for _, _, count in loop.computed if count > 1] == [512] * 4
    # A prompt that what is left holds whole goes with it.
    mixed = Loop(make(max_step_tokens=528, prefix_cache=False)).run(
        [sequence(1, [1] * 512, max_tokens=1), sequence(2, [2] * 12, max_tokens=1)]
    )
    assert len(mixed.plans) == 1
