"""A step on its device: ids that only the device knows, the forward pass, logits, sampled ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lmesh_kernels.layers.attention import PagedAttention
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.ops.sample import sample_rows
from torch import Tensor

from lmesh_worker.engine.inputs import StepInputs
from lmesh_worker.engine.logit_tables import LogitTables


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepOutputs:
    """What a step leaves on its device; the next step may overwrite it."""

    hidden: Tensor | None  # [T, hidden], where prompts are scored
    logits: Tensor  # [R, vocab]
    ids: Tensor  # [R] int64
    drawn: Tensor  # [9 * R] bytes: the ids, then whether each one's logits were finite


def drawn_views(drawn: Tensor) -> tuple[Tensor, Tensor]:
    """(ids [R] int64, finite [R] bool) of `StepOutputs.drawn`, which one copy brings to the host."""
    ids = 8 * (len(drawn) // 9)
    return drawn[:ids].view(torch.int64), drawn[ids:].view(torch.bool)


Compute = Callable[[], StepOutputs]


def compute_step(
    decoder: Decoder,
    attention: PagedAttention,
    last_ids: Tensor,
    tables: LogitTables,
    inputs: StepInputs,
    room: Tensor | None = None,
) -> StepOutputs:
    """Runs one step; `last_ids` [slots] gives ids to it and takes the new ones. Nothing in it asks the device.

    `room` [most rows, vocab] in the model's dtype is where logits are written to, if given.
    """
    sampling, count = inputs.sampling, len(inputs.sampling.rows)
    # What nobody reads is left out, but for one row: no kernel takes none.
    read = sampling.rows if count else sampling.rows.new_zeros(1)
    few = not inputs.scored and len(read) < len(inputs.batch.ids)
    hidden = decoder.forward(inputs.batch, attention, read if few else None)
    rows = hidden if few else hidden.index_select(0, read)
    logits = decoder.logits(rows, widened=False, out=None if room is None else room[: len(read)])[:count]
    drawn = torch.empty(9 * count, dtype=torch.uint8, device=hidden.device)
    ids, finite = drawn_views(drawn)
    if count:
        sample_rows(logits, sampling.params, sampling.hints, ids, finite, tables.adjustment(sampling.adjusting))
        last_ids.index_copy_(0, sampling.slots, ids)
    return StepOutputs(hidden=hidden if inputs.scored else None, logits=logits, ids=ids, drawn=drawn)
