"""First-time work: what is compiled, loaded or captured when a step of a kind comes for the first time.

It is done before its first request asks for it, by steps of nobody's sequences: one before the engine is ready, the
others while nothing waits for them.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from lmesh_worker.engine.plan import Row, StepPlan
from lmesh_worker.engine.sequence import Sequence
from lmesh_worker.messages import Params, Start

_GREEDY, _RANDOM, _TRUNCATED = Params(), Params(temperature=1.0), Params(temperature=1.0, top_p=0.9)
_FEW = 4  # tokens that compile what a prompt needs
_PROMPT = 512  # of the prompts that make up a step
_WHOLE = 1024  # of those that torch's own attention takes: it plans for each multiple of this
_CONTEXT = 700  # tokens before a decode: with few rows its attention is cut in parts, with many it is not


class FirstTime(NamedTuple):
    """One piece of it: a step of decodes, or of prompts, run as often as it takes."""

    params: Params
    decodes: int = 0
    prompts: tuple[int, ...] = ()  # tokens of each
    times: int = 1


def first_times(
    accelerator: bool,
    sizes: tuple[tuple[int, ...], tuple[int, ...]] | None,
    *,
    max_tokens: int,
    max_seqs: int,
    max_len: int,
) -> deque[FirstTime]:
    """All of it, in the order in which requests are likely to ask for it. `sizes` are those of graphs, where there are.

    A step that comes twice is captured. Of an accelerator the first piece alone is needed for a first token.
    """
    kinds = (_GREEDY, _RANDOM, _TRUNCATED)
    few = (min(_FEW, max_tokens, max_len),)
    if not accelerator:
        return deque(FirstTime(kind, prompts=few) for kind in kinds)
    pieces = deque(
        piece for kind in kinds for piece in (FirstTime(kind, prompts=few), FirstTime(kind, decodes=1, times=2))
    )
    decodes, mixed = ((), ()) if sizes is None else sizes
    for kind in (_GREEDY, _TRUNCATED):
        pieces += [FirstTime(kind, prompts=_cut(tokens, max_len), times=2) for tokens in mixed]
        pieces += [FirstTime(kind, decodes=rows, times=2) for rows in decodes[1:]]
    long = range(_WHOLE, max_tokens + 1, _WHOLE)
    pieces += [FirstTime(_GREEDY, prompts=(tokens,)) for tokens in long]
    pieces += [FirstTime(_GREEDY, prompts=_cut(tokens, max_len)) for tokens in long if tokens > max(mixed, default=0)]
    return deque(
        piece for piece in pieces if len(piece.prompts) <= max_seqs and max(piece.prompts, default=0) <= max_len
    )


def _cut(tokens: int, max_len: int) -> tuple[int, ...]:
    """Prompts that are so many tokens together."""
    count = -(-tokens // min(_PROMPT, max_len))
    return tuple(tokens // count + (i < tokens % count) for i in range(count))


def plan_of(piece: FirstTime, *, tenure: int, spare_block: int, block_size: int, max_len: int) -> StepPlan:
    """The step, past the batcher and the pool: what is written goes to the spare block, which is nobody's.

    `tenure` and as many below it as there are rows must be no other sequence's, so that the parameters are read.
    """
    start = 0 if piece.prompts else max(0, min(_CONTEXT, max_len - 1))
    rows = []
    for slot, count in enumerate(piece.prompts or (1,) * piece.decodes):
        end = start + count
        sequence = Sequence(Start(-1, "first-time", 0, [0] * end, end, piece.params), b"", 0)
        sequence.blocks = [spare_block] * -(-end // block_size)
        if start >= block_size:  # decodes that begin with one block would share its reading
            sequence.blocks[0] = slot % max(1, spare_block)
        sequence.slot, sequence.tenure = slot, tenure - slot
        rows.append(Row(sequence, start, count, True, 0))
    return StepPlan(rows)
