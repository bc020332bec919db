"""What a step needs to know of running sequences, by slot: block tables and sampling parameters, in columns.

Columns are written when a sequence takes its slot and where it gains blocks, so that building a step is array work
whatever the number of its rows. On an accelerator the block tables stand on the device as well; what changed is sent
with the step that needs it.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from lmesh_kernels.ops.sample_params import score_floor, seed_to_int64
from lmesh_kernels.platforms.platform import Platform
from numpy.typing import NDArray
from torch import Tensor

from lmesh_worker.engine.sequence import Sequence

Ints = NDArray[np.int32]
_NOBODY = -1


class Slots:
    """`max_seqs` slots and one more, which belongs to nobody: rows that only fill up a batch have it."""

    def __init__(
        self, platform: Platform, *, max_seqs: int, max_blocks: int, spare_block: int, block_size: int
    ) -> None:
        self.spare = max_seqs
        self.spare_kv_slot = spare_block * block_size
        rows = max_seqs + 1
        self.tables = np.full((rows, max_blocks), spare_block, np.int32)
        self.temperature = np.zeros(rows, np.float32)
        self.top_p = np.ones(rows, np.float32)
        self.top_k = np.zeros(rows, np.int32)
        self.floor = np.full(rows, -np.inf, np.float32)  # of min_p
        self.seed = np.zeros(rows, np.int64)
        self.choice = np.zeros(rows, np.int64)
        self.logprobs = np.full(rows, -1, np.int32)
        self.adjusts = np.zeros(rows, np.bool_)  # penalties or biases
        self._owner = [_NOBODY] * rows
        self._known = [0] * rows  # blocks in the table
        self._changed: list[tuple[int, int, int]] = []  # slot, first block, end: what the device's table lacks
        on_host = platform.device.type == "cpu"
        self.device_tables: Tensor | None = None if on_host else torch.from_numpy(self.tables).to(platform.device)
        # The newest id of every slot, so that the next step needs no word from the host.
        self.last_ids = torch.zeros(rows, dtype=torch.int64, device=platform.device)

    def take_in(self, sequences: Rows[Sequence]) -> bool:
        """Brings the columns up to date for sequences that are about to run; whether some were not here before."""
        owner, known, newcomers = self._owner, self._known, False
        for sequence in sequences:
            slot, blocks = sequence.slot, sequence.blocks
            if owner[slot] != sequence.tenure:
                owner[slot], known[slot], newcomers = sequence.tenure, 0, True
                self._move_in(sequence)
            if known[slot] != len(blocks):
                first, known[slot] = known[slot], len(blocks)
                self.tables[slot, first : len(blocks)] = blocks[first:]
                if self.device_tables is not None:
                    self._changed.append((slot, first, len(blocks)))
        return newcomers

    def _move_in(self, sequence: Sequence) -> None:
        slot, params = sequence.slot, sequence.params
        self.temperature[slot], self.top_p[slot], self.top_k[slot] = params.temperature, params.top_p, params.top_k
        self.seed[slot], self.choice[slot] = seed_to_int64(params.seed), sequence.choice
        self.floor[slot], self.logprobs[slot] = score_floor(params.min_p), params.logprobs
        self.adjusts[slot] = params.penalises or bool(params.logit_bias)

    def changes(self) -> tuple[Ints, Ints] | None:
        """(places in the flat table, blocks) that the device has not been told of; None where there are none."""
        if not self._changed or self.device_tables is None:
            return None
        width = self.tables.shape[1]
        places = np.concatenate(
            [np.arange(slot * width + first, slot * width + end) for slot, first, end in self._changed]
        ).astype(np.int32)
        self._changed.clear()
        return places, self.tables.reshape(-1)[places]
