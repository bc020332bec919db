"""How a step's attention is cut up on a CPU: which decodes go together, which rows of a prefill chunk see which keys.

Made once a step and used by every layer. Accelerators walk pieces instead: `attention_work`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmesh_kernels.layers.batch import PagedBatch

# Gathered keys and values of one group of decodes: about a core's share of the last cache level, so that what the
# gather wrote is still near when attention reads it.
CPU_GROUP_BYTES = 4 << 20
# One more group costs about what reading this much padding does.
PADDING_BYTES = 256 << 10
# Query rows that share one mask: bounds the mask and skips keys that no row of the piece may see.
PIECE_ROWS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """n sequences with one query each, padded to `width` cached tokens."""

    rows: Tensor | slice  # the sequences, which are also their rows of q
    blocks: Tensor  # [n * width / block_size] int32
    size: int  # n
    width: int  # cached tokens gathered a sequence, a multiple of the block size
    shortest: int  # least length in the group: only past it is there anything to mask
    outside: Tensor  # [n, width - shortest, 1, 1] bool: not this sequence's tokens
    mask: Tensor  # [n, 1, 1, width], added to scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some query rows of a chunk and the keys they may see: row r sees cached + r + 1 of them."""

    start: int  # rows of q
    stop: int
    cached: int

    @property
    def kv_len(self) -> int:
        """Keys that the last row sees."""
        return self.cached + self.stop - self.start

    def mask(self, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """[rows, kv_len] to add to scores; None where torch's own causal mask, aligned to the first key, is right.

        Made for each layer again: small beside the attention it serves, large to keep for a whole step.
        """
        if not self.cached:
            return None
        hidden = torch.full((self.stop - self.start, self.kv_len), -torch.inf, dtype=dtype, device=device)
        return hidden.triu_(self.cached + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One sequence's prefill chunk."""

    blocks: Tensor  # [ceil(kv_len / block_size)] int32
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """A step's attention work."""

    groups: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]


def plan_attention(batch: PagedBatch, *, block_size: int, token_bytes: int, dtype: torch.dtype) -> AttentionPlan:
    """Cut up one step. token_bytes: keys and values of one token in one layer; dtype: of the queries."""
    lens = batch.kv_lens_host[: batch.num_decodes]
    groups = split_decodes(lens, token_bytes)
    return AttentionPlan(
        groups=tuple(_decode_group(batch, group, block_size, dtype) for group in groups),
        chunks=tuple(_chunks(batch, block_size)),
    )


def split_decodes(lens: Sequence[int], token_bytes: int) -> list[list[int]]:
    """Sequences by length, cut where the padding or the gathered bytes of a group would grow past their bounds."""
    groups: list[list[int]] = []
    used = 0
    for index in sorted(range(len(lens)), key=lens.__getitem__):
        padded = (len(groups[-1]) + 1) * lens[index] * token_bytes if groups else 0
        padding = padded - (used + lens[index]) * token_bytes
        if not groups or padded > CPU_GROUP_BYTES or padding > max(PADDING_BYTES, padded // 4):
            groups.append([])
            used = 0
        groups[-1].append(index)
        used += lens[index]
    return groups


def _rows(group: list[int]) -> Tensor | slice:
    """A slice where the sequences are neighbours in order, else an index tensor."""
    if group == list(range(group[0], group[0] + len(group))):
        return slice(group[0], group[0] + len(group))
    return torch.tensor(group)


def _decode_group(batch: PagedBatch, group: list[int], block_size: int, dtype: torch.dtype) -> DecodeGroup:
    rows = _rows(group)
    lens = [batch.kv_lens_host[index] for index in group]
    num_blocks = -(-max(lens) // block_size)
    width, shortest = num_blocks * block_size, min(lens)
    places = torch.arange(width, device=batch.ids.device)
    outside = places >= torch.tensor(lens, device=batch.ids.device)[:, None]
    mask = torch.zeros(outside.shape, dtype=dtype, device=batch.ids.device).masked_fill_(outside, -torch.inf)
    return DecodeGroup(
        rows=rows,
        blocks=batch.block_tables[rows, :num_blocks].flatten(),
        size=len(group),
        width=width,
        shortest=shortest,
        outside=outside[:, shortest:, None, None],
        mask=mask[:, None, None],
    )


def _chunks(batch: PagedBatch, block_size: int) -> list[Chunk]:
    chunks = []
    start = batch.num_decodes
    for index in range(batch.num_decodes, batch.num_seqs):
        q_len, kv_len = batch.q_lens_host[index], batch.kv_lens_host[index]
        num_blocks = -(-kv_len // block_size)
        pieces = _pieces(start, q_len, kv_len)
        chunks.append(Chunk(blocks=batch.block_tables[index, :num_blocks], pieces=pieces))
        start += q_len
    return chunks


def _pieces(start: int, q_len: int, kv_len: int) -> tuple[Piece, ...]:
    """A chunk that begins its sequence is one piece; masks of one with cached tokens before it are kept small."""
    cached = kv_len - q_len
    step = PIECE_ROWS if cached else q_len
    return tuple(
        Piece(start=start + first, stop=start + min(first + step, q_len), cached=cached + first)
        for first in range(0, q_len, step)
    )
