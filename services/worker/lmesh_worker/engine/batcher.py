"""The policy: which sequences run in the next step, with which blocks, and who gives way when blocks run out.

One token budget for everything: running sequences' next ids first, then prefills in order, in chunks of what is
left. A prompt's full blocks are findable as soon as the step that computes them is planned, so sequences of one
burst, even of one step, compute a shared prefix once. When blocks run out, a victim is recomputed later; the
first sequence in rank is never a victim, so it always ends, and with it every other in turn.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Iterable

from lmesh_kernels.blocks import granule_blocks

from lmesh_worker.engine.block_pool import BlockPool
from lmesh_worker.engine.plan import Row, StepPlan
from lmesh_worker.engine.sequence import Sequence, State

# A chunk is begun with this part of a step's tokens at least, unless it ends its prompt. 8 prompts of 8,192 tokens in
# steps of 8,448: begun with the 256 that the first leaves, every later one is cut in two, and cut again.
_SLIVERS = 16


class Batcher:
    """Waiting and running sequences over one block pool."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_seqs: int,
        max_step_tokens: int,
        max_model_len: int,
        prefix_cache: bool,
    ) -> None:
        if max_seqs > max_step_tokens:
            raise ValueError(f"max_seqs {max_seqs} exceeds max_step_tokens {max_step_tokens}: every sequence needs one")
        self.pool = pool
        self.block_size = block_size
        self.max_seqs = max_seqs
        self.max_step_tokens = max_step_tokens
        self.max_model_len = max_model_len
        self.prefix_cache = prefix_cache
        self._granule_blocks = granule_blocks(block_size)
        self.running: list[Sequence] = []  # in rank
        self.waiting: list[Sequence] = []  # in rank
        self.suspects: deque[Sequence] = deque()  # run alone, one after the other, while there are any
        self._free_slots = list(range(max_seqs - 1, -1, -1))
        self._tenures = 0
        self.preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0

    # -- entering and leaving

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence by rank."""
        insort(self.waiting, sequence, key=lambda s: s.rank)

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence wherever it is; its blocks are free at once (launched work on them comes first)."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self._give_back(sequence)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        if sequence in self.suspects:
            self.suspects.remove(sequence)
        sequence.state = State.ENDED

    def distrust(self, sequence: Sequence) -> None:
        """Makes a sequence's blocks unfindable: what is in them may be why it failed, and would fail others."""
        for block in sequence.blocks:
            self.pool.withdraw(block)

    def _give_back(self, sequence: Sequence) -> None:
        # The tail first: it is the least likely to be asked for again, so it should be evicted first.
        for block in reversed(sequence.blocks):
            self.pool.release(block)
        sequence.blocks = []
        self._free_slots.append(sequence.slot)
        sequence.slot = -1

    # -- planning

    def schedule(self) -> StepPlan | None:
        """The next step, or None when nothing can run before an earlier one is committed."""
        if self.suspects:
            return self._schedule_suspect(self.suspects[0])
        plan = StepPlan([])
        self._make_room_for_decodes()
        budget = self._plan_running(plan, self.max_step_tokens)
        self._admit(plan, budget)
        return self._finish_plan(plan)

    def _finish_plan(self, plan: StepPlan) -> StepPlan | None:
        if plan.rows and plan.num_decodes < len(plan.rows):
            plan.rows.sort(key=lambda row: row.count != 1)
        return plan if plan.rows else None

    def _plan_running(self, plan: StepPlan, budget: int) -> int:
        chunks = []
        for sequence in self.running:  # next ids before chunks; rank within each
            uncomputed = sequence.uncomputed
            if uncomputed <= 0 or self._done(sequence):
                continue
            if uncomputed > 1:
                chunks.append(sequence)
            elif budget:
                budget -= self._plan_row(plan, sequence, budget)
        for sequence in chunks:
            if budget == 0 or (sequence.uncomputed > budget and self._is_sliver(plan, budget)):
                break
            budget -= self._plan_row(plan, sequence, budget)
        return budget

    def _is_sliver(self, plan: StepPlan, budget: int) -> bool:
        """Whether so little is left of a step that no chunk is begun with it."""
        return bool(plan.rows) and budget < self.max_step_tokens // _SLIVERS

    def _done(self, sequence: Sequence) -> bool:
        """Whether a sequence only waits for its launched outputs."""
        return sequence.pending > 0 and sequence.saturated(self.max_model_len)

    def _plan_row(self, plan: StepPlan, sequence: Sequence, budget: int) -> int:
        uncomputed, start = sequence.uncomputed, sequence.computed
        count = uncomputed if uncomputed <= budget else budget
        samples = count == uncomputed
        wants = start < sequence.prompt_len and sequence.wants_prompt_logprobs()
        plan.rows.append(Row(sequence, start, count, samples, sequence.rollbacks, wants))
        sequence.computed += count
        if not sequence.first_scheduled_at:
            sequence.first_scheduled_at = time.monotonic()
        if self._fills_block(sequence, sequence.computed):
            plan.registered += self._register_full_blocks(sequence, sequence.computed)
        if samples:
            sequence.pending += 1
        return count

    def _fills_block(self, sequence: Sequence, computed: int) -> bool:
        """Whether one may be full that is not findable yet."""
        return self.prefix_cache and computed >= (sequence.registered + 1) * self.block_size

    def _register_full_blocks(self, sequence: Sequence, computed: int) -> list[int]:
        """Makes findable the blocks that `computed` tokens fill and whose ids are known; returns the new ones."""
        registered = []
        for index in range(sequence.registered, min(computed, len(sequence.ids)) // self.block_size):
            block = sequence.blocks[index]
            ends = (index + 1) % self._granule_blocks == 0
            if self.pool.register(block, sequence.full_block_hash(index, self.block_size), ends_granule=ends):
                registered.append(block)
            sequence.registered = index + 1
        return registered

    def note_committed(self, row: Row) -> None:
        """Called when a step's ids are known: blocks that they fill become findable.

        Only as far as this step computed: a later one, launched already, may still fail.
        """
        sequence, computed = row.sequence, row.start + row.count
        if self._fills_block(sequence, computed) and sequence.state is State.RUNNING:
            self._register_full_blocks(sequence, computed)

    # -- blocks

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _make_room_for_decodes(self) -> None:
        """Gives every running sequence the block of its next token, preempting until they fit."""
        size = self.block_size
        for sequence in list(self.running):
            if len(sequence.ids) + sequence.pending <= len(sequence.blocks) * size:
                continue  # nearly always, so without a call
            while sequence.state is State.RUNNING and self._lacks_block(sequence):
                if self.pool.num_free:
                    sequence.blocks.append(self.pool.allocate())
                else:
                    self._preempt(self._victim())

    def _lacks_block(self, sequence: Sequence) -> bool:
        return sequence.length > len(sequence.blocks) * self.block_size and not self._done(sequence)

    def _victim(self) -> Sequence:
        """The cheapest running sequence to recompute among the worst priority, never the first in rank.

        The one that lacks a block may be it: then it waits. Cost: tokens to compute again (those in blocks that
        others hold stay) for each block that it frees.
        """
        others = self.running[1:]
        if not others:
            raise AssertionError("one sequence alone outgrew the pool; the memory plan must not allow it")
        worst = max(s.priority for s in others)
        candidates = [s for s in others if s.priority == worst]
        return min(candidates, key=self._recompute_cost)

    def _recompute_cost(self, sequence: Sequence) -> tuple[float, int]:
        own = sum(1 for block in sequence.blocks if self.pool.references(block) == 1)
        if own == 0:
            return float("inf"), -sequence.order
        shared_tokens = (len(sequence.blocks) - own) * self.block_size
        return max(0, sequence.computed - shared_tokens) / own, -sequence.order

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        sequence.preemptions += 1
        self._to_waiting(sequence)

    def _to_waiting(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.computed = 0
        sequence.state = State.WAITING
        self.add(sequence)

    # -- admission

    def _admit(self, plan: StepPlan, budget: int) -> None:
        while budget and self.waiting and self._free_slots:
            sequence = self.waiting[0]
            # A preempted sequence's last id may still be on its way; it is a step away at most.
            if sequence.pending or (self._is_sliver(plan, budget) and self._to_compute(sequence) > budget):
                return
            if not self._take_blocks(sequence):
                return
            budget -= self._plan_row(plan, sequence, budget)

    def _to_compute(self, sequence: Sequence) -> int:
        return len(sequence.ids) - len(self._cached_blocks(sequence)) * self.block_size

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Blocks for all known ids, shared ones first; False (and nothing taken) where they do not fit.

        A block a running sequence is left over, so that the newcomer is not preempted in the very next step.
        """
        found = self._cached_blocks(sequence)
        needed = self._blocks_for(len(sequence.ids)) - len(found)
        revived = sum(1 for block in found if self.pool.references(block) == 0)
        if needed + revived + len(self.running) > self.pool.num_free and self.running:
            return False
        if needed + revived > self.pool.num_free:
            return False
        for block in found:
            self.pool.share(block)
        sequence.blocks = found + [self.pool.allocate() for _ in range(needed)]
        self._start_running(sequence, len(found) * self.block_size)
        return True

    def _start_running(self, sequence: Sequence, cached: int) -> None:
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=lambda s: s.rank)
        sequence.state = State.RUNNING
        sequence.slot = self._free_slots.pop()
        self._tenures += 1
        sequence.tenure = self._tenures
        sequence.counted = False
        sequence.computed = cached
        sequence.registered = cached // self.block_size
        if not sequence.first_scheduled_at:
            sequence.cached_tokens = min(cached, sequence.prompt_len)
            self.prefix_query_tokens += sequence.prompt_len
            self.prefix_hit_tokens += sequence.cached_tokens

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest known prefix; the last token is always computed, for its logits."""
        if not self.prefix_cache or sequence.wants_prompt_logprobs():
            return []
        found = []
        for index in range((len(sequence.ids) - 1) // self.block_size):
            block = self.pool.find(sequence.full_block_hash(index, self.block_size))
            if block is None:
                break
            found.append(block)
        return found

    # -- failed steps

    def roll_back(self, plans: Iterable[StepPlan]) -> list[Sequence]:
        """Undoes launched steps whose results are void; their live sequences wait again. Returns those, in rank."""
        plans = list(plans)
        for plan in plans:
            for block in plan.registered:
                self.pool.withdraw(block)
        live = {row.sequence.key: row.sequence for plan in plans for row in plan.rows}
        affected = sorted((s for s in live.values() if s.state is not State.ENDED), key=lambda s: s.rank)
        for sequence in affected:
            sequence.pending = 0
            sequence.rollbacks += 1
            if sequence.state is State.RUNNING:
                self._to_waiting(sequence)
        return affected

    def _schedule_suspect(self, suspect: Sequence) -> StepPlan | None:
        """A step with one suspect only; the others keep their places meanwhile."""
        if suspect.pending:
            return None
        plan = StepPlan([])
        if suspect.state is State.WAITING:
            if not self._free_slots:
                self._preempt(self._last_but(suspect))
            while not self._take_blocks(suspect):
                self._preempt(self._last_but(suspect))
        if self._lacks_block(suspect):
            while not self.pool.num_free:
                self._preempt(self._last_but(suspect))
            suspect.blocks.append(self.pool.allocate())
        self._plan_row(plan, suspect, self.max_step_tokens)
        return plan

    def _last_but(self, suspect: Sequence) -> Sequence:
        return next(s for s in reversed(self.running) if s is not suspect)
