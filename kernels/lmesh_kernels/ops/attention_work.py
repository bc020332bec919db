"""A step's attention as a list of equal-sized pieces of work, planned on the host and read by the Triton kernels.

A piece is some query rows that see one stretch of one sequence's cached keys. Narrow pieces hold one row, wide ones as
many as a tile takes: rows of a prefill chunk, or rows of different sequences over the prefix that they share, which is
so read once for all of them (as in cascade attention: Juravsky et al. 2024, arXiv 2402.05099). Where a step has less
pieces than the device has processors for, keys are split (Dao et al. 2023, Flash-Decoding) and each row's parts are
joined by their log-sum-exps. How many programs run depends on the room of the list and not on what it holds, so a
captured graph replays any list that it has room for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lmesh_kernels.ops.prompt_attention import Prompt

Ints = NDArray[np.int32]

FIELDS = 8  # of a piece: first row, rows, sequence, first key, end of keys, position of the first row, part, nothing
SEES_ALL = 1 << 30  # position of rows that see every key of their piece
WHOLE = -1  # part of a piece whose rows have no other: its result is the row's
LEAST_SPLIT = 128  # keys of a part; a smaller one costs more to join than it saves
LEAST_SHARED = 256  # keys of a prefix that is worth parts of its own
MOST_PARTS = 64  # of one row
_NONE = np.zeros((0, FIELDS), np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What planning needs to know of heads and device."""

    kv_heads: int
    group: int  # query heads of a key head
    wide_rows: int  # query rows of a wide piece: its tile's height over `group`
    programs: int  # that the device runs at once
    most_parts: int  # of all rows of a step together
    invariant: bool = False  # a row's bits may not depend on which others there are


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pieces:
    """Lists on the host: narrow and wide pieces [n, FIELDS], and of each row its first part and their number."""

    narrow: Ints
    wide: Ints
    parts_first: Ints  # [T]
    parts: Ints  # [T]; 0 where a row has no parts but one result
    counts: Ints  # [2]: of both lists
    size: int  # keys of a part at most

    @property
    def num_parts(self) -> int:
        """Of all rows."""
        return int(self.parts.sum())

    @property
    def joined(self) -> int:
        """Rows from the first on among which are all that have parts."""
        found = np.flatnonzero(self.parts)
        return int(found[-1]) + 1 if len(found) else 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionWork:
    """The same on the device. Lists may be longer than their counts say."""

    narrow: Tensor  # [>= n, FIELDS] int32
    wide: Tensor
    counts: Tensor  # [2] int32: narrow pieces, wide pieces
    parts_first: Tensor  # [T] int32
    parts: Tensor  # [T] int32
    has_narrow: bool
    has_wide: bool
    joined: int  # rows from the first on among which are all that have parts; 0 where none has
    prompts: tuple[Prompt, ...] = ()  # whole prompts that another kernel takes
    # Narrow pieces alone, few, and of no row keys that another one writes in this step: `decode_attention` takes them.
    alone: bool = False


def plan_pieces(
    q_lens: Ints,
    kv_lens: Ints,
    shape: Shape,
    *,
    groups: tuple[tuple[int, int, int], ...] = (),
    names: Ints | None = None,
    apart: NDArray[np.bool_] | None = None,
) -> Pieces:
    """The pieces of a step of S sequences: q_lens new tokens each, its last, of kv_lens cached ones.

    `groups` are (first sequence, end, shared keys): neighbours of one new token each whose first so many keys are the
    same blocks; they are not shared where bits matter, or where there is no room. `names` are the sequences' rows in
    the block tables, where those are not 0 to S - 1. Sequences that are `apart` get no pieces.
    """
    firsts = np.zeros(len(q_lens) + 1, np.int32)
    np.cumsum(q_lens, out=firsts[1:])
    shared = np.zeros(len(q_lens), np.int32)
    # A row of a group has two parts at least, and there must be room for all of them.
    if shape.invariant or 2 * sum(end - begin for begin, end, _ in groups) > shape.most_parts:
        groups = ()
    for begin, end, keys in groups:
        shared[begin:end] = keys
    # One kernel for all where bits matter: the next time a row is computed it may stand in a chunk.
    alone = np.zeros(len(q_lens), np.bool_) if shape.invariant else q_lens == 1
    single = np.flatnonzero(alone).astype(np.int32)
    narrow = _rows_of(
        first=firsts[single],
        rows=1,
        sequence=single,
        begin=shared[single],
        end=kv_lens[single],
        position=kv_lens[single] - 1,
    )
    wide = _NONE
    if groups or len(single) < len(q_lens):
        chunked = ~alone if apart is None else ~alone & ~apart
        chunks = _chunk_tiles(q_lens, kv_lens, firsts, shape, chunked)
        wide = np.concatenate([_shared_tiles(groups, firsts, shape), chunks])
    if names is not None:
        narrow[:, 2], wide[:, 2] = names[narrow[:, 2]], names[wide[:, 2]]
    pieces = _split(narrow, wide, int(firsts[-1]), shape, shared=bool(groups))
    assert pieces.num_parts <= shape.most_parts, "a kernel would write past the room for parts"
    return pieces


def _rows_of(
    *, first: Ints, rows: Ints | int, sequence: Ints, begin: Ints | int, end: Ints | int, position: Ints | int
) -> Ints:
    pieces = np.zeros((len(first), FIELDS), np.int32)
    for column, values in enumerate((first, rows, sequence, begin, end, position)):
        pieces[:, column] = values
    pieces[:, 6] = WHOLE
    return pieces


def _shared_tiles(groups: tuple[tuple[int, int, int], ...], firsts: Ints, shape: Shape) -> Ints:
    tiles = [_NONE]
    for begin, end, keys in groups:
        at = np.arange(begin, end, shape.wide_rows, dtype=np.int32)
        rows = np.minimum(shape.wide_rows, end - at).astype(np.int32)
        table = np.full(len(at), begin, np.int32)
        tiles.append(_rows_of(first=firsts[at], rows=rows, sequence=table, begin=0, end=keys, position=SEES_ALL))
    return np.concatenate(tiles)


def _chunk_tiles(q_lens: Ints, kv_lens: Ints, firsts: Ints, shape: Shape, chosen: NDArray[np.bool_]) -> Ints:
    """Tiles of prefill chunks, those with the most keys first: the last to be taken up should be short."""
    chunks = np.flatnonzero(chosen).astype(np.int32)
    counts = -(-q_lens[chunks] // shape.wide_rows)
    sequence = np.repeat(chunks, counts)
    nth = (np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)).astype(np.int32)
    inside = nth * shape.wide_rows
    rows = np.minimum(shape.wide_rows, q_lens[sequence] - inside)
    position = kv_lens[sequence] - q_lens[sequence] + inside
    tiles = _rows_of(
        first=firsts[sequence] + inside, rows=rows, sequence=sequence, begin=0, end=position + rows, position=position
    )
    return tiles[np.argsort(-tiles[:, 4], kind="stable")]


def _split(narrow: Ints, wide: Ints, tokens: int, shape: Shape, *, shared: bool) -> Pieces:
    """Cuts long pieces where there are few; numbers the parts of each row. `shared`: rows may be in both lists."""
    parts = np.zeros(tokens, np.int32)
    size, longest = _split_size(narrow, wide, shape)
    if longest <= size and not shared:
        return _listed(narrow, wide, parts, parts, size)
    narrow_cuts, wide_cuts = (np.maximum(1, -(-(p[:, 4] - p[:, 3]) // size)).astype(np.int32) for p in (narrow, wide))
    # Of a row: the parts of the prefix that it shares come first, those of its own keys after them.
    before = np.zeros(tokens, np.int32)
    for first, rows, cuts in zip(wide[:, 0].tolist(), wide[:, 1].tolist(), wide_cuts.tolist(), strict=True):
        parts[first : first + rows] = before[first : first + rows] = cuts
    own_before = before[narrow[:, 0]]
    parts[narrow[:, 0]] += narrow_cuts
    if len(wide):
        wide = _cut(wide, wide_cuts, np.zeros(len(wide), np.int32), parts, size)
    narrow = _cut(narrow, narrow_cuts, own_before, parts, size)
    parts[parts == 1] = 0
    parts_first = (np.cumsum(parts) - parts).astype(np.int32)
    return _listed(narrow, wide, parts_first, parts, size)


def _listed(narrow: Ints, wide: Ints, parts_first: Ints, parts: Ints, size: int) -> Pieces:
    counts = np.array([len(narrow), len(wide)], np.int32)
    return Pieces(narrow=narrow, wide=wide, parts_first=parts_first, parts=parts, counts=counts, size=size)


def advance(pieces: Pieces, kv_lens: Ints, shape: Shape) -> Pieces | None:
    """The pieces of the step after one of decodes alone, every sequence a key longer: now of kv_lens.

    None where they are cut otherwise than before: then `plan_pieces` says how.
    """
    if len(pieces.wide):
        return None
    total, longest = int(kv_lens.sum()), int(kv_lens.max())
    if _least_size(total, longest, shape) != pieces.size or ((kv_lens - 1) % pieces.size == 0).any():
        return None
    narrow = pieces.narrow.copy()
    # The last piece of a row, and no other, ends with the row's own key.
    narrow[:, 4] += narrow[:, 4] > narrow[:, 5]
    narrow[:, 5] += 1
    return replace(pieces, narrow=narrow)


def _split_size(narrow: Ints, wide: Ints, shape: Shape) -> tuple[int, int]:
    """Keys of a part: so many that all programs have work, as few parts as that takes. And of the longest piece."""
    lengths, rows = narrow[:, 4] - narrow[:, 3], narrow[:, 1]
    if len(wide):
        lengths, rows = np.concatenate([lengths, wide[:, 4] - wide[:, 3]]), np.concatenate([rows, wide[:, 1]])
    longest = int(lengths.max()) if len(lengths) else 1
    if shape.invariant:  # where a row is cut would depend on the others; never is the one rule that needs no room
        return longest, longest
    size = _least_size(int(lengths.sum()), longest, shape)
    while size < longest and int((rows.astype(np.int64) * -(-lengths // size)).sum()) > shape.most_parts:
        size *= 2
    return size, longest


def _least_size(keys: int, longest: int, shape: Shape) -> int:
    """Keys of a part, as far as the room for parts allows."""
    even = -(-keys * shape.kv_heads // shape.programs)
    size = max(LEAST_SPLIT, even, -(-longest // MOST_PARTS))
    return -(-size // LEAST_SPLIT) * LEAST_SPLIT


def _cut(pieces: Ints, cuts: Ints, before: Ints, parts: Ints, size: int) -> Ints:
    """Each piece as its cuts, with the number of the part among its row's."""
    out = np.repeat(pieces, cuts, axis=0)
    nth = (np.arange(len(out)) - np.repeat(np.cumsum(cuts) - cuts, cuts)).astype(np.int32)
    out[:, 3] += nth * size
    out[:, 4] = np.minimum(out[:, 4], out[:, 3] + size)
    out[:, 6] = np.where(parts[out[:, 0]] > 1, nth + np.repeat(before, cuts), WHOLE)
    return out


def on_device(pieces: Pieces, put: Callable[[Ints], Tensor]) -> AttentionWork:
    """The lists as the device reads them; `put` gives the tensor that will hold an array."""
    return AttentionWork(
        narrow=put(pieces.narrow),
        wide=put(pieces.wide),
        counts=put(pieces.counts),
        parts_first=put(pieces.parts_first),
        parts=put(pieces.parts),
        has_narrow=bool(len(pieces.narrow)),
        has_wide=bool(len(pieces.wide)),
        joined=pieces.joined,
    )


def shared_prefixes(
    tables: Ints, kv_lens: Ints, block_size: int, *, least: int = LEAST_SHARED
) -> tuple[tuple[int, int, int], ...]:
    """Groups for `plan_pieces`: neighbours in tables [S, blocks], one new token each, that begin with the same blocks.

    A group is two sequences or more that share at least `least` keys, none of them a key of the row's own token.
    """
    if len(tables) < 2:
        return ()
    bounds = np.flatnonzero(np.diff(tables[:, 0])) + 1
    edges = [0, *bounds.tolist(), len(tables)]
    groups = []
    for begin, end in pairwise(edges):
        if end - begin < 2:
            continue
        same = (tables[begin:end] == tables[begin]).all(axis=0)
        blocks = len(same) if same.all() else int(np.argmin(same))
        keys = min(blocks * block_size, (int(kv_lens[begin:end].min()) - 1) // block_size * block_size)
        if keys >= least:
            groups.append((begin, end, keys))
    return tuple(groups)
