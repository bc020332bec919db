"""First-time work: which steps there are of it, and that they touch nobody's blocks."""

from __future__ import annotations

import pytest
from lmesh_worker.engine.first_times import FirstTime, first_times, plan_of

SIZES = ((1, 2, 4), (256, 512, 1024))


def test_a_cpu_warms_its_samplers_and_nothing_else() -> None:
    pieces = first_times(False, None, max_tokens=512, max_seqs=32, max_len=2048)
    assert [(piece.prompts, piece.decodes, piece.times) for piece in pieces] == [((4,), 0, 1)] * 3
    assert len({piece.params for piece in pieces}) == 3


def test_an_accelerator_captures_every_size_and_meets_long_prompts() -> None:
    pieces = first_times(True, SIZES, max_tokens=4096, max_seqs=8, max_len=4096)
    assert pieces[0] == FirstTime(pieces[0].params, prompts=(4,)), "the first is all that a first token needs"
    twice = [piece for piece in pieces if piece.times == 2]
    greedy = [piece for piece in twice if piece.params == pieces[0].params]
    assert sorted(piece.decodes for piece in greedy if piece.decodes) == [1, 2, 4]
    assert sorted(sum(piece.prompts) for piece in greedy if piece.prompts) == [256, 512, 1024]
    once = [piece.prompts for piece in pieces if piece.times == 1 and sum(piece.prompts) > 4]
    assert [prompts for prompts in once if len(prompts) == 1] == [(1024,), (2048,), (3072,), (4096,)]
    assert [sum(prompts) for prompts in once if len(prompts) > 1] == [2048, 3072, 4096]


@pytest.mark.parametrize(("max_seqs", "max_len"), [(1, 2), (2, 100), (8, 700), (256, 131_072)])
def test_no_step_is_longer_than_the_engine_takes(max_seqs: int, max_len: int) -> None:
    decodes = tuple(rows for rows in SIZES[0] if rows <= max_seqs)
    pieces = first_times(True, (decodes, SIZES[1]), max_tokens=1024, max_seqs=max_seqs, max_len=max_len)
    assert pieces
    for piece in pieces:
        plan = plan_of(piece, tenure=-2, spare_block=9, block_size=16, max_len=max_len)
        assert plan.num_tokens == sum(piece.prompts) + piece.decodes <= 1024
        assert len(plan.rows) <= max_seqs
        assert len({row.sequence.tenure for row in plan.rows}) == len({row.sequence.slot for row in plan.rows})
        for row in plan.rows:
            assert row.start + row.count <= max_len
            written = row.sequence.blocks[row.start // 16 :]
            assert set(written) == {9} and len(row.sequence.blocks) == -(-(row.start + row.count) // 16)
