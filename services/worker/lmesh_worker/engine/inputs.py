"""From a plan to tensors: what a step reads, built in static buffers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, repeat

import numpy as np
from lmesh_kernels.layers.batch import PagedBatch
from lmesh_kernels.lora.bank import AdapterBank, Resident
from lmesh_kernels.ops.sample_params import SampleHints, SampleParams, score_floor, seed_to_int64
from lmesh_kernels.ops.segmented_lora import NO_ADAPTERS, AdapterRows, AdapterSegment
from lmesh_kernels.ops.segmented_plan import SegmentPlan, plan_segments
from torch import Tensor

from lmesh_worker.engine.buffers import StepBuffers
from lmesh_worker.engine.logit_tables import Adjusting, LogitTables
from lmesh_worker.engine.plan import Row, StepPlan


@dataclass(frozen=True, slots=True)
class Sampling:
    """Columns of the R rows that sample, device tensors, and the host's hints."""

    rows: Tensor  # [R] int64, index of each one's last token in the step
    slots: Tensor  # [R] int64, where each one's new id is kept on the device
    params: SampleParams
    hints: SampleHints
    adjusting: Adjusting | None  # penalties and biases, where some row has them
    scored: Tensor  # [L] int64: which of the R want log-probabilities
    alternatives: dict[int, int]  # by index among the R, of those L in order: how many alternatives


@dataclass(frozen=True, slots=True)
class PromptScoring:
    """Prompt positions of one row whose log-probabilities are wanted."""

    row: int  # index of the plan's row
    begin: int  # index of the first token in the step
    targets: Tensor  # [N] int64, the ids that follow the positions
    alternatives: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """All that the device reads in one step."""

    batch: PagedBatch
    token_slots: Tensor  # [T] int64: where on the device a token's id is, -1 if it is in batch.ids
    sampling: Sampling
    prompt_scoring: tuple[PromptScoring, ...]
    num_samples: int


def build_inputs(
    plan: StepPlan, buffers: StepBuffers, block_size: int, bank: AdapterBank, tables: LogitTables
) -> StepInputs:
    """Fills `buffers` for `plan`; nothing of it is read again after the launch but what this returns."""
    buffers.clear()
    begins = [0, *accumulate(row.count for row in plan.rows)]
    adapters = _adapters(plan.rows, buffers, begins, bank)
    batch, token_slots = _batch(plan, buffers, block_size, begins, adapters)
    sampling = _sampling(plan.rows, buffers, begins, tables)
    scoring = (_scoring(i, row, begins[i], buffers) for i, row in enumerate(plan.rows) if row.prompt_logits)
    return StepInputs(batch, token_slots, sampling, tuple(s for s in scoring if s is not None), len(sampling.slots))


def _adapters(rows: list[Row], buffers: StepBuffers, begins: list[int], bank: AdapterBank) -> AdapterRows:
    """The step's tokens by adapter."""
    pieces: dict[str, list[tuple[int, int]]] = {}
    for index, row in enumerate(rows):
        if not row.sequence.adapter:
            continue
        own, (begin, end) = pieces.setdefault(row.sequence.adapter, []), begins[index : index + 2]
        if own and own[-1][1] == begin:
            own[-1] = (own[-1][0], end)
        else:
            own.append((begin, end))
    if not pieces:
        return NO_ADAPTERS
    residents = [_resident(bank, digest) for digest in pieces]
    if bank.on_cuda:
        return AdapterRows(plan=_tiles(residents, [_indices(own) for own in pieces.values()], buffers, bank))
    return AdapterRows(segments=tuple(map(_segment, residents, pieces.values(), repeat(buffers))))


def _resident(bank: AdapterBank, digest: str) -> Resident:
    resident = bank.get(digest)
    if resident is None:
        raise LookupError(f"adapter {digest} was let go while a sequence ran with it")
    return resident


def _indices(pieces: list[tuple[int, int]]) -> np.ndarray:
    return np.concatenate([np.arange(begin, end) for begin, end in pieces])


def _segment(resident: Resident, pieces: list[tuple[int, int]], buffers: StepBuffers) -> AdapterSegment:
    """As a slice where its rows lie in one piece, else by their indices."""
    if len(pieces) == 1:
        return AdapterSegment(rows=slice(*pieces[0]), products=resident.products)
    indices = _indices(pieces)
    return AdapterSegment(rows=buffers.int64.put(indices, len(indices)), products=resident.products)


def _tiles(residents: list[Resident], rows: list[np.ndarray], buffers: StepBuffers, bank: AdapterBank) -> SegmentPlan:
    def put(values: np.ndarray) -> Tensor:
        packed = buffers.int64 if values.dtype == np.int64 else buffers.int32
        return packed.put(values.reshape(-1), values.size).view(values.shape)

    directories = [resident.directory for resident in residents]
    most = max(resident.most_ranks for resident in residents)
    return plan_segments(rows, directories, bank.numbers, most, put=put)


def _batch(
    plan: StepPlan, buffers: StepBuffers, block_size: int, begins: list[int], adapters: AdapterRows
) -> tuple[PagedBatch, Tensor]:
    rows, total = plan.rows, plan.num_tokens
    positions = np.concatenate([np.arange(r.start, r.start + r.count) for r in rows])
    tables = _block_tables(rows, block_size)
    which = np.repeat(np.arange(len(rows)), [r.count for r in rows])
    kv_slots = tables[which, positions // block_size] * block_size + positions % block_size
    ids, token_slots = _ids(rows, total)
    kv_lens = tuple(r.start + r.count for r in rows)
    q_lens = tuple(r.count for r in rows)
    batch = PagedBatch(
        ids=buffers.int64.put(ids, total),
        positions=buffers.int64.put(positions, total),
        kv_slots=buffers.int64.put(kv_slots, total),
        cu_seqlens_q=buffers.int32.put(begins, len(rows) + 1),
        kv_lens=buffers.int32.put(kv_lens, len(rows)),
        block_tables=buffers.int32.put(tables.ravel(), tables.size).view(len(rows), -1),
        num_tokens=total,
        num_seqs=len(rows),
        num_decodes=plan.num_decodes,
        max_q=max(q_lens),
        max_kv=max(kv_lens),
        q_lens_host=q_lens,
        kv_lens_host=kv_lens,
        adapters=adapters,
    )
    return batch, buffers.int64.put(token_slots, total)


def _block_tables(rows: list[Row], block_size: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """[S, widest] block numbers; past a sequence's end its last block stands again, which is always valid."""
    used = [-(-(row.start + row.count) // block_size) for row in rows]
    tables = np.empty((len(rows), max(used)), dtype=np.int64)
    for i, (row, count) in enumerate(zip(rows, used, strict=True)):
        tables[i, :count] = row.sequence.blocks[:count]
        tables[i, count:] = row.sequence.blocks[count - 1]
    return tables


def _ids(rows: list[Row], total: int) -> tuple[list[int], list[int]]:
    """Known ids of the step's tokens (0 where it is still on the device), and the slot that holds the unknown."""
    ids: list[int] = []
    slots = [-1] * total
    for row in rows:
        ids += row.sequence.ids[row.start : row.start + row.count]
        if row.start + row.count > len(row.sequence.ids):
            slots[len(ids)] = row.sequence.slot
            ids.append(0)
    return ids, slots


def _sampling(rows: list[Row], buffers: StepBuffers, begins: list[int], tables: LogitTables) -> Sampling:
    picked = [(row.sequence, row, begins[i + 1] - 1) for i, row in enumerate(rows) if row.samples]
    params = [s.params for s, _, _ in picked]
    count = len(picked)
    temperature, top_p = [p.temperature for p in params], [p.top_p for p in params]
    top_k, min_p = [p.top_k for p in params], [p.min_p for p in params]
    alternatives = {i: p.logprobs for i, p in enumerate(params) if p.logprobs >= 0}
    return Sampling(
        rows=buffers.int64.put([last for _, _, last in picked], count),
        slots=buffers.int64.put([s.slot for s, _, _ in picked], count),
        params=SampleParams(
            temperature=buffers.float32.put(temperature, count),
            top_p=buffers.float32.put(top_p, count),
            top_k=buffers.int32.put(top_k, count),
            floor=buffers.float32.put([score_floor(m) for m in min_p], count),
            seed=buffers.int64.put([seed_to_int64(p.seed) for p in params], count),
            choice=buffers.int64.put([s.choice for s, _, _ in picked], count),
            position=buffers.int64.put([row.start + row.count for _, row, _ in picked], count),
        ),
        hints=SampleHints.of(temperature, top_p, top_k, min_p),
        adjusting=tables.build([s for s, _, _ in picked], buffers),
        scored=buffers.int64.put(list(alternatives), len(alternatives)),
        alternatives=alternatives,
    )


def _scoring(index: int, row: Row, begin: int, buffers: StepBuffers) -> PromptScoring | None:
    sequence = row.sequence
    targets = sequence.ids[row.start + 1 : min(row.start + row.count + 1, sequence.prompt_len)]
    if not targets:
        return None
    column = buffers.int64.put(targets, len(targets))
    return PromptScoring(index, begin, column, sequence.params.prompt_logprobs)
