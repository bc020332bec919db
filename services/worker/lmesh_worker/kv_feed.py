"""The server's mirror of the engine's prefix cache, and what of it the scheduler is told next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from lmesh_kernels.blocks import HASH_BYTES

from lmesh_worker.kv_changes import KvChanges, split_hashes

_INTERVAL_S = 0.05  # deltas are gathered for this long
_MOST_BYTES = 1 << 20  # of hashes in one message


@dataclass(frozen=True, slots=True)
class Delta:
    """One message's worth; fields as in lmesh.scheduler.v1.KvDelta."""

    seq: int
    snapshot: bool
    added: bytes
    removed: bytes


class KvFeed:
    """Mirrors the findable granules; deltas apply on top of a snapshot, which begins each link.

    `on_due` is called when `next` has something to give. What waits to be told is never more than what is held and
    what was told, so a scheduler that does not read costs no more than that.
    """

    def __init__(self, *, interval_s: float = _INTERVAL_S, most_bytes: int = _MOST_BYTES) -> None:
        self.on_due: Callable[[], None] = lambda: None
        self._interval_s = interval_s
        self._most = most_bytes // HASH_BYTES
        self._held: set[bytes] = set()
        self._changes = KvChanges()
        self._seq = 0
        self._snapshot_due = True
        self._in_parts = False
        self._told_at = float("-inf")
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Granules held."""
        return len(self._held)

    def take(self, added: bytes, removed: bytes) -> None:
        """Applies what one engine step changed."""
        if not (added or removed):
            return
        for block_hash in split_hashes(removed):
            if block_hash in self._held:
                self._held.discard(block_hash)
                self._changes.remove(block_hash)
        for block_hash in split_hashes(added):
            if block_hash not in self._held:
                self._held.add(block_hash)
                self._changes.add(block_hash)
        self._arm()

    def restart(self) -> None:
        """A new link: sequence numbers begin again, with a snapshot."""
        self._seq = 0
        self.snapshot()

    def snapshot(self) -> None:
        """The next delta is a snapshot, at once."""
        self._changes.restart(self._held)
        self._snapshot_due = True
        self.on_due()

    def next(self) -> Delta | None:
        """What to send now, or None; to be asked again until it is None."""
        if not (self._snapshot_due or self._changes):
            self._in_parts = False
            return None
        now = asyncio.get_running_loop().time()
        if not (self._snapshot_due or self._in_parts) and now < self._told_at + self._interval_s:
            self._arm()
            return None
        added, removed = self._changes.take(self._most)
        self._seq += 1
        delta = Delta(self._seq, self._snapshot_due, added, removed)
        self._snapshot_due, self._told_at = False, now
        self._in_parts = bool(self._changes)  # the rest of what is due now does not wait
        return delta

    def close(self) -> None:
        """Nothing is due any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(loop.time(), self._told_at + self._interval_s), self._ring)

    def _ring(self) -> None:
        self._timer = None
        self.on_due()
