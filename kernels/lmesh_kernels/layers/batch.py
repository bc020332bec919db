"""`PagedBatch`: one step's tokens as the decoder reads them, views into buffers that the engine fills."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lmesh_kernels.ops.segmented_lora import NO_ADAPTERS, AdapterRows


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PagedBatch:
    """T tokens of S sequences, concatenated; sequence i owns tokens cu_seqlens_q[i]:cu_seqlens_q[i+1].

    Sequences 0..num_decodes-1 have exactly one token; the others are prefill chunks of any length from 1.
    A sequence's new tokens are its last ones: the first lies at position kv_lens[i] - q_lens[i].
    The *_host tuples repeat what the tensors hold, so that nothing in a forward waits for the device.
    """

    ids: Tensor  # [T] int64, token ids
    positions: Tensor  # [T] int64, absolute positions
    kv_slots: Tensor  # [T] int64, block * block_size + offset where each token's K and V go
    cu_seqlens_q: Tensor  # [S+1] int32
    kv_lens: Tensor  # [S] int32, cached length including this step's tokens
    block_tables: Tensor  # [S, max_blocks] int32; entries past a sequence's end hold any valid block
    num_tokens: int  # T
    num_seqs: int  # S
    num_decodes: int
    max_q: int
    max_kv: int
    q_lens_host: tuple[int, ...]
    kv_lens_host: tuple[int, ...]
    adapters: AdapterRows = NO_ADAPTERS  # rows that run with an adapter; the others are the base's alone
