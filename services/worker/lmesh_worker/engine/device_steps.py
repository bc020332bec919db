"""Steps of an accelerator's engine: all columns in one copy, and graphs where a size comes again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from lmesh_kernels.layers.attention import PagedAttention
from lmesh_kernels.lora.bank import AdapterBank
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.ops.attention_work import (
    Pieces,
    advance,
    plan_pieces,
    shared_prefixes,
)
from lmesh_kernels.ops.prompt_attention import LEAST, Prompt
from lmesh_kernels.ops.sample_params import SampleHints
from lmesh_kernels.ops.segmented_plan import SegmentTables
from lmesh_kernels.platforms.platform import Platform
from numpy.typing import NDArray
from torch import Tensor

from lmesh_worker.engine.buffers import Arena, Filled
from lmesh_worker.engine.compute import Compute, StepOutputs, compute_step
from lmesh_worker.engine.graphs import AdapterRoom, GraphKey, StepGraphs
from lmesh_worker.engine.inputs import (
    PromptScoring,
    StepColumns,
    StepInputs,
    adapter_tables,
    gather,
    hints,
    prompt_scoring,
    sampled,
)
from lmesh_worker.engine.logit_tables import Asked, LogitTables, TableKinds
from lmesh_worker.engine.plan import Row, StepPlan
from lmesh_worker.engine.sent_columns import columns_of, most_words, moving_columns
from lmesh_worker.engine.slots import Slots
from lmesh_worker.engine.steady import Steady, is_steady
from lmesh_worker.engine.step_sizes import captured_tokens
from lmesh_worker.engine.viewed_inputs import Launches, ViewedInputs


class DeviceSteps:
    """One arena of columns on the device, and the graphs that read it."""

    def __init__(
        self,
        decoder: Decoder,
        attention: PagedAttention,
        slots: Slots,
        tables: LogitTables,
        bank: AdapterBank,
        platform: Platform,
        *,
        block_size: int,
        max_tokens: int,
        max_seqs: int,
        depth: int,
        graphs: bool,
    ) -> None:
        assert attention.device is not None
        self._decoder, self._attention, self._slots, self._tables = decoder, attention, slots, tables
        self._bank, self._block_size, self._shape = bank, block_size, attention.device.shape
        self._takes_prompts = attention.device.takes_prompts
        self._inputs = ViewedInputs(slots, bank, max_seqs=max_seqs)
        self._steady: Steady | None = None
        self._arena = Arena(platform, capacity=most_words(max_tokens, max_seqs, slots, self._shape), sets=depth + 1)
        # All steps' logits: a graph that kept its own would keep 65 MB of 256 rows of a vocabulary of 128,256.
        vocab = decoder.config.vocab_size
        self._logits = torch.empty(max_seqs, vocab, dtype=decoder.dtype, device=slots.last_ids.device)
        self.graphs: StepGraphs | None = None
        if graphs and platform.supports_graphs:
            most = min(max_tokens, captured_tokens(decoder.config))
            self.graphs = StepGraphs(self._shape, max_seqs=max_seqs, most_tokens=most)

    def prepare(self, plan: StepPlan) -> tuple[StepColumns, list[PromptScoring], Compute]:
        """(columns, prompt positions to score, what computes the step); a value that no tensor takes raises."""
        newcomers = self._slots.take_in([row.sequence for row in plan.rows])
        if self._steady is not None and not newcomers and self._steady.is_before(plan.rows):
            self._steady = self._after(self._steady, plan.rows)
            if self._steady is not None:
                self._arena.begin()
                return self._steady.columns, [], self._captured(self._steady.key, self._steady.sent, self._steady.told)
        self._steady = None
        shares = _neighbours(plan, self._slots)
        columns = gather(plan, self._slots, self._block_size)
        whole = self._whole_prompts(columns)
        prompts = _prompts(columns, whole)
        pieces = self._pieces(columns, whole, shares=shares)
        told = hints(columns, self._slots)
        self._arena.begin()
        tables = adapter_tables(plan, columns, self._bank)
        asked = self._tables.ask(sampled(plan)) if self._slots.adjusts[columns.sample_slots].any() else None
        key = None
        scored = any(row.prompt_logits for row in plan.rows)
        if not prompts and not scored:
            room = None if tables is None else AdapterRoom.of(tables)
            key = self._key(columns, pieces, told, room, None if asked is None else self._tables.kinds)
        if key is None:
            compute = self._as_it_is(columns, pieces, prompts, told, tables, asked, scored=scored)
            return columns, prompt_scoring(plan, columns, self._arena.put), compute
        sent = columns_of(columns, pieces, self._slots, told, key, tables, asked)
        if is_steady(columns) and not shares:
            self._steady = Steady(rows=plan.rows, columns=columns, pieces=pieces, told=told, key=key, sent=sent)
        compute = self._captured(key, sent, told, asked)
        return columns, prompt_scoring(plan, columns, self._arena.put), compute

    def _after(self, before: Steady, rows: list[Row]) -> Steady | None:
        """The same rows one token further; None where no graph is kept for how their attention is cut now."""
        columns = before.advanced(self._slots, self._block_size)
        pieces, key = advance(before.pieces, columns.kv_lens, self._shape), before.key
        if pieces is None:
            pieces = plan_pieces(columns.q_lens, columns.kv_lens, self._shape, names=columns.slots)
            found = self._key(columns, pieces, before.told, key.adapters, key.tables)
            if found is None:
                return None
            key = found
        sent = before.sent | moving_columns(columns, pieces, self._slots, key, drawing=key.mode != "greedy")
        return replace(before, rows=rows, columns=columns, pieces=pieces, key=key, sent=sent)

    def _key(
        self,
        columns: StepColumns,
        pieces: Pieces,
        told: SampleHints,
        adapters: AdapterRoom | None,
        tables: TableKinds | None,
    ) -> GraphKey | None:
        if self.graphs is None:
            return None
        mixed = columns.num_decodes < len(columns.slots)
        of = columns.num_tokens, len(columns.sample_slots), pieces, told, adapters, tables
        return self.graphs.key(*of, mixed=mixed, alone=columns.alone)

    def _pieces(self, columns: StepColumns, apart: NDArray[np.bool_] | None, *, shares: bool) -> Pieces:
        groups: tuple[tuple[int, int, int], ...] = ()
        if shares:
            count = columns.num_decodes
            width = -(-int(columns.kv_lens[:count].min()) // self._block_size)
            tables = self._slots.tables[columns.slots[:count], :width]
            groups = shared_prefixes(tables, columns.kv_lens[:count], self._block_size)
        return plan_pieces(
            columns.q_lens, columns.kv_lens, self._shape, groups=groups, names=columns.slots, apart=apart
        )

    def _whole_prompts(self, columns: StepColumns) -> NDArray[np.bool_] | None:
        """Which sequences are long prompts of which nothing was cached; None where another kernel takes none."""
        if not self._takes_prompts or columns.num_decodes == len(columns.slots):
            return None
        whole: NDArray[np.bool_] = (columns.q_lens >= LEAST) & (columns.q_lens == columns.kv_lens)
        return whole

    def _as_it_is(
        self,
        columns: StepColumns,
        pieces: Pieces,
        prompts: tuple[Prompt, ...],
        told: SampleHints,
        tables: SegmentTables | None,
        asked: Asked | None,
        *,
        scored: bool,
    ) -> Compute:
        sent = columns_of(columns, pieces, self._slots, told, tables=tables, asked=asked)
        views = {name: self._arena.put(values) for name, (values, _, _) in sent.items()}
        kinds = Launches(narrow=bool(len(pieces.narrow)), wide=bool(len(pieces.wide)), joined=pieces.joined)
        room = None if tables is None else AdapterRoom.of(tables)
        inputs = self._inputs.of(views, kinds, told, room, prompts, scored=scored)
        changes = self._changes()

        def compute() -> StepOutputs:
            self._tables.learn(asked)
            self._upload(changes)
            return self._compute(inputs)

        return compute

    def _captured(
        self, key: GraphKey, sent: dict[str, Filled], told: SampleHints, asked: Asked | None = None
    ) -> Compute:
        assert self.graphs is not None
        graphs = self.graphs
        captured = graphs.find(key)
        if captured is not None:
            self._arena.fill(captured.layout, sent)
            changes = self._changes()

            def replay() -> StepOutputs:
                self._tables.learn(asked)
                self._upload(changes)
                captured.graph.replay()
                return captured.outputs

            return replay
        views = {name: self._arena.put(*filled) for name, filled in sent.items()}
        kinds = Launches(narrow=True, wide=key.has_wide, joined=key.tokens if key.has_parts else 0, alone=key.alone)
        inputs, layout = self._inputs.of(views, kinds, told, key.adapters), self._arena.lay_out(sent)
        changes = self._changes()

        def compute() -> StepOutputs:
            self._tables.learn(asked)
            self._upload(changes)
            outputs = self._compute(inputs)
            if graphs.due(key):
                graphs.capture(key, layout, lambda: self._compute(inputs))
            return outputs

        return compute

    def _compute(self, inputs: StepInputs) -> StepOutputs:
        of = self._decoder, self._attention, self._slots.last_ids, self._tables
        return compute_step(*of, inputs, self._logits)

    def _changes(self) -> tuple[Tensor, Tensor] | None:
        changes = self._slots.changes()
        return None if changes is None else (self._arena.put(changes[0]), self._arena.put(changes[1]))

    def _upload(self, changes: tuple[Tensor, Tensor] | None) -> None:
        self._arena.upload()
        if changes is not None:
            assert self._slots.device_tables is not None
            places, blocks = changes
            self._slots.device_tables.view(-1).index_put_((places,), blocks)


def _prompts(columns: StepColumns, whole: NDArray[np.bool_] | None) -> tuple[Prompt, ...]:
    if whole is None:
        return ()
    return tuple(
        Prompt(first=int(columns.begins[i]), length=int(columns.q_lens[i])) for i in np.flatnonzero(whole).tolist()
    )


def _neighbours(plan: StepPlan, slots: Slots) -> bool:
    """Brings decodes that begin with the same block next to each other, for they may share the reading of a prefix.

    Returns whether there are any.
    """
    count = plan.num_decodes
    if count < 2:
        return False
    firsts = slots.tables[[row.sequence.slot for row in plan.rows[:count]], 0]
    if len(set(firsts.tolist())) == count:
        return False
    order = np.argsort(firsts, kind="stable").tolist()
    plan.rows[:count] = [plan.rows[i] for i in order]
    return True
