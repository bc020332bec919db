"""Static buffers of a step: filled on the host, copied once per dtype, read by the device as views."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lmesh_kernels.platforms.platform import Platform
from torch import Tensor


class Packed:
    """One dtype's columns end to end in one staging tensor, with its twin on the device.

    Columns are laid out anew each step, so that one copy moves exactly what the step uses. On a CPU the staging
    tensor is the device's.
    """

    def __init__(self, platform: Platform, capacity: int, dtype: torch.dtype) -> None:
        self._staging = platform.staging((capacity,), dtype)
        self._host = self._staging.numpy()
        on_host = platform.device.type == "cpu"
        self._device = self._staging if on_host else torch.zeros(capacity, dtype=dtype, device=platform.device)
        self._used = 0

    def clear(self) -> None:
        """Begins a new step."""
        self._used = 0

    def put(self, values: Iterable[float], count: int) -> Tensor:
        """Writes a column of `count` values; the device view that will hold them after `upload`."""
        begin, self._used = self._used, self._used + count
        self._host[begin : self._used] = values
        return self._device[begin : self._used]

    def upload(self) -> None:
        """Starts the copy to the device (on the stream that calls)."""
        if self._device is not self._staging:
            used = slice(0, self._used)
            self._device[used].copy_(self._staging[used], non_blocking=True)


class StepBuffers:
    """All buffers of one step in flight; an engine has one set for each step that may be in flight at once."""

    def __init__(self, platform: Platform, *, max_tokens: int, max_seqs: int, max_blocks: int) -> None:
        self.int64 = Packed(platform, 6 * max_tokens + 9 * max_seqs, torch.int64)
        # Of the adapters' tiles, of 16 rows at least but the last of each adapter.
        tiles = max_tokens + 3 * (max_tokens // 16 + max_seqs)
        self.int32 = Packed(platform, 3 * max_seqs + 1 + max_seqs * max_blocks + tiles, torch.int32)
        self.float32 = Packed(platform, 6 * max_seqs, torch.float32)
        self.out_ids = platform.staging((max_seqs,), torch.int64)
        self.out_finite = platform.staging((max_seqs,), torch.bool)

    def clear(self) -> None:
        """Begins a new step."""
        for packed in (self.int64, self.int32, self.float32):
            packed.clear()

    def upload(self) -> None:
        """Starts the copies to the device."""
        for packed in (self.int64, self.int32, self.float32):
            packed.upload()
