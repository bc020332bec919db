"""Paged attention of one model on one accelerator: its tiles, how many programs run, and the room for parts.

Tiles were measured on an H200 in bfloat16 over blocks of 64 (a model's share of the time that reading its keys and
values once takes, copy rate 4.23 TB/s): heads of 64, 8 key heads, narrow 16 x 128: 256 sequences 0.80, 64 0.65, 8 0.29;
heads of 128: 0.95, 0.78, 0.47. Wide 128 x 64 over a prompt of 8,192: 359 and 376 TFLOP/s (torch's FlashAttention-2: 269
and 318). 64 sequences over a common prefix of 4,096: 31 us against 207 without sharing, and 58 against 246.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmesh_kernels.layers.batch import PagedBatch
from lmesh_kernels.ops.attention_work import AttentionWork, Shape, on_device, plan_pieces
from lmesh_kernels.ops.linear_tiles import takes_pdl
from lmesh_kernels.ops.prompt_attention import attend_prompt, takes_prompts

_PROGRAMS = 8  # of a processor
_MOST_PARTS = 4096  # rows' parts in one step: bounds the room for them


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one kind of piece is run."""

    rows: int  # height of the tile of queries
    keys: int  # of a stretch
    warps: int
    stages: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scratch:
    """Room for the parts of a step's rows."""

    parts: Tensor  # [most, heads, head_dim] float32
    sums: Tensor  # [most, heads] float32: log2 of the sums of exponentials


def tiles(head_dim: int, group: int, dtype: torch.dtype) -> tuple[Tile, Tile]:
    """(narrow, wide) for heads of a size; `group` query heads read one key head."""
    height = max(16, 1 << (group - 1).bit_length())
    if dtype == torch.float32 or head_dim > 128:  # twice the bytes: what fits beside each other in shared memory
        return Tile(rows=height, keys=32, warps=4, stages=2), Tile(rows=max(64, height), keys=32, warps=4, stages=2)
    narrow = Tile(rows=height, keys=128, warps=4, stages=2 if head_dim <= 64 else 3)
    return narrow, Tile(rows=128, keys=64, warps=4, stages=3)


def room_bytes(heads: int, head_dim: int) -> int:
    """Bytes of the room for parts."""
    return 4 * _MOST_PARTS * heads * (head_dim + 1)


class DeviceAttention:
    """What all layers of a model share. One step at a time: steps share the room for parts."""

    def __init__(
        self,
        device: torch.device,
        *,
        kv_heads: int,
        group: int,
        head_dim: int,
        dtype: torch.dtype,
        invariant: bool = False,
    ) -> None:
        self.narrow, self.wide = tiles(head_dim, group, dtype)
        self.programs = _PROGRAMS * _processors(device)
        self.shape = Shape(
            kv_heads=kv_heads,
            group=group,
            wide_rows=self.wide.rows // group,
            programs=self.programs,
            most_parts=_MOST_PARTS,
            invariant=invariant,
        )
        self.takes_prompts = not invariant and takes_prompts(dtype, head_dim, device)
        self._pdl = takes_pdl(device)
        heads = kv_heads * group
        self.scratch = Scratch(
            parts=torch.empty(_MOST_PARTS, heads, head_dim, dtype=torch.float32, device=device),
            sums=torch.empty(_MOST_PARTS, heads, dtype=torch.float32, device=device),
        )

    def plan(self, batch: PagedBatch) -> AttentionWork:
        """The work of a batch whose tables have a row a sequence; copies to the device."""
        device = batch.ids.device
        pieces = plan_pieces(np.array(batch.q_lens_host, np.int32), np.array(batch.kv_lens_host, np.int32), self.shape)
        return on_device(pieces, lambda values: torch.from_numpy(np.ascontiguousarray(values)).to(device))

    def attend(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        work: AttentionWork,
        *,
        scale: float,
        own: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As `paged_attention`, of what `work` says; `tables` [rows, blocks] int32 are those that its pieces name.

        `own`, the step's k and v [T, kv_heads, head_dim] as they are in the cache, is needed where `work` has prompts.
        """
        from lmesh_kernels.ops.paged_attention_kernels import paged_attention_triton

        out = paged_attention_triton(
            q,
            keys,
            values,
            tables,
            work,
            self.scratch,
            scale=scale,
            narrow=self.narrow,
            wide=self.wide,
            programs=self.programs,
            pdl=self._pdl,
        )
        for prompt in work.prompts:
            assert own is not None
            attend_prompt(q, *own, prompt, out, scale=scale)
        return out

    def decode(
        self,
        qkv: Tensor,
        rotation: Tensor,
        kv_slots: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        work: AttentionWork,
        *,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        scale: float,
    ) -> Tensor:
        """`rope_kv` and `attend` in one, of work that is `alone`; returns [T, heads, head_dim]."""
        from lmesh_kernels.ops.decode_attention_kernels import decode_attention_triton

        return decode_attention_triton(
            qkv,
            rotation,
            kv_slots,
            keys,
            values,
            tables,
            work,
            self.scratch,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=eps,
            scale=scale,
            tile=self.narrow,
            pdl=self._pdl,
        )


def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).gpu_subslice_count)
    return 1  # the interpreter's
