"""A step of the same rows one token further: its columns are those that gathering them anew gives."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from lmesh_kernels.ops.attention_work import Shape, plan_pieces
from lmesh_kernels.ops.sample_params import SampleHints
from lmesh_kernels.platforms import detect
from lmesh_worker.engine.graphs import StepGraphs
from lmesh_worker.engine.inputs import StepColumns, gather
from lmesh_worker.engine.plan import Row, StepPlan
from lmesh_worker.engine.sequence import Sequence
from lmesh_worker.engine.slots import Slots
from lmesh_worker.engine.steady import Steady, is_steady
from lmesh_worker.messages import Params, Start

BLOCK = 4
SHAPE = Shape(kv_heads=2, group=4, wide_rows=8, programs=64, most_parts=512)
TOLD = SampleHints(any_random=False, any_truncation=False)


def slots() -> Slots:
    return Slots(detect("cpu"), max_seqs=6, max_blocks=32, spare_block=99, block_size=BLOCK)


def sequences() -> list[Sequence]:
    """Three that decode, their newest ids still on the device."""
    made = []
    for key, length in enumerate((3, 8, 13)):
        one = Sequence(Start(key, str(key), 0, list(range(length)), length, Params(max_tokens=99)), b"", key)
        one.slot, one.tenure, one.pending, one.computed = 5 - key, key, 1, length
        one.blocks = [30 * key + i for i in range(length // BLOCK + 1)]
        made.append(one)
    return made


def planned(told: list[Sequence]) -> list[Row]:
    """Their next step, as the batcher plans it."""
    return [Row(one, one.computed, 1, True, one.rollbacks) for one in told]


def went_on(told: list[Sequence]) -> None:
    """A step was launched, the one before it is committed."""
    for one in told:
        one.ids.append(7)
        one.computed += 1
        if one.computed // BLOCK >= len(one.blocks):
            one.blocks.append(20 + len(one.blocks) + one.key)


def steady_of(rows: list[Row], columns: StepColumns) -> Steady:
    pieces = plan_pieces(columns.q_lens, columns.kv_lens, SHAPE, names=columns.slots)
    key = StepGraphs(SHAPE, max_seqs=6, most_tokens=1024).key(len(rows), len(rows), pieces, TOLD)
    assert key is not None and is_steady(columns)
    return Steady(rows=rows, columns=columns, pieces=pieces, told=TOLD, key=key, sent={})


def test_a_token_further_is_what_gathering_anew_would_say() -> None:
    told, table = sequences(), slots()
    rows = planned(told)
    table.take_in(told)
    columns = gather(StepPlan(rows), table, BLOCK)
    for _ in range(11):
        before = steady_of(rows, columns)
        went_on(told)
        rows = planned(told)
        assert before.is_before(rows)
        table.take_in(told)
        columns = before.advanced(table, BLOCK)
        anew = gather(StepPlan(rows), table, BLOCK)
        for field in fields(StepColumns):
            assert np.array_equal(getattr(columns, field.name), getattr(anew, field.name)), field.name


def test_other_rows_do_not_follow() -> None:
    told, table = sequences(), slots()
    table.take_in(told)
    rows = planned(told)
    before = steady_of(rows, gather(StepPlan(rows), table, BLOCK))
    assert not before.is_before(rows), "the same step again"
    went_on(told)
    after = planned(told)
    assert before.is_before(after)
    assert not before.is_before(after[:2]) and not before.is_before([after[1], after[0], after[2]])
    told[1].ids.append(7)  # known to the host: then it must be sent
    assert not before.is_before(planned(told))


def test_a_step_with_a_chunk_or_a_known_id_is_not_steady() -> None:
    told, table = sequences(), slots()
    table.take_in(told)
    assert is_steady(gather(StepPlan(planned(told)), table, BLOCK))
    first = Row(told[2], 0, 13, True, 0)
    assert not is_steady(gather(StepPlan([*planned(told[:2]), first]), table, BLOCK))
    known = Row(told[0], 2, 1, True, 0)
    assert not is_steady(gather(StepPlan([known]), table, BLOCK))
