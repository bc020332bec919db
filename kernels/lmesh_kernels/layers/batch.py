"""`PagedBatch`: one step's tokens as the decoder reads them, views into buffers that the engine fills."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lmesh_kernels.ops.attention_work import AttentionWork
from lmesh_kernels.ops.segmented_lora import NO_ADAPTERS, AdapterRows


@dataclass(frozen=True, slots=True, eq=False)
class PendingIds:
    """Ids that only the device knows yet."""

    slots: Tensor  # [T]: where each token's id is among `last_ids`; -1 if `PagedBatch.ids` has it
    last_ids: Tensor  # [slots] int64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PagedBatch:
    """T tokens of S sequences, concatenated; sequences 0..num_decodes-1 have exactly one, the others any number from 1.

    A sequence's new tokens are its last ones: the first lies at position kv_lens_host[i] - q_lens_host[i]. How
    attention is cut up is planned from lengths on the host: those here, or what a caller made `work` of. So nothing in
    a forward waits for the device.
    """

    ids: Tensor  # [T] int64 or int32, token ids
    positions: Tensor  # [T] int64 or int32, absolute positions
    kv_slots: Tensor  # [T] int64 (int32 on accelerators), block * block_size + offset where each token's K and V go
    block_tables: Tensor  # [rows, max_blocks] int32; entries past a sequence's end hold any valid block
    pending: PendingIds | None = None
    num_decodes: int = 0
    q_lens_host: tuple[int, ...] = ()
    kv_lens_host: tuple[int, ...] = ()  # cached, including this step's tokens
    adapters: AdapterRows = NO_ADAPTERS  # rows that run with an adapter; the others are the base's alone
    work: AttentionWork | None = None  # attention's pieces on an accelerator; None: sequence i has row i of the tables

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.ids.shape[0]

    @property
    def num_seqs(self) -> int:
        """S."""
        return len(self.q_lens_host)
