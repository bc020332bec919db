"""Steps of a CPU engine: the host's memory is the device's, and every step runs as it is."""

from __future__ import annotations

import numpy as np
import torch
from lmesh_kernels.layers.attention import PagedAttention
from lmesh_kernels.lora.bank import AdapterBank
from lmesh_kernels.models.decoder import Decoder
from numpy.typing import NDArray
from torch import Tensor

from lmesh_worker.engine.compute import Compute, StepOutputs, compute_step
from lmesh_worker.engine.inputs import (
    PromptScoring,
    StepColumns,
    StepInputs,
    adapter_rows,
    batch_on_host,
    gather,
    prompt_scoring,
    sampled,
    sampling,
)
from lmesh_worker.engine.logit_tables import Adjusting, Asked, LogitTables
from lmesh_worker.engine.plan import StepPlan
from lmesh_worker.engine.slots import Slots


def _put(column: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(column))


class HostSteps:
    """Makes tensors of a plan's columns and computes on them."""

    def __init__(
        self,
        decoder: Decoder,
        attention: PagedAttention,
        slots: Slots,
        tables: LogitTables,
        bank: AdapterBank,
        block_size: int,
    ) -> None:
        self._decoder, self._attention, self._slots, self._tables = decoder, attention, slots, tables
        self._bank, self._block_size = bank, block_size

    def prepare(self, plan: StepPlan) -> tuple[StepColumns, list[PromptScoring], Compute]:
        """(columns, prompt positions to score, what computes the step); a value that no tensor takes raises."""
        self._slots.take_in([row.sequence for row in plan.rows])
        columns = gather(plan, self._slots, self._block_size)
        adapters = adapter_rows(plan, columns, _put, self._bank)
        asked = self._tables.ask(sampled(plan))
        scoring = prompt_scoring(plan, columns, _put)
        inputs = StepInputs(
            batch=batch_on_host(columns, self._slots, self._block_size, _put, adapters),
            sampling=sampling(columns, self._slots, _put, _adjusting(asked)),
            scored=bool(scoring),
        )

        def compute() -> StepOutputs:
            self._tables.learn(asked)
            return compute_step(self._decoder, self._attention, self._slots.last_ids, self._tables, inputs)

        return columns, scoring, compute


def _adjusting(asked: Asked | None) -> Adjusting | None:
    if asked is None:
        return None
    return Adjusting(
        repetition=_put(asked.repetition),
        presence=_put(asked.presence),
        frequency=_put(asked.frequency),
        seen_row=_put(asked.seen_row),
        bias_row=_put(asked.bias_row),
    )
