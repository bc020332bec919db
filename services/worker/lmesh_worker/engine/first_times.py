"""First-time work: what is compiled, loaded or captured when a step of a kind comes for the first time.

The usual steps are made before a request asks for them, of nobody's sequences: one before the engine is ready, the
others while nothing waits for them. Draws of the whole vocabulary, penalties and adapters meet sizes of steps when
requests ask for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from lmesh_kernels.ops.prompt_attention import LEAST, STEP

from lmesh_worker.engine.plan import Row, StepPlan
from lmesh_worker.engine.sequence import Sequence
from lmesh_worker.engine.step_sizes import MIXED_SAMPLES, StepSizes
from lmesh_worker.messages import Params, Start

_GREEDY, _RANDOM, _TRUNCATED = Params(), Params(temperature=1.0), Params(temperature=1.0, top_p=0.9)
_FEW = 4  # tokens that compile what a prompt needs
_PROMPT = 512  # of the prompts that make up a step
_CONTEXT = 700  # tokens before a decode
_MANY = MIXED_SAMPLES + 1  # decodes beside prompts, so that the other size of sampling rows is met


class FirstTime(NamedTuple):
    """One piece of it: a step of decodes, of prompts, or both; run twice it is captured."""

    params: Params
    decodes: int = 0
    prompts: tuple[int, ...] = ()  # tokens of each
    times: int = 1

    @property
    def tokens(self) -> int:
        """Of the step."""
        return self.decodes + sum(self.prompts)


def first_times(
    accelerator: bool, sizes: StepSizes | None, *, max_tokens: int, max_seqs: int, max_len: int
) -> deque[FirstTime]:
    """All of it; of an accelerator the first piece alone is needed for a first token. `sizes`: of what is captured.

    Large steps come before small ones, which then find place in the memory that the large ones have left.
    """
    few = (min(_FEW, max_tokens, max_len),)
    kinds = (_GREEDY, _RANDOM, _TRUNCATED)
    if not accelerator:
        return deque(FirstTime(kind, prompts=few) for kind in kinds)
    pieces = deque(FirstTime(kind, prompts=few) for kind in kinds)
    pieces += [FirstTime(kind, decodes=1, times=2) for kind in kinds]
    usual = [FirstTime(_GREEDY, prompts=_cut(max_tokens, max_seqs))]
    for kind in (_GREEDY, _TRUNCATED):
        usual += () if sizes is None else _captured(kind, sizes, max_seqs)
    usual += _long(max_tokens, max_seqs, captured=0 if sizes is None else sizes.mixed[-1])
    pieces += [piece for piece in usual if 0 < piece.tokens <= max_tokens and max(piece.prompts, default=0) <= max_len]
    return pieces


def _captured(kind: Params, sizes: StepSizes, max_seqs: int) -> Iterator[FirstTime]:
    for decodes in (0, _MANY):
        for tokens in reversed(sizes.mixed):
            if decodes < min(tokens, max_seqs):
                yield FirstTime(kind, decodes, _cut(tokens - decodes, max_seqs - decodes), times=2)
    for rows in reversed(sizes.decodes):
        yield FirstTime(kind, decodes=rows, times=2)


def _long(max_tokens: int, max_seqs: int, *, captured: int) -> Iterator[FirstTime]:
    """Steps that run as they are: libraries choose, load and plan their kernels by size."""
    for tokens in range(max_tokens // STEP * STEP, LEAST - 1, -STEP):
        yield FirstTime(_GREEDY, prompts=(tokens - 1,))  # torch's attention plans for what is filled up to a step
        if tokens > captured:
            yield FirstTime(_GREEDY, prompts=_cut(tokens, max_seqs))


def _cut(tokens: int, most: int) -> tuple[int, ...]:
    """At most so many prompts that are so many tokens together."""
    count = min(most, -(-tokens // _PROMPT))
    return tuple(tokens // count + (i < tokens % count) for i in range(count))


def plan_of(piece: FirstTime, *, tenure: int, spare_block: int, block_size: int, max_len: int) -> StepPlan:
    """The step, past the batcher and the pool: what is written goes to the spare block, which is nobody's.

    `tenure` and as many below it as there are rows must be no other sequence's, so that the parameters are read.
    """
    context = max(0, min(_CONTEXT, max_len - 1))
    rows = []
    for slot, (start, count) in enumerate([(context, 1)] * piece.decodes + [(0, count) for count in piece.prompts]):
        end = start + count
        known = start or end  # a decode's id is most often still on the device
        sequence = Sequence(Start(-1, "first-time", 0, [0] * known, known, piece.params), b"", 0)
        sequence.blocks = [spare_block] * -(-end // block_size)
        if start >= block_size:  # decodes that begin with one block would share its reading
            sequence.blocks[0] = slot % max(1, spare_block)
        sequence.slot, sequence.tenure = slot, tenure - slot
        rows.append(Row(sequence, start, count, True, 0))
    return StepPlan(rows)
