"""First-time work: which steps there are of it, and that they touch nobody's blocks."""

from __future__ import annotations

from collections import Counter

import pytest
from lmesh_worker.engine.first_times import FirstTime, first_times, plan_of
from lmesh_worker.engine.step_sizes import StepSizes

SIZES = StepSizes((1, 2, 4, 80), (64, 512, 1024))


def test_a_cpu_warms_its_samplers_and_nothing_else() -> None:
    pieces = first_times(False, None, max_tokens=512, max_seqs=32, max_len=2048)
    assert [(piece.prompts, piece.decodes, piece.times) for piece in pieces] == [((4,), 0, 1)] * 3
    assert len({piece.params for piece in pieces}) == 3


def test_an_accelerator_captures_every_size_and_meets_long_prompts() -> None:
    pieces = first_times(True, SIZES, max_tokens=4096, max_seqs=80, max_len=4096)
    greedy = pieces[0].params
    assert pieces[0] == FirstTime(greedy, prompts=(4,)), "the first is all that a first token needs"
    twice = [piece for piece in pieces if piece.times == 2 and piece.params == greedy]
    assert {piece.decodes for piece in twice if not piece.prompts} == {1, 2, 4, 80}
    alone = [piece.tokens for piece in twice if piece.prompts and not piece.decodes]
    beside = [piece.tokens for piece in twice if piece.prompts and piece.decodes > 64]
    assert alone == [1024, 512, 64] and beside == [1024, 512], "large ones first"
    assert Counter(len(piece.prompts) + piece.decodes > 64 for piece in twice if piece.prompts) == {False: 3, True: 2}
    once = [piece for piece in pieces if piece.times == 1 and piece.tokens > 4]
    assert once[0].tokens == 4096, "the largest of all before any other"
    assert [piece.prompts for piece in once if len(piece.prompts) == 1] == [(4095,), (3071,), (2047,), (1023,)]
    assert [piece.tokens for piece in once[1:] if len(piece.prompts) > 1] == [4096, 3072, 2048]


@pytest.mark.parametrize(
    ("max_tokens", "max_seqs", "max_len"), [(8, 1, 2), (256, 2, 100), (256, 8, 700), (16_640, 256, 131_072)]
)
def test_no_step_is_longer_than_the_engine_takes(max_tokens: int, max_seqs: int, max_len: int) -> None:
    sizes = StepSizes(tuple(rows for rows in SIZES.decodes if rows <= max_seqs), SIZES.mixed)
    pieces = first_times(True, sizes, max_tokens=max_tokens, max_seqs=max_seqs, max_len=max_len)
    assert pieces
    for piece in pieces:
        plan = plan_of(piece, tenure=-2, spare_block=9, block_size=16, max_len=max_len)
        assert plan.num_tokens == piece.tokens <= max_tokens
        assert len(plan.rows) <= max_seqs
        assert len({row.sequence.tenure for row in plan.rows}) == len({row.sequence.slot for row in plan.rows})
        for row in plan.rows:
            assert row.start + row.count <= max_len
            written = row.sequence.blocks[row.start // 16 :]
            assert set(written) == {9} and len(row.sequence.blocks) == -(-(row.start + row.count) // 16)
