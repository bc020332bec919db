"""What a step sends to its device: columns of a plan, slots that follow their sequences, sizes that graphs have."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from lmesh_kernels.ops.attention_work import Shape, plan_pieces
from lmesh_kernels.ops.sample_params import SampleHints
from lmesh_kernels.platforms import detect
from lmesh_worker.engine.buffers import Arena, Layout
from lmesh_worker.engine.device_steps import _neighbours
from lmesh_worker.engine.graphs import AdapterRoom, GraphKey, StepGraphs, size_above
from lmesh_worker.engine.inputs import gather
from lmesh_worker.engine.plan import Row, StepPlan
from lmesh_worker.engine.sent_columns import columns_of
from lmesh_worker.engine.sequence import Sequence
from lmesh_worker.engine.slots import Slots
from lmesh_worker.messages import Params, Start

BLOCK = 4
SHAPE = Shape(kv_heads=2, group=4, wide_rows=8, programs=64, most_parts=512)
GREEDY = SampleHints(any_random=False, any_truncation=False)


def sequence(
    key: int, length: int, slot: int, blocks: list[int], *, tenure: int | None = None, **told: float
) -> Sequence:
    made = Sequence(Start(key, str(key), 0, list(range(100, 100 + length)), length, Params(**told)), b"", key)  # type: ignore[arg-type]
    made.slot, made.blocks, made.tenure = slot, blocks, key if tenure is None else tenure
    return made


def slots() -> Slots:
    return Slots(detect("cpu"), max_seqs=6, max_blocks=16, spare_block=99, block_size=BLOCK)


def test_columns_say_what_the_plan_says() -> None:
    decode = sequence(1, 9, 3, [7, 8, 9])
    decode.pending = 1  # its tenth id is on the device
    first = sequence(2, 6, 0, [4, 5])
    later = sequence(3, 11, 5, [1, 2, 3])
    rows = [Row(decode, 9, 1, True, 0), Row(first, 0, 6, True, 0), Row(later, 4, 5, False, 0)]
    table = slots()
    table.take_in([decode, first, later])
    columns = gather(StepPlan(rows), table, BLOCK)
    assert columns.ids.tolist() == [0, *range(100, 106), *range(104, 109)]
    assert columns.token_slots.tolist() == [3, *[-1] * 11]
    assert columns.positions.tolist() == [9, *range(6), *range(4, 9)]
    places = [9 * 4 + 1, 16, 17, 18, 19, 20, 21, 8, 9, 10, 11, 12]
    assert columns.kv_slots.tolist() == places
    assert (columns.q_lens.tolist(), columns.kv_lens.tolist()) == ([1, 6, 5], [10, 6, 9])
    assert columns.sample_tokens.tolist() == [0, 6]
    assert (columns.sample_slots.tolist(), columns.sample_positions.tolist()) == ([3, 0], [10, 6])
    assert columns.num_decodes == 1


def test_rows_that_know_their_ids_may_read_each_other() -> None:
    decodes = [sequence(1, 9, 3, [7, 8, 9]), sequence(2, 5, 0, [4, 5])]
    for decode in decodes:
        decode.pending = 1
    # The last token of a prompt, which fills a block: the other one's prompt goes on from there, in the same step.
    filling, after = sequence(3, 8, 5, [1, 2]), sequence(4, 9, 1, [1, 2, 3])
    table = slots()
    table.take_in([*decodes, filling, after])
    steps = [Row(decodes[0], 9, 1, True, 0), Row(decodes[1], 5, 1, True, 0)]
    known = [Row(filling, 7, 1, True, 0), Row(after, 8, 1, True, 0)]
    chunk = [Row(after, 4, 5, True, 0)]
    for rows, alone in ((steps, True), (known, False), ([steps[0], known[0]], False), ([*steps, *chunk], False)):
        assert gather(StepPlan(rows), table, BLOCK).alone == alone


def test_a_slot_follows_its_owner_and_only_changes_are_sent() -> None:
    table = slots()
    table.device_tables = torch.zeros(7, 16, dtype=torch.int32)
    one = sequence(1, 9, 2, [7, 8], temperature=0.5, top_k=9)
    table.take_in([one])
    places, blocks = table.changes() or pytest.fail("nothing to send")
    assert (places.tolist(), blocks.tolist()) == ([32, 33], [7, 8])
    assert (table.temperature[2], table.top_k[2]) == (0.5, 9)
    table.take_in([one])
    assert table.changes() is None
    one.blocks.append(9)
    table.take_in([one])
    assert [values.tolist() for values in table.changes() or ()] == [[34], [9]]
    other = sequence(5, 3, 2, [1])
    table.take_in([other])
    assert [values.tolist() for values in table.changes() or ()] == [[32], [1]]
    assert (table.temperature[2], table.top_k[2]) == (0.0, 0)


def test_a_cpu_s_slots_remember_nothing_to_send() -> None:
    table = slots()
    for tenure in range(50):
        table.take_in([sequence(tenure, 9, 2, [7, 8, 9], tenure=tenure)])
    assert table.changes() is None and not table._changed


def test_an_arena_is_filled_up_and_its_views_stay() -> None:
    arena = Arena(detect("cpu"), capacity=4096, sets=2)
    views = []
    for turn in range(3):
        arena.begin()
        short = arena.put(np.arange(turn, turn + 3, dtype=np.int32), 8, -1)
        wide = arena.put(np.full((2, 4), turn, np.int64), 5, 0)
        arena.upload()
        assert short.tolist() == [turn, turn + 1, turn + 2, *[-1] * 5]
        assert wide.shape == (5, 4) and wide[:2].eq(turn).all() and not wide[2:].any()
        views.append((short.data_ptr(), wide.data_ptr()))
    assert len(set(views)) == 1 and views[0][0] % 64 == views[0][1] % 64
    with pytest.raises(ValueError, match="4096 words"):
        arena.put(np.zeros(5000, np.int32))


def test_a_graph_s_columns_are_filled_up_with_nobody_s_rows() -> None:
    table = slots()
    plan = StepPlan([Row(sequence(k, 9 + k, k, [10 * k, 10 * k + 1, 10 * k + 2]), 8 + k, 1, True, 0) for k in range(3)])
    table.take_in([row.sequence for row in plan.rows])
    columns = gather(plan, table, BLOCK)
    pieces = plan_pieces(columns.q_lens, columns.kv_lens, SHAPE, names=columns.slots)
    graphs = StepGraphs(SHAPE, max_seqs=6, most_tokens=1024)
    key = graphs.key(columns.num_tokens, 3, pieces, GREEDY)
    assert key is not None and key.tokens >= 3 and key.samples >= 3
    bigger = GraphKey(tokens=6, samples=6, narrow=key.narrow, wide=0, has_wide=False, has_parts=True, mode="greedy")
    arena = Arena(detect("cpu"), capacity=1 << 14, sets=1)
    arena.begin()
    filled = columns_of(columns, pieces, table, SampleHints(), bigger)
    sent = {name: arena.put(*told) for name, told in filled.items()}
    arena.upload()
    first = {name: column.clone() for name, column in sent.items()}
    arena._host[0][:] = 77  # what a step before may have left
    arena.begin()
    arena.fill(arena.lay_out(filled), filled)
    after = arena.put(np.array([5], np.int32))
    arena.upload()
    assert after.tolist() == [5] and all(torch.equal(first[name], sent[name]) for name in sent)
    assert sent["counts"].tolist() == [len(pieces.narrow), 0]
    assert sent["kv_slots"][3:].eq(99 * BLOCK).all() and sent["sample_slots"][3:].eq(table.spare).all()
    assert sent["token_slots"][3:].eq(-1).all() and not sent["parts"][3:].any()
    plain = columns_of(columns, pieces, table, SampleHints())
    assert plain.keys() == sent.keys()
    greedy = columns_of(columns, pieces, table, GREEDY)
    assert plain.keys() - greedy.keys() == {"temperature", "top_p", "top_k", "floor", "seed", "choice", "position"}
    assert all(np.array_equal(sent[name].numpy()[: len(values)], values) for name, (values, _, _) in plain.items())


def test_sizes_hold_what_they_are_for() -> None:
    graphs = StepGraphs(SHAPE, max_seqs=100, most_tokens=2050)
    for tokens in (1, 3, 9, 33, 100, 101, 1024, 2050):
        pieces = plan_pieces(np.ones(tokens, np.int32), np.full(tokens, 5, np.int32), SHAPE)
        key = graphs.key(tokens, min(tokens, 100), pieces, GREEDY, mixed=tokens > 100)
        assert key is not None and key.tokens >= tokens and key.narrow >= len(pieces.narrow)
    assert graphs.key(2051, 1, pieces, GREEDY, mixed=True) is None
    assert graphs.key(8, 101, pieces, GREEDY) is None
    assert (size_above(5, (1, 5, 9)), size_above(6, (1, 5, 9)), size_above(10, (1, 5, 9))) == (5, 9, None)
    assert not graphs.due(key) and graphs.due(key)


def test_decodes_alone_have_graphs_of_their_own() -> None:
    """Attention launches as many programs as such a graph's list has room for work."""
    shape = Shape(kv_heads=8, group=4, wide_rows=32, programs=1056, most_parts=4096)
    graphs = StepGraphs(shape, max_seqs=100, most_tokens=2048)

    def key(rows: int, keys: int, **told: bool) -> GraphKey:
        pieces = plan_pieces(np.ones(rows, np.int32), np.full(rows, keys, np.int32), shape)
        found = graphs.key(rows, rows, pieces, GREEDY, **told)
        assert found is not None and len(pieces.narrow) <= found.narrow
        return found

    few, more = key(1, 700, alone=True), key(1, 2049, alone=True)
    assert few.alone and few == key(1, 2048, alone=True) and key(2, 700, alone=True).narrow == 2 * few.narrow
    assert more.alone and more == key(1, 100_000, alone=True) and more.narrow > few.narrow
    assert key(8, 100_000, alone=True).alone and key(8, 100_000, alone=True).narrow == key(8, 100_000).wide
    for other in (key(1, 700), key(1, 700, alone=True, mixed=True), key(9, 700, alone=True)):
        assert not other.alone and other.narrow >= few.narrow
    pieces = plan_pieces(np.ones(2, np.int32), np.full(2, 512, np.int32), shape, groups=((0, 2, 256),))
    shared = graphs.key(2, 2, pieces, GREEDY, alone=True)
    assert shared is not None and not shared.alone


def test_steps_with_prompts_have_few_sizes() -> None:
    graphs = StepGraphs(SHAPE, max_seqs=100, most_tokens=2048)
    rooms = AdapterRoom(tiles=3, ranks=32, height=64), AdapterRoom(tiles=8, ranks=32, height=64)
    keys = set()
    for counts in ([300], [1, 1, 298], [150, 149], [1] * 15 + [290]):
        q_lens = np.array(counts, np.int32)
        pieces = plan_pieces(q_lens, q_lens + 2, SHAPE)
        keys |= {graphs.key(sum(counts), len(counts), pieces, GREEDY, room, mixed=True) for room in rooms}
    (key,) = keys
    assert key is not None and (key.tokens, key.samples, key.has_wide, key.has_parts) == (320, 64, True, True)
    assert key.adapters is not None and key.adapters.tiles >= 8


def test_a_step_of_prompts_leaves_room_for_decodes_beside_them() -> None:
    """A graph that was captured of prompts alone is replayed with decodes among them."""
    table = slots()
    graphs = StepGraphs(SHAPE, max_seqs=6, most_tokens=64)
    rows = [[(0, 9), (1, 9)], [(2, 1), (3, 1), (0, 9)]]
    filled, keys = [], []
    for told in rows:
        plan = StepPlan([Row(sequence(k, 20, k, [10 * k + i for i in range(5)]), 5, n, True, 0) for k, n in told])
        table.take_in([row.sequence for row in plan.rows])
        columns = gather(plan, table, BLOCK)
        pieces = plan_pieces(columns.q_lens, columns.kv_lens, SHAPE, names=columns.slots)
        keys.append(graphs.key(columns.num_tokens, len(told), pieces, GREEDY, mixed=True))
        filled.append((columns_of(columns, pieces, table, GREEDY, keys[-1]), pieces))
    assert keys[0] == keys[1]
    arena = Arena(detect("cpu"), capacity=1 << 14, sets=1)
    (prompts, without), (both, pieces) = filled
    assert not len(without.narrow) and len(pieces.narrow) and len(pieces.wide)
    arena.begin()
    sent = {name: arena.put(*told) for name, told in prompts.items()}
    layout = arena.lay_out(prompts)
    arena.begin()
    arena.fill(layout, both)
    arena.upload()
    for name, (values, _, _) in both.items():
        assert np.array_equal(sent[name].numpy()[: len(values)], values), name


def test_decodes_over_one_prefix_come_together() -> None:
    table, draw = slots(), random.Random(1)
    heads = [7, 1, 7, 3, 1]
    rows = [Row(sequence(k, 9, k, [head, 20 + k, 30 + k]), 8, 1, True, 0) for k, head in enumerate(heads)]
    draw.shuffle(rows)
    chunk = Row(sequence(9, 8, 5, [40, 41]), 0, 8, True, 0)
    plan = StepPlan([*rows, chunk])
    table.take_in([row.sequence for row in plan.rows])
    _neighbours(plan, table)
    order = [row.sequence.blocks[0] for row in plan.rows]
    assert order == [1, 1, 3, 7, 7, 40]
    assert {row.sequence.key for row in plan.rows} == {0, 1, 2, 3, 4, 9}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device that has graphs captures this one")
def test_a_size_that_cannot_be_captured_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    graphs = StepGraphs(SHAPE, max_seqs=6, most_tokens=1024)
    key = graphs.key(3, 3, plan_pieces(np.ones(3, np.int32), np.full(3, 5, np.int32), SHAPE), GREEDY)
    assert key is not None and not graphs.due(key) and graphs.due(key)
    graphs.capture(key, Layout([], 0, []), lambda: pytest.fail("nothing is recorded without a graph"))
    assert (graphs.captures, graphs.find(key), graphs.due(key)) == (0, None, False)
    assert caplog.text.count("stay without a graph") == 1
