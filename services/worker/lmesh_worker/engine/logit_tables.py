"""The tables that penalties and biases are read from: a row a slot, filled from the ids when a sequence is admitted.

The device counts each id as it draws it, so that a step may be launched before the one before it was read back. What a
row holds at admission is a function of the ids and the prompt's length alone: a sequence that goes on elsewhere, or is
computed again, is judged as if it had never been interrupted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from lmesh_kernels.ops.adjust import Adjustment, seen_entries, write_rows
from lmesh_kernels.platforms.platform import Platform
from numpy.typing import NDArray
from torch import Tensor

from lmesh_worker.engine.sequence import Sequence

_SEEN, _BIAS = torch.int16, torch.float32


@dataclass(frozen=True, slots=True)
class Rows:
    """What some rows of a table are to hold: zeros, but for `values` [m] at `places` [m]; host tensors."""

    slots: Tensor  # [n] int64
    places: Tensor  # [m] int64, slot * V + id
    values: Tensor  # [m]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """What the R rows of a step that sample ask for, on the host, and what the tables must learn first."""

    repetition: NDArray[np.float32]
    presence: NDArray[np.float32]
    frequency: NDArray[np.float32]
    seen_row: NDArray[np.int64]  # -1: no penalties
    bias_row: NDArray[np.int64]  # -1: no biases
    new_seen: Rows | None
    new_bias: Rows | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adjusting:
    """The same columns on the device. More rows may stand there than sample: they ask for nothing."""

    repetition: Tensor  # [R] float32
    presence: Tensor
    frequency: Tensor
    seen_row: Tensor  # [R] int64
    bias_row: Tensor


class TableKinds(NamedTuple):
    """Which tables there are: a captured step reads those that there were."""

    seen: bool
    bias: bool


class LogitTables:
    """Allocated when the first request needs them; the memory plan has counted them before."""

    def __init__(self, platform: Platform, *, max_seqs: int, vocab_size: int) -> None:
        self._platform, self._shape = platform, (max_seqs, vocab_size)
        self._seen: Tensor | None = None
        self._bias: Tensor | None = None
        self.kinds = TableKinds(seen=False, bias=False)  # once all that was asked is written

    @staticmethod
    def planned_bytes(max_seqs: int, vocab_size: int) -> int:
        """Bytes of both tables."""
        return max_seqs * vocab_size * (_SEEN.itemsize + _BIAS.itemsize)

    def ask(self, sequences: list[Sequence]) -> Asked | None:
        """Columns of the sequences that sample in a step, None where no one asks; marks the new ones as counted."""
        params = [s.params for s in sequences]
        if not any(p.penalises or p.logit_bias for p in params):
            return None
        new = [s for s in sequences if not s.counted]
        asked = Asked(
            repetition=np.array([p.repetition_penalty for p in params], np.float32),
            presence=np.array([p.presence_penalty for p in params], np.float32),
            frequency=np.array([p.frequency_penalty for p in params], np.float32),
            seen_row=np.array([s.slot if s.params.penalises else -1 for s in sequences], np.int64),
            bias_row=np.array([s.slot if s.params.logit_bias else -1 for s in sequences], np.int64),
            new_seen=self._rows([(s.slot, *_seen(s)) for s in new if s.params.penalises], _SEEN),
            new_bias=self._rows([(s.slot, *_bias(s)) for s in new if s.params.logit_bias], _BIAS),
        )
        for sequence in new:
            sequence.counted = True
        self.kinds = TableKinds(
            self.kinds.seen or asked.new_seen is not None, self.kinds.bias or asked.new_bias is not None
        )
        return asked

    def _rows(self, rows: list[tuple[int, np.ndarray, np.ndarray]], dtype: torch.dtype) -> Rows | None:
        if not rows:
            return None
        slots, ids, values = zip(*rows, strict=True)
        places = np.concatenate([slot * self._shape[1] + own for slot, own in zip(slots, ids, strict=True)])
        return Rows(
            self._stage(np.asarray(slots), torch.int64),
            self._stage(places, torch.int64),
            self._stage(np.concatenate(values), dtype),
        )

    def _stage(self, values: np.ndarray, dtype: torch.dtype) -> Tensor:
        staging = self._platform.staging((len(values),), dtype)
        staging.numpy()[:] = values
        return staging

    def learn(self, asked: Asked | None) -> None:
        """Writes the new rows, on the stream that calls, behind the steps before and ahead of the one that asks."""
        if asked is not None:
            self._seen = self._written(self._seen, asked.new_seen, _SEEN)
            self._bias = self._written(self._bias, asked.new_bias, _BIAS)

    def adjustment(self, adjusting: Adjusting | None) -> Adjustment | None:
        """What sampling reads of the tables."""
        if adjusting is None:
            return None
        return Adjustment(
            repetition=adjusting.repetition,
            presence=adjusting.presence,
            frequency=adjusting.frequency,
            seen_row=adjusting.seen_row,
            bias_row=adjusting.bias_row,
            seen=self._seen,
            bias=self._bias,
        )

    def _written(self, table: Tensor | None, rows: Rows | None, dtype: torch.dtype) -> Tensor | None:
        if rows is None:
            return table
        if table is None:
            table = torch.zeros(self._shape, dtype=dtype, device=self._platform.device)
        write_rows(table, *(t.to(table.device, non_blocking=True) for t in (rows.slots, rows.places, rows.values)))
        return table


def _seen(sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
    # All ids are known: a sequence is admitted when none of its ids is still on the device.
    assert not sequence.counted and len(sequence.ids) + 1 == sequence.length
    return seen_entries(sequence.ids, sequence.prompt_len)


def _bias(sequence: Sequence) -> tuple[np.ndarray, np.ndarray]:
    ids, biases = zip(*sequence.params.logit_bias, strict=True)
    return np.asarray(ids, dtype=np.int64), np.asarray(biases, dtype=np.float32)
