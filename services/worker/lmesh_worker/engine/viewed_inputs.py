"""What a step's kernels are given: its columns where they stand on the device, by the names they were sent under."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lmesh_kernels.layers.batch import PagedBatch, PendingIds
from lmesh_kernels.lora.bank import AdapterBank
from lmesh_kernels.ops.attention_work import AttentionWork
from lmesh_kernels.ops.prompt_attention import Prompt
from lmesh_kernels.ops.sample_params import SampleHints, SampleParams
from lmesh_kernels.ops.segmented_lora import NO_ADAPTERS, AdapterRows
from lmesh_kernels.ops.segmented_plan import SegmentPlan
from torch import Tensor

from lmesh_worker.engine.graphs import AdapterRoom
from lmesh_worker.engine.inputs import Sampling, StepInputs
from lmesh_worker.engine.logit_tables import Adjusting
from lmesh_worker.engine.slots import Slots

_DRAWING = ("temperature", "top_p", "top_k", "floor", "seed", "choice", "position")
_ADJUSTING = ("repetition", "presence", "frequency", "seen_row", "bias_row")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launches:
    """Which of attention's launches a step has."""

    narrow: bool
    wide: bool
    joined: int  # rows, as `AttentionWork.joined`
    alone: bool = False  # as `AttentionWork.alone`


class ViewedInputs:
    """Makes `StepInputs` of views."""

    def __init__(self, slots: Slots, bank: AdapterBank, *, max_seqs: int) -> None:
        self._slots, self._bank = slots, bank
        # What argmax alone is given: it reads none of it.
        nothing = torch.zeros(max_seqs, dtype=torch.int64, device=slots.last_ids.device)
        self._unread = SampleParams(**dict.fromkeys(_DRAWING, nothing))

    def of(
        self,
        views: dict[str, Tensor],
        launches: Launches,
        told: SampleHints,
        room: AdapterRoom | None,
        prompts: tuple[Prompt, ...] = (),
        *,
        scored: bool = False,
    ) -> StepInputs:
        """`views` are of `columns_of`; `room` is that of adapters, where rows have some; `scored` is `StepInputs`'."""
        assert self._slots.device_tables is not None
        batch = PagedBatch(
            ids=views["ids"],
            positions=views["positions"],
            kv_slots=views["kv_slots"],
            block_tables=self._slots.device_tables,
            pending=PendingIds(views["token_slots"], self._slots.last_ids),
            adapters=NO_ADAPTERS if room is None else self._adapters(views, room),
            work=_work(views, launches, prompts),
        )
        params = self._unread if not told.any_random else SampleParams(**{n: views[n] for n in _DRAWING})
        adjusting = Adjusting(**{n: views[n] for n in _ADJUSTING}) if "repetition" in views else None
        sampling = Sampling(views["sample_tokens"], views["sample_slots"], params, told, adjusting)
        return StepInputs(batch=batch, sampling=sampling, scored=scored)

    def _adapters(self, views: dict[str, Tensor], room: AdapterRoom) -> AdapterRows:
        plan = SegmentPlan(
            numbers=self._bank.numbers,
            order=views["adapter_order"],
            tiles=views["adapter_tiles"],
            directories=views["adapter_directories"],
            height=room.height,
            most_ranks=room.ranks,
        )
        return AdapterRows(plan=plan)


def _work(views: dict[str, Tensor], launches: Launches, prompts: tuple[Prompt, ...]) -> AttentionWork:
    return AttentionWork(
        narrow=views["narrow"],
        wide=views["wide"],
        counts=views["counts"],
        parts_first=views["parts_first"],
        parts=views["parts"],
        has_narrow=launches.narrow,
        has_wide=launches.wide,
        joined=launches.joined,
        prompts=prompts,
        alone=launches.alone,
    )
