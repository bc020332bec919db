"""How a step's attention is cut into pieces: every row's keys once, whatever is split or shared."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from lmesh_kernels.ops.attention_work import (
    LEAST_SHARED,
    WHOLE,
    Pieces,
    Shape,
    advance,
    plan_pieces,
    shared_prefixes,
)

BLOCK = 16


def shape_of(programs: int, group: int, *, invariant: bool = False) -> Shape:
    return Shape(kv_heads=2, group=group, wide_rows=32 // group, programs=programs, most_parts=512, invariant=invariant)


def keys_of_rows(pieces: Pieces, tokens: int) -> list[dict[int, tuple[int, int]]]:
    """Of each row: the keys that each of its parts covers."""
    rows: list[dict[int, tuple[int, int]]] = [{} for _ in range(tokens)]
    for first, count, _, begin, end, position, part, _ in [*pieces.narrow.tolist(), *pieces.wide.tolist()]:
        for row in range(first, first + count):
            seen = min(end, position + (row - first) + 1)
            assert part not in rows[row], "two pieces write one part"
            rows[row][part] = (begin, max(begin, seen))
    return rows


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_each_row_sees_each_of_its_keys_once(data: st.DataObject) -> None:
    group = data.draw(st.sampled_from([1, 3, 4]))
    shape = shape_of(data.draw(st.sampled_from([1, 64, 4096])), group, invariant=data.draw(st.booleans()))
    shared_rows = data.draw(st.integers(0, 12))
    shared = data.draw(st.integers(1, 40)) * BLOCK if shared_rows > 1 else 0
    decodes = [shared + data.draw(st.integers(1, 900)) for _ in range(shared_rows)]
    decodes += data.draw(st.lists(st.integers(1, 3000), max_size=12))
    chunks = data.draw(st.lists(st.tuples(st.integers(2, 90), st.integers(0, 700)), max_size=4))
    q_lens = np.array([1] * len(decodes) + [q for q, _ in chunks], np.int32)
    kv_lens = np.array(decodes + [q + cached for q, cached in chunks], np.int32)
    groups = ((0, shared_rows, shared),) if shared else ()
    pieces = plan_pieces(q_lens, kv_lens, shape, groups=groups)
    tokens = int(q_lens.sum())
    rows, row = keys_of_rows(pieces, tokens), 0
    for q_len, kv_len in zip(q_lens.tolist(), kv_lens.tolist(), strict=True):
        for nth in range(q_len):
            parts, end = rows[row], kv_len - q_len + nth + 1
            stretches = sorted(parts.values())
            assert stretches[0][0] == 0
            assert max(stop for begin, stop in stretches if stop > begin) == end
            covered = 0
            for begin, stop in stretches:
                assert begin == covered or stop == begin  # what a row sees nothing of adds nothing
                covered = max(covered, stop)
            if pieces.parts[row]:
                assert sorted(parts) == list(range(int(pieces.parts[row])))
            else:
                assert list(parts) == [WHOLE]
            row += 1
    assert pieces.num_parts <= shape.most_parts
    starts = pieces.parts_first[pieces.parts > 0].tolist()
    counts = pieces.parts[pieces.parts > 0].tolist()
    assert starts == [sum(counts[:i]) for i in range(len(counts))]


def test_nothing_is_cut_where_bits_matter() -> None:
    shape = shape_of(4096, 4, invariant=True)
    for q_lens, kv_lens in (([1], [1700]), ([1] * 65, [1700] + [40] * 64), ([600, 1], [8000, 1700])):
        pieces = plan_pieces(np.array(q_lens, np.int32), np.array(kv_lens, np.int32), shape)
        assert not pieces.parts.any() and not len(pieces.narrow)
        assert (pieces.wide[:, 3] == 0).all() and (pieces.wide[:, 6] == WHOLE).all()


def test_parts_never_outgrow_their_room() -> None:
    shape = shape_of(4096, 4)
    rows = shape.most_parts
    shared = plan_pieces(np.ones(rows, np.int32), np.full(rows, 700, np.int32), shape, groups=((0, rows, 512),))
    assert not shared.parts.any()  # each row would have two
    half = plan_pieces(
        np.ones(rows // 2, np.int32), np.full(rows // 2, 700, np.int32), shape, groups=((0, rows // 2, 512),)
    )
    assert half.num_parts == shape.most_parts


def test_few_sequences_fill_the_device_and_many_are_left_whole() -> None:
    shape = shape_of(1024, 4)
    few = plan_pieces(np.ones(2, np.int32), np.array([4000, 90], np.int32), shape)
    assert len(few.narrow) * shape.kv_heads > 60
    many = plan_pieces(np.ones(512, np.int32), np.full(512, 900, np.int32), shape)
    assert len(many.narrow) == 512 and not many.parts.any()


def test_prefixes_that_neighbours_share() -> None:
    blocks = LEAST_SHARED // BLOCK
    prefix, other = list(range(100, 100 + blocks)), list(range(300, 300 + blocks))
    tables = np.array(
        [[*prefix, 1, 2], [*prefix, 3, 4], [*prefix, 5, 6], [*other, 7, 8], [*other, 9, 10], [11] * (blocks + 2)],
        np.int32,
    )
    long = np.full(6, (blocks + 1) * BLOCK + 3, np.int32)
    assert shared_prefixes(tables, long, BLOCK) == ((0, 3, blocks * BLOCK), (3, 5, blocks * BLOCK))
    # A row's own token is never among the shared keys, and too little is not worth it.
    ending = long.copy()
    ending[1] = blocks * BLOCK
    assert shared_prefixes(tables, ending, BLOCK) == ((3, 5, blocks * BLOCK),)
    assert shared_prefixes(tables[:1], long[:1], BLOCK) == ()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_key_more_in_each_sequence_is_what_planning_anew_would_say(data: st.DataObject) -> None:
    shape = shape_of(data.draw(st.sampled_from([1, 64, 4096])), 2, invariant=data.draw(st.booleans()))
    lens = data.draw(st.lists(st.integers(1, 3000) | st.sampled_from([127, 128, 129, 256]), min_size=1, max_size=12))
    kv_lens, ones = np.array(lens, np.int32), np.ones(len(lens), np.int32)
    names = np.arange(len(lens), dtype=np.int32)[::-1].copy()
    pieces = plan_pieces(ones, kv_lens, shape, names=names)
    for _ in range(3):
        kv_lens = kv_lens + 1
        anew = plan_pieces(ones, kv_lens, shape, names=names)
        further = advance(pieces, kv_lens, shape)
        if further is not None:
            assert further.size == anew.size or not anew.joined
            for name in ("narrow", "wide", "parts_first", "parts", "counts"):
                assert np.array_equal(getattr(further, name), getattr(anew, name)), name
        pieces = anew


def test_most_steps_of_decodes_are_one_key_more() -> None:
    shape, kv_lens, anew = shape_of(1056, 4), np.array([512, 700, 90], np.int32), 0
    pieces = plan_pieces(np.ones(3, np.int32), kv_lens, shape)
    for _ in range(256):
        kv_lens = kv_lens + 1
        further = advance(pieces, kv_lens, shape)
        anew += further is None
        pieces = further or plan_pieces(np.ones(3, np.int32), kv_lens, shape)
    assert 0 < anew <= 8
