"""Drives the batcher and its pool with random events, beside a model of its own of what memory must hold.

The model knows nothing of reference counts or hashes. It keeps, for every block, what the planned steps wrote into
each of its places (a digest of the sequence's salt and all ids up to there), so a step that reads anything else than
its own sequence's past is found at once, whatever went wrong before: a wrong sharing, an early reuse, a stale hash.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass

import torch
from lmesh_worker.engine.batcher import Batcher
from lmesh_worker.engine.block_pool import BlockPool
from lmesh_worker.engine.commit import Committer
from lmesh_worker.engine.outputs import ReportBuilder
from lmesh_worker.engine.plan import StepPlan
from lmesh_worker.engine.quarantine import isolate
from lmesh_worker.engine.runner import StepResult
from lmesh_worker.engine.sequence import Sequence, State
from lmesh_worker.messages import Params, Start

BLOCK, BLOCKS, MAX_LEN = 4, 48, 96
Content = int  # chained over root and ids, up to and with this place


@dataclass
class Counts:
    """What happened in a run."""

    events: int = 0
    steps: int = 0
    aborts: int = 0
    failures: int = 0
    finished: int = 0
    shared_tokens: int = 0
    demand: float = 0.0  # sum over events of the blocks that live sequences will need at their end


class Driver:
    """One seeded run; `event` does one thing and then compares everything."""

    def __init__(self, seed: int, pool: BlockPool | None = None) -> None:
        self.rng = random.Random(seed)
        self.pool = pool or BlockPool(BLOCKS)
        self.batcher = Batcher(
            self.pool, block_size=BLOCK, max_seqs=12, max_step_tokens=24, max_model_len=MAX_LEN, prefix_cache=True
        )
        self.live: dict[int, Sequence] = {}
        self.commit = Committer(self.batcher, lambda s: self.live.pop(s.key, None) and None)
        self.in_flight: deque[StepPlan] = deque()
        self.memory: list[list[Content | None]] = [[None] * BLOCK for _ in range(BLOCKS)]
        self.chains: dict[int, list[Content]] = {}
        self.counts = Counts()
        self.next_key = 0
        # A few stems, so that prompts share prefixes of all lengths; two salts, so that some must not.
        self.stems = [[self.rng.randrange(50) for _ in range(40)] for _ in range(4)]

    def event(self) -> None:
        self.counts.events += 1
        self.counts.demand += sum(
            -(-min(MAX_LEN, s.prompt_len + s.params.max_tokens) // BLOCK) for s in self.live.values()
        )
        kind = self.rng.random()
        if len(self.live) < 24 and (kind < 0.35 or not self.live):
            self.add()
        elif kind < 0.40 and self.live:
            self.abort()
        elif kind < 0.41 and self.in_flight:
            self.fail()
        else:
            self.step()
        self.compare()

    def add(self) -> None:
        stem = self.rng.choice(self.stems)
        ids = [*stem[: self.rng.randrange(1, 40)], *(self.rng.randrange(50) for _ in range(self.rng.randrange(8)))]
        params = Params(max_tokens=self.rng.randrange(1, 40), stop_token_ids=(49,))
        salt = self.rng.choice([b"a", b"a", b"b"])
        priority = self.rng.choice([0, 0, 1])
        self.next_key += 1
        start = Start(self.next_key, str(self.next_key), 0, ids, len(ids), params, "", priority)
        sequence = Sequence(start, salt, self.next_key)
        self.live[sequence.key] = sequence
        self.batcher.add(sequence)

    def abort(self) -> None:
        self.counts.aborts += 1
        sequence = self.rng.choice(list(self.live.values()))
        self.batcher.remove(sequence)
        del self.live[sequence.key]

    def step(self) -> None:
        plan = self.batcher.schedule()
        if plan is not None:
            self.counts.steps += 1
            self.execute(plan)
            self.in_flight.append(plan)
        if self.in_flight and (plan is None or len(self.in_flight) > 1):
            self.finish_step(self.in_flight.popleft())

    def contents(self, sequence: Sequence, end: int) -> list[Content]:
        """What places 0 to end - 1 must hold; an id still on the device is the one that the fake device will give."""
        chain = self.chains.setdefault(sequence.key, [])
        for p in range(len(chain), end):
            token = sequence.ids[p] if p < len(sequence.ids) else self.sampled(sequence, p)
            chain.append(hash((chain[-1] if chain else sequence.root, token)))
        return chain

    @staticmethod
    def sampled(sequence: Sequence, position: int) -> int:
        return hash((sequence.key, position)) % 50

    def execute(self, plan: StepPlan) -> None:
        """What the device does: all writes of the step, then reads of each row's past."""
        assert 0 < plan.num_tokens <= self.batcher.max_step_tokens
        assert all(r.count == 1 for r in plan.rows[: plan.num_decodes])
        for row in plan.rows:
            contents = self.contents(row.sequence, row.start + row.count)
            for p in range(row.start, row.start + row.count):
                self.memory[row.sequence.blocks[p // BLOCK]][p % BLOCK] = contents[p]
        for row in plan.rows:
            contents, blocks = self.contents(row.sequence, row.start + row.count), row.sequence.blocks
            for p in range(row.start + row.count):
                assert self.memory[blocks[p // BLOCK]][p % BLOCK] == contents[p], f"{row.sequence.key} reads place {p}"

    def finish_step(self, plan: StepPlan) -> None:
        rows = [r for r in plan.rows if r.samples]
        ids = torch.tensor([self.sampled(r.sequence, r.start + r.count) for r in rows], dtype=torch.int64)
        before = len(self.live)
        self.commit.apply(plan, StepResult(ids, torch.ones(len(rows), dtype=torch.bool)), ReportBuilder())
        self.counts.finished += before - len(self.live)

    def fail(self) -> None:
        """The oldest step fails: its writes did not happen, nor did those of the step behind it."""
        self.counts.failures += 1
        plans = list(self.in_flight)
        self.in_flight.clear()
        for plan in plans:
            for row in plan.rows:
                if row.rollbacks == row.sequence.rollbacks and row.sequence.state is State.RUNNING:
                    for p in range(row.start, row.start + row.count):
                        self.memory[row.sequence.blocks[p // BLOCK]][p % BLOCK] = None
        for culprit in isolate(self.batcher, plans, RuntimeError("planted")):
            self.batcher.remove(culprit.sequence)
            del self.live[culprit.sequence.key]

    def compare(self) -> None:
        """Reference counts against the block lists of running sequences, and every list against its state."""
        held = Counter(b for s in self.batcher.running for b in s.blocks)
        for block in range(BLOCKS):
            assert self.pool.references(block) == held[block], f"block {block}"
        assert self.pool.num_free == BLOCKS - len(held)
        assert self.pool.num_held == len(held)
        waiting, running = set(self.batcher.waiting), set(self.batcher.running)
        assert not waiting & running
        assert waiting | running == set(self.live.values())
        assert all(not s.blocks for s in waiting)
        assert all(len(set(s.blocks)) == len(s.blocks) for s in running)
        slots = [s.slot for s in running]
        assert len(set(slots)) == len(slots)

    def run(self, events: int) -> Counts:
        while self.counts.events < events:
            self.event()
        while self.live or self.in_flight:  # everything ends: nothing starves, nothing leaks
            self.step()
            self.compare()
        assert self.pool.num_held == 0
        return self.counts
