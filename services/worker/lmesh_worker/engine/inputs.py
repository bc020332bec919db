"""From a plan to what a step reads: columns on the host, then tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat

import numpy as np
from lmesh_kernels.layers.batch import PagedBatch, PendingIds
from lmesh_kernels.lora.bank import AdapterBank, Resident
from lmesh_kernels.ops.sample_params import SampleHints, SampleParams
from lmesh_kernels.ops.segmented_lora import NO_ADAPTERS, AdapterRows, AdapterSegment
from lmesh_kernels.ops.segmented_plan import SegmentTables, cut_segments
from numpy.typing import NDArray
from torch import Tensor

from lmesh_worker.engine.logit_tables import Adjusting
from lmesh_worker.engine.plan import Row, StepPlan
from lmesh_worker.engine.sequence import Sequence
from lmesh_worker.engine.slots import Ints, Slots

Longs = NDArray[np.int64]
Put = Callable[[NDArray[np.generic]], Tensor]


@dataclass(slots=True)
class StepColumns:
    """One step on the host: T tokens of S sequences, of which R sample; integers are int32 but seeds and counters."""

    ids: Ints  # [T]; 0 where the id is still on the device
    token_slots: Ints  # [T]: the slot whose newest id that is, else -1
    positions: Ints  # [T]
    kv_slots: Ints  # [T]
    slots: Ints  # [S]
    begins: Ints  # [S + 1]
    q_lens: Ints  # [S]
    kv_lens: Ints  # [S]
    num_decodes: int
    sample_tokens: Ints  # [R]: index of each one's last token in the step
    sample_slots: Longs  # [R]
    sample_positions: Longs  # [R]: of the new id

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.ids)

    @property
    def alone(self) -> bool:
        """Whether no row reads a key that another one writes in this step: decodes, none of whose ids is known yet.

        A block that a step fills is another row's prefix already where its ids were known when that row came.
        """
        return self.num_decodes == len(self.slots) and bool((self.token_slots >= 0).all())


@dataclass(frozen=True, slots=True)
class Sampling:
    """Columns of the R rows that sample, and the host's hints."""

    rows: Tensor  # [R], index of each one's last token in the step
    slots: Tensor  # [R] int64, where each one's new id is kept
    params: SampleParams
    hints: SampleHints
    adjusting: Adjusting | None = None  # penalties and biases, where some row has them


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
    sampling: Sampling
    scored: bool = False  # some prompt's logits are wanted: the hidden states of all tokens are kept


def gather(plan: StepPlan, slots: Slots, block_size: int) -> StepColumns:
    """The columns of a plan whose sequences `slots` has taken in."""
    rows = plan.rows
    told = [(row.sequence.slot, row.start, row.count, row.samples) for row in rows]
    of, starts, counts, samples = np.array(told, np.int32).T.copy()
    begins = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(counts, out=begins[1:])
    owners, positions = of, starts
    if begins[-1] > len(rows):
        which = np.repeat(np.arange(len(rows)), counts)
        owners = of[which]
        positions = (starts[which] + np.arange(begins[-1]) - begins[which]).astype(np.int32)
    kv_slots = slots.tables[owners, positions // block_size] * block_size + positions % block_size
    ids, token_slots = _ids(rows, begins)
    ends, sampling, sample_tokens = starts + counts, of, begins[1:] - 1
    sampled_ends = ends
    if not samples.all():
        chosen = samples.astype(np.bool_)
        sampling, sample_tokens, sampled_ends = of[chosen], sample_tokens[chosen], ends[chosen]
    return StepColumns(
        ids=ids,
        token_slots=token_slots,
        positions=positions,
        kv_slots=kv_slots,
        slots=of,
        begins=begins,
        q_lens=counts,
        kv_lens=ends,
        num_decodes=plan.num_decodes,
        sample_tokens=sample_tokens,
        sample_slots=sampling.astype(np.int64),
        sample_positions=sampled_ends.astype(np.int64),
    )


def _ids(rows: list[Row], begins: Ints) -> tuple[Ints, Ints]:
    """Known ids of the step's tokens (0 where it is still on the device), and the slot that holds the unknown."""
    ids: list[int] = []
    unknown: list[tuple[int, int]] = []
    for row in rows:
        known, end = row.sequence.ids, row.start + row.count
        if row.count > 1:
            ids += known[row.start : end]
        elif end <= len(known):
            ids.append(known[row.start])
        if end > len(known):
            unknown.append((len(ids), row.sequence.slot))
            ids.append(0)
    token_slots = np.full(begins[-1], -1, np.int32)
    if unknown:
        places, owners = np.array(unknown, np.int32).T
        token_slots[places] = owners
    return np.array(ids, np.int32), token_slots


def batch_on_host(columns: StepColumns, slots: Slots, block_size: int, put: Put, adapters: AdapterRows) -> PagedBatch:
    """The batch as a CPU's ops read it: tables a row a sequence, lengths on the host."""
    width = -(-int(columns.kv_lens.max()) // block_size)
    tables = slots.tables[columns.slots, :width]
    return PagedBatch(
        ids=put(columns.ids.astype(np.int64)),
        positions=put(columns.positions.astype(np.int64)),
        kv_slots=put(columns.kv_slots.astype(np.int64)),
        block_tables=put(tables),
        pending=PendingIds(put(columns.token_slots), slots.last_ids),
        num_decodes=columns.num_decodes,
        q_lens_host=tuple(columns.q_lens.tolist()),
        kv_lens_host=tuple(columns.kv_lens.tolist()),
        adapters=adapters,
    )


def sampling(columns: StepColumns, slots: Slots, put: Put, adjusting: Adjusting | None) -> Sampling:
    """The sampling columns, each as `put` has it."""
    of = columns.sample_slots
    params = SampleParams(
        temperature=put(slots.temperature[of]),
        top_p=put(slots.top_p[of]),
        top_k=put(slots.top_k[of]),
        floor=put(slots.floor[of]),
        seed=put(slots.seed[of]),
        choice=put(slots.choice[of]),
        position=put(columns.sample_positions),
    )
    return Sampling(put(columns.sample_tokens), put(of), params, hints(columns, slots), adjusting)


def hints(columns: StepColumns, slots: Slots) -> SampleHints:
    """What the host knows of the parameters."""
    of = columns.sample_slots
    random = slots.temperature[of] > 0
    if not random.any():
        return SampleHints(any_random=False, any_truncation=False)
    cut = (slots.top_p[of] < 1) | (slots.top_k[of] > 0) | (slots.floor[of] > -np.inf)
    return SampleHints(any_random=True, any_truncation=bool((random & cut).any()))


def sampled(plan: StepPlan) -> list[Sequence]:
    """The sequences that sample, in order."""
    return [row.sequence for row in plan.rows if row.samples]


def prompt_scoring(plan: StepPlan, columns: StepColumns, put: Put) -> list[PromptScoring]:
    """What rows want of their prompts."""
    found = []
    for index, row in enumerate(plan.rows):
        if not row.prompt_logits:
            continue
        sequence = row.sequence
        targets = sequence.ids[row.start + 1 : min(row.start + row.count + 1, sequence.prompt_len)]
        if targets:
            begin, wanted = int(columns.begins[index]), sequence.params.prompt_logprobs
            found.append(PromptScoring(index, begin, put(np.array(targets, np.int64)), wanted))
    return found


def adapter_rows(plan: StepPlan, columns: StepColumns, put: Put, bank: AdapterBank) -> AdapterRows:
    """The step's tokens by adapter, in the form of the reference. LookupError for one that is not held."""
    pieces = _pieces_by_adapter(plan, columns)
    residents = [_resident(bank, digest) for digest in pieces]
    return (
        AdapterRows(segments=tuple(map(_segment, residents, pieces.values(), repeat(put)))) if pieces else NO_ADAPTERS
    )


def adapter_tables(plan: StepPlan, columns: StepColumns, bank: AdapterBank) -> SegmentTables | None:
    """The same in the Triton form, still on the host; None where no row has one."""
    pieces = _pieces_by_adapter(plan, columns)
    if not pieces:
        return None
    residents = [_resident(bank, digest) for digest in pieces]
    directories = [resident.directory for resident in residents]
    most = max(resident.most_ranks for resident in residents)
    return cut_segments([_indices(own) for own in pieces.values()], directories, most)


def _pieces_by_adapter(plan: StepPlan, columns: StepColumns) -> dict[str, list[tuple[int, int]]]:
    """Stretches of the step's tokens, by the digest of the adapter that they run with."""
    pieces: dict[str, list[tuple[int, int]]] = {}
    begins = columns.begins.tolist()
    for index, row in enumerate(plan.rows):
        if not row.sequence.adapter:
            continue
        own, (begin, end) = pieces.setdefault(row.sequence.adapter, []), begins[index : index + 2]
        if own and own[-1][1] == begin:
            own[-1] = (own[-1][0], end)
        else:
            own.append((begin, end))
    return pieces


def _resident(bank: AdapterBank, digest: str) -> Resident:
    resident = bank.get(digest)
    if resident is None:
        raise LookupError(f"adapter {digest} was let go while a sequence ran with it")
    return resident


def _indices(pieces: list[tuple[int, int]]) -> Longs:
    return np.concatenate([np.arange(begin, end) for begin, end in pieces])


def _segment(resident: Resident, pieces: list[tuple[int, int]], put: Put) -> AdapterSegment:
    """As a slice where its rows lie in one piece, else by their indices."""
    if len(pieces) == 1:
        return AdapterSegment(rows=slice(*pieces[0]), products=resident.products)
    return AdapterSegment(rows=put(_indices(pieces)), products=resident.products)
