"""Runs a decoder over a paged cache step by step, as an engine would, with blocks scattered on purpose."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from lmesh_kernels.layers.attention import PagedAttention
from lmesh_kernels.layers.batch import PagedBatch
from lmesh_kernels.layers.kv_cache import KVCache
from lmesh_kernels.models.decoder import Decoder

CPU = torch.device("cpu")


@dataclass
class Lane:
    """One sequence's blocks and length."""

    blocks: list[int] = field(default_factory=list)
    length: int = 0


def make_batch(
    ids: Sequence[Sequence[int]], cached: Sequence[int], tables: Sequence[Sequence[int]], block_size: int
) -> PagedBatch:
    """A batch of sequences that have `cached` tokens already; single-token sequences must come first."""
    q_lens = tuple(len(part) for part in ids)
    kv_lens = tuple(c + q for c, q in zip(cached, q_lens, strict=True))
    positions = [c + i for c, q in zip(cached, q_lens, strict=True) for i in range(q)]
    owners = [s for s, q in enumerate(q_lens) for _ in range(q)]
    slots = [tables[s][p // block_size] * block_size + p % block_size for s, p in zip(owners, positions, strict=True)]
    width = max(len(table) for table in tables)
    num_decodes = next((i for i, q in enumerate(q_lens) if q != 1), len(q_lens))
    return PagedBatch(
        ids=torch.tensor([i for part in ids for i in part]),
        positions=torch.tensor(positions),
        kv_slots=torch.tensor(slots),
        block_tables=torch.tensor([[*t, *[0] * (width - len(t))] for t in tables], dtype=torch.int32),
        num_decodes=num_decodes,
        q_lens_host=q_lens,
        kv_lens_host=kv_lens,
    )


def on_device(batch: PagedBatch, device: torch.device) -> PagedBatch:
    """The batch with its tensors on `device`."""
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return replace(batch, **{n: t.to(device) for n, t in tensors.items() if isinstance(t, torch.Tensor)})


class PagedRunner:
    """A decoder, a cache, and the lanes that share it."""

    def __init__(self, decoder: Decoder, *, block_size: int = 4, num_blocks: int = 96, seed: int = 0) -> None:
        self.decoder = decoder
        self.block_size = block_size
        self.kv = KVCache(decoder.config, num_blocks, block_size, decoder.dtype, decoder.arena.device)
        # Whatever an owner before left in a block, even NaN, must not reach its next owner.
        self.kv.data.fill_(torch.nan)
        self.attention = PagedAttention(self.kv)
        self.lanes: dict[int, Lane] = {}
        self._free = list(range(num_blocks))
        random.Random(seed).shuffle(self._free)

    def step(self, work: dict[int, Sequence[int]]) -> dict[int, torch.Tensor]:
        """Feed each lane its next ids; returns the logits of every fed token by lane."""
        order = sorted(work, key=lambda lane: len(work[lane]) != 1)
        for lane in order:
            self._grow(self.lanes.setdefault(lane, Lane()), len(work[lane]))
        lanes = [self.lanes[lane] for lane in order]
        batch = make_batch(
            [work[lane] for lane in order],
            [lane.length for lane in lanes],
            [lane.blocks for lane in lanes],
            self.block_size,
        )
        logits = self.decoder.logits(self.decoder(on_device(batch, self.kv.data.device), self.attention))
        for name in order:
            self.lanes[name].length += len(work[name])
        return dict(zip(order, logits.split(list(batch.q_lens_host)), strict=True))

    def _grow(self, lane: Lane, tokens: int) -> None:
        while len(lane.blocks) * self.block_size < lane.length + tokens:
            lane.blocks.append(self._free.pop())

    def full(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """All sequences in one step."""
        out = self.step(dict(enumerate(sequences)))
        return [out[i] for i in range(len(sequences))]

    def in_chunks(self, sequences: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[torch.Tensor]:
        """Each sequence in chunks whose sizes cycle, out of phase between sequences, so that steps are mixed."""
        parts: list[list[torch.Tensor]] = [[] for _ in sequences]
        turn = 0
        while any(sum(map(len, part)) < len(ids) for part, ids in zip(parts, sequences, strict=True)):
            work = {}
            for lane, (part, ids) in enumerate(zip(parts, sequences, strict=True)):
                done = sum(map(len, part))
                if done < len(ids):
                    work[lane] = ids[done : done + sizes[(turn + lane) % len(sizes)]]
            for lane, logits in self.step(work).items():
                parts[lane].append(logits)
            turn += 1
        return [torch.cat(part) for part in parts]
