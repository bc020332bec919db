"""Steps captured as graphs: which sizes there are, when one is captured, and how it is run again.

A graph holds a step of so many tokens and so many sampling rows; a smaller step is filled up with rows that nobody
owns. Attention walks a list of pieces that lies in the step's columns, so one graph serves any lengths, prefill chunks
among decodes, and shared prefixes. A step of a size that comes for the second time runs as it is and is recorded after
it, 20 ms or so; most sizes an idle engine has met before (`first_times`), and none is captured that came once.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from lmesh_kernels.ops.attention_work import Pieces, Shape
from lmesh_kernels.ops.sample_params import SampleHints
from lmesh_kernels.ops.segmented_plan import SegmentTables

from lmesh_worker.engine.buffers import Layout
from lmesh_worker.engine.compute import StepOutputs
from lmesh_worker.engine.logit_tables import TableKinds
from lmesh_worker.engine.step_sizes import MIXED_SAMPLES, StepSizes

# Tokens of steps of decodes, filled up by a quarter at most, and of steps with prompts, by an eighth from 1,024 on.
_ROWS = (*range(1, 8), *range(8, 16, 2), *range(16, 32, 4), *range(32, 80, 8), *range(80, 160, 16), 160, 192, 224)
_MIXED = (*range(64, 512, 64), *range(512, 2048, 128), *range(2048, 4097, 256))
_MOST_GRAPHS = 256
# Decodes alone take one launch from qkv to attention up to so many rows (8 rows of llama-1b: 954 us a step instead of
# 1,018, 64 rows 1,467 instead of 1,413; H200).
_FEW_ROWS = 8
# Room for pieces of each of few rows: a program a head and piece is launched, whether there is work for it or not (one
# row of qwen3-0.6b alone, 512 keys: room for 16 pieces 698 us a step, for 64 738; 3,000 keys, 64 pieces: 838).
_FEW_PIECES = (16, 64)

log = logging.getLogger(__name__)

Mode = Literal["greedy", "random", "truncated"]


def mode_of(hints: SampleHints) -> Mode:
    """Which sampler a step needs."""
    if not hints.any_random:
        return "greedy"
    return "truncated" if hints.any_truncation else "random"


class AdapterRoom(NamedTuple):
    """Room for what adapters of a step's rows need, in powers of two."""

    tiles: int
    ranks: int  # of one product
    height: int  # of a tile

    @classmethod
    def of(cls, tables: SegmentTables) -> AdapterRoom:
        """That such tables fit into."""
        tiles, ranks = (1 << (count - 1).bit_length() for count in (len(tables.tiles), max(32, tables.most_ranks)))
        return cls(tiles, ranks, tables.height)

    def of_size(self, tokens: int) -> AdapterRoom:
        """The usual of steps with prompts of up to so many tokens; more where they have many adapters."""
        usual = tokens // self.height + 16
        return self._replace(tiles=max(self.tiles, 1 << (usual - 1).bit_length()))


@dataclass(frozen=True, slots=True)
class GraphKey:
    """One captured graph."""

    tokens: int
    samples: int
    narrow: int  # room for pieces
    wide: int
    has_wide: bool
    has_parts: bool
    mode: Mode
    alone: bool = False  # `AttentionWork.alone`
    adapters: AdapterRoom | None = None
    tables: TableKinds | None = None  # of penalties and biases, where some row has them


def size_above(count: int, sizes: Sequence[int]) -> int | None:
    """The least of ascending `sizes` that is not below `count`."""
    at = bisect_left(sizes, count)
    return sizes[at] if at < len(sizes) else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Captured:
    """A graph, where its columns stand and where its results lie."""

    graph: torch.cuda.CUDAGraph
    layout: Layout
    outputs: StepOutputs


class StepGraphs:
    """The graphs of one runner, least lately used first out."""

    def __init__(self, shape: Shape, *, max_seqs: int, most_tokens: int) -> None:
        """Steps of more than `most_tokens` run as they are."""
        self._shape = shape
        rows = (*(n for n in _ROWS if n < max_seqs), max_seqs)
        self.sizes = StepSizes(rows, (*(n for n in _MIXED if n < most_tokens), most_tokens))
        self._mixed_samples = (*(n for n in (MIXED_SAMPLES,) if n < max_seqs), max_seqs)
        self._captured: OrderedDict[GraphKey, Captured] = OrderedDict()
        self._seen: Counter[GraphKey] = Counter()
        self._refused: set[GraphKey] = set()
        self._pool: Any = None
        self.captures = 0

    def key(
        self,
        tokens: int,
        samples: int,
        pieces: Pieces,
        hints: SampleHints,
        adapters: AdapterRoom | None = None,
        tables: TableKinds | None = None,
        *,
        mixed: bool = False,
        alone: bool = False,
    ) -> GraphKey | None:
        """The graph for such a step; None where none is kept of its size.

        `mixed`: with prompts; `alone`: no row reads what another one writes.
        """
        decodes, with_prompts = self.sizes
        size = size_above(tokens, with_prompts if mixed else decodes)
        rows = size_above(max(1, samples), self._mixed_samples if mixed else decodes)
        if size is None or rows is None:
            return None
        # Splitting adds no more pieces than programs have heads to take up, and without it they have work from here on.
        spare = self._shape.programs // self._shape.kv_heads
        room = size + spare + 1
        if len(pieces.narrow) > room or len(pieces.wide) > room:
            return None
        few = not mixed and size <= _FEW_ROWS
        narrow = size_above(len(pieces.narrow), [n * size for n in _FEW_PIECES]) if few else None
        return GraphKey(
            tokens=size,
            samples=rows,
            narrow=min(narrow or room, room),
            wide=room,
            has_wide=mixed or bool(len(pieces.wide)),
            # A join that finds nothing costs less than a graph of its own.
            has_parts=mixed or size < spare or pieces.joined > 0,
            mode=mode_of(hints),
            alone=alone and few and not len(pieces.wide),
            adapters=None if adapters is None else adapters.of_size(size) if mixed else adapters,
            tables=tables,
        )

    def find(self, key: GraphKey) -> Captured | None:
        """The graph, if it was captured."""
        found = self._captured.get(key)
        if found is not None:
            self._captured.move_to_end(key)
        return found

    def due(self, key: GraphKey) -> bool:
        """Counts a step of this size that ran without a graph; whether the next one like it should have one."""
        self._seen[key] += 1
        return self._seen[key] > 1 and key not in self._refused

    def capture(self, key: GraphKey, layout: Layout, compute: Callable[[], StepOutputs]) -> None:
        """Records what `compute` launches, on the stream that calls; nothing runs.

        A size that cannot be recorded is said once, and its steps go on being launched as they are.
        """
        try:
            captured = self._record(layout, compute)
        except RuntimeError as error:  # the step itself has run: its results are right
            log.warning("steps of a size stay without a graph: %s", error, extra={"size": str(key)})
            self._refused.add(key)
            return
        self._captured[key] = captured
        self.captures += 1
        if len(self._captured) > _MOST_GRAPHS:
            self._captured.popitem(last=False)

    def _record(self, layout: Layout, compute: Callable[[], StepOutputs]) -> Captured:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            outputs = compute()
        finally:
            graph.capture_end()
        return Captured(graph=graph, layout=layout, outputs=outputs)
