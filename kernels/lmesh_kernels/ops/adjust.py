"""What changes logits before a token is drawn: biases of a request's own, and penalties on ids that it has seen.

Both stand in tables with a row a slot of the engine. Order and meaning are vLLM's: the bias is added; then, for every
id of prompt or output, a positive logit is divided by `repetition` and a negative one multiplied by it; then, for every
id of the output, `frequency` times its count and `presence` once are taken off.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# An entry of `seen` is twice the times that an id was drawn, plus one if the prompt has it; counts end here, where
# no penalty that a request may ask for leaves an id a chance.
MOST_DRAWN = 2**14 - 1
_LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjustment:
    """The R rows of one step beside the tables [slots, V]; a table that no row needs may be None."""

    repetition: Tensor  # [R] float32, above 0; 1: off
    presence: Tensor  # [R] float32; 0: off
    frequency: Tensor  # [R] float32; 0: off
    seen_row: Tensor  # [R] int64, row of `seen`; -1: no penalties
    bias_row: Tensor  # [R] int64, row of `bias`; -1: no biases
    seen: Tensor | None = None  # [slots, V] int16, see MOST_DRAWN
    bias: Tensor | None = None  # [slots, V] float32

    def row(self, index: int) -> Adjustment:
        """The same of one row."""
        one = slice(index, index + 1)
        return Adjustment(
            repetition=self.repetition[one],
            presence=self.presence[one],
            frequency=self.frequency[one],
            seen_row=self.seen_row[one],
            bias_row=self.bias_row[one],
            seen=self.seen,
            bias=self.bias,
        )


def seen_entries(ids: list[int], prompt_len: int) -> tuple[np.ndarray, np.ndarray]:
    """What a row of `seen` holds beside zeros, from the ids alone: the distinct ids, and their entries (int16)."""
    prompt = np.unique(np.asarray(ids[:prompt_len], dtype=np.int64))
    drawn, counts = np.unique(np.asarray(ids[prompt_len:], dtype=np.int64), return_counts=True)
    distinct = np.union1d(prompt, drawn)
    entries = np.isin(distinct, prompt).astype(np.int16)
    entries[np.searchsorted(distinct, drawn)] += (2 * np.minimum(counts, MOST_DRAWN)).astype(np.int16)
    return distinct, entries


def write_rows(table: Tensor, slots: Tensor, places: Tensor, values: Tensor) -> None:
    """Makes the rows `slots` [n] of a table zero but for `values` [m] at `places` [m] (slot * V + id, each once)."""
    table.index_fill_(0, slots, 0)
    table.view(-1).index_copy_(0, places, values)


def adjust_reference(logits: Tensor, adjustment: Adjustment) -> Tensor:
    """Logits [R, V] of any dtype with biases and penalties applied, as float32, in plain torch."""
    x = logits.float()
    if adjustment.bias is not None:
        has = (adjustment.bias_row >= 0)[:, None]
        x = torch.where(has, x + adjustment.bias[adjustment.bias_row.clamp(min=0)], x)
    if adjustment.seen is not None:
        has = (adjustment.seen_row >= 0)[:, None]
        entries = torch.where(has, adjustment.seen[adjustment.seen_row.clamp(min=0)], 0)
        drawn = (entries >> 1).float()
        repetition = adjustment.repetition[:, None]
        penalised = torch.where(x > 0, x / repetition, x * repetition) - adjustment.frequency[:, None] * drawn
        penalised = penalised - torch.where(drawn > 0, adjustment.presence[:, None], 0.0)
        # A tiny repetition must not make several scores infinite.
        x = torch.where(entries > 0, penalised.clamp_(-_LARGEST, _LARGEST), x)
    return x


def adjust_on_host(logits: Tensor, adjustment: Adjustment | None) -> Tensor:
    """As `adjust_reference`, for tensors on the host: row by row, and the logits themselves where no row asks."""
    rows = [] if adjustment is None else _asking(adjustment)
    if adjustment is None or not rows:
        return logits
    adjusted = logits.to(torch.float32, copy=True)
    for index in rows:
        adjusted[index] = adjust_reference(logits[index : index + 1], adjustment.row(index))[0]
    return adjusted


def note_drawn_on_host(adjustment: Adjustment, ids: Tensor) -> None:
    """Counts the ids [R] int64 just drawn, in the rows of `seen` that keep count; for tensors on the host."""
    if adjustment.seen is None:
        return
    kept = (adjustment.seen_row >= 0).nonzero()[:, 0]
    place = (adjustment.seen_row[kept], ids[kept])
    entries = adjustment.seen[place].to(torch.int32)
    counted = torch.where(entries >> 1 < MOST_DRAWN, entries + 2, entries)
    adjustment.seen.index_put_(place, counted.to(torch.int16))


def _asking(adjustment: Adjustment) -> Iterable[int]:
    rows: list[int] = ((adjustment.seen_row >= 0) | (adjustment.bias_row >= 0)).nonzero()[:, 0].tolist()
    return rows
