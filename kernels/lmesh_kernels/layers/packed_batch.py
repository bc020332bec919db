"""`PackedBatch`: rows of a dataset end to end, each seeing itself alone; what a training step reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedBatch:
    """T tokens of S segments, concatenated; segment i owns tokens begins[i]:begins[i+1], and attends to no other.

    Token t predicts `targets[t]` with weight `weights[t]` in the loss; a weight of 0 leaves it out. The last token of
    a segment predicts nothing.
    """

    ids: Tensor  # [T] int64, token ids
    positions: Tensor  # [T] int64, within the segment
    targets: Tensor  # [T] int64, 0 where nothing is predicted
    weights: Tensor  # [T] float32
    rows: (
        Tensor  # [T] int64, the dataset's number of the token's row: with the position, what dropout's mask depends on
    )
    cu_seqlens: Tensor  # [S+1] int32
    begins: tuple[int, ...]  # as cu_seqlens, on the host

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.begins[-1]

    @property
    def num_segments(self) -> int:
        """S."""
        return len(self.begins) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One row as the packer hands it over."""

    row: int  # its number in the dataset
    ids: Sequence[int]
    weights: Sequence[float]  # of predicting ids[i]; the first is not used: nothing predicts it


def pack_batch(segments: Sequence[Segment], device: torch.device) -> PackedBatch:
    """Lays segments end to end. ValueError for none, an empty one, or one with as many weights as no ids."""
    if not segments or any(len(s.ids) != len(s.weights) or not len(s.ids) for s in segments):
        raise ValueError("a batch has segments, each with ids and as many weights")
    begins = [0]
    for segment in segments:
        begins.append(begins[-1] + len(segment.ids))
    total = begins[-1]
    ids, targets, rows, positions = (torch.zeros(total, dtype=torch.int64) for _ in range(4))
    weights = torch.zeros(total, dtype=torch.float32)
    for segment, begin, end in zip(segments, begins, begins[1:], strict=False):
        ids[begin:end] = torch.tensor(list(segment.ids), dtype=torch.int64)
        targets[begin : end - 1] = ids[begin + 1 : end]
        weights[begin : end - 1] = torch.tensor(list(segment.weights), dtype=torch.float32)[1:]
        positions[begin:end] = torch.arange(end - begin)
        rows[begin:end] = segment.row
    moved = (t.to(device, non_blocking=True) for t in (ids, positions, targets, weights, rows))
    ids, positions, targets, weights, rows = moved
    return PackedBatch(
        ids=ids,
        positions=positions,
        targets=targets,
        weights=weights,
        rows=rows,
        cu_seqlens=torch.tensor(begins, dtype=torch.int32).to(device, non_blocking=True),
        begins=tuple(begins),
    )
