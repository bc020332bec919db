"""The step that follows one of decodes only: most often the same rows, one token further."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from lmesh_kernels.ops.attention_work import Pieces
from lmesh_kernels.ops.sample_params import SampleHints

from lmesh_worker.engine.buffers import Filled
from lmesh_worker.engine.graphs import GraphKey
from lmesh_worker.engine.inputs import StepColumns
from lmesh_worker.engine.plan import Row
from lmesh_worker.engine.slots import Slots


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Steady:
    """A step of decodes whose ids the device alone knows, and all that it sent.

    What follows it is made from it in a few array operations, whatever the number of rows: a step of 64 took the host
    303 us instead of 455 (one core of an Intel Xeon, no device).
    """

    rows: list[Row]
    columns: StepColumns
    pieces: Pieces
    told: SampleHints
    key: GraphKey
    sent: dict[str, Filled]

    def is_before(self, rows: list[Row]) -> bool:
        """Whether these are the same rows, each one token further, its id still on the device."""
        if len(rows) != len(self.rows):
            return False
        for row, was in zip(rows, self.rows, strict=True):
            sequence, start = row.sequence, row.start
            if sequence is not was.sequence or start != was.start + 1 or start != len(sequence.ids):
                return False
        return True

    def advanced(self, slots: Slots, block_size: int) -> StepColumns:
        """The columns of the rows that follow; `slots` has their new blocks."""
        columns = self.columns
        positions, kv_slots = columns.positions + 1, columns.kv_slots + 1
        crossed = np.flatnonzero(positions % block_size == 0)
        if len(crossed):
            blocks = slots.tables[columns.slots[crossed], positions[crossed] // block_size]
            kv_slots[crossed] = blocks * block_size
        return replace(
            columns,
            positions=positions,
            kv_slots=kv_slots,
            kv_lens=columns.kv_lens + 1,
            sample_positions=columns.sample_positions + 1,
        )


def is_steady(columns: StepColumns) -> bool:
    """Whether a step is decodes that all sample, of ids that the device alone knows."""
    rows = len(columns.slots)
    return columns.num_decodes == rows and len(columns.sample_tokens) == rows and bool((columns.token_slots >= 0).all())
