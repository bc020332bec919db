"""The prefix index: which worker holds which part of which prompt in its KV cache. Losing it costs affinity only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from lmesh_kernels.blocks import HASH_BYTES, granule_hashes, root_hash

from lmesh_scheduler.fleet import Hello, ModelDescriptor
from lmesh_scheduler.requests import Submission

PENDING_S = 30.0  # how long a placed prefix counts that its worker has not reported yet
MOST_TOKENS = 32_768  # of a prompt that are looked up; hashing 32 k tokens takes about 5 ms

Boot = tuple[str, str]  # worker id, epoch


@dataclass(frozen=True, slots=True)
class Delta:
    """A worker's report; hashes of 16 bytes each, end to end."""

    seq: int
    snapshot: bool
    added: bytes
    removed: bytes


@dataclass(slots=True)
class Changes:
    """What the durable side has not seen yet: all of it anew, or what came and went."""

    whole: bool = True
    added: set[bytes] = field(default_factory=set)
    removed: set[bytes] = field(default_factory=set)


@dataclass(slots=True)
class _Cache:
    held: set[bytes] = field(default_factory=set)
    pending: dict[bytes, float] = field(default_factory=dict)  # hash -> until when
    seq: int | None = None  # of the last delta of this link; None before its snapshot
    changes: Changes = field(default_factory=Changes)


class PrefixIndex:
    """A mirror of the workers' caches, by granules: runs of blocks, named by the hash of their last block."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._caches: dict[Boot, _Cache] = {}

    def joined(self, boot: Boot) -> None:
        """A new link: its first delta is a snapshot; until then what is known of this boot still serves."""
        self._caches.setdefault(boot, _Cache()).seq = None

    def left(self, boot: Boot) -> None:
        """The boot is gone, and its cache with it."""
        self._caches.pop(boot, None)

    def boots(self) -> list[Boot]:
        """Boots that something is known of."""
        return list(self._caches)

    def restore(self, boot: Boot, hashes: Iterable[bytes]) -> None:
        """What the durable side holds of a boot that is expected to join again."""
        self._caches[boot] = _Cache(held=set(hashes), changes=Changes(whole=False))

    def apply(self, boot: Boot, delta: Delta) -> bool:
        """Takes a worker's report; False when one before it is missing: all is forgotten, a snapshot is needed."""
        cache = self._caches.get(boot)
        if cache is None:
            return True  # of a boot that is gone
        added, removed = _hashes(delta.added), _hashes(delta.removed)
        if delta.snapshot:
            cache.held.clear()
            cache.changes = Changes()
        elif cache.seq is None or delta.seq != cache.seq + 1:
            cache.held.clear()
            cache.seq, cache.changes = None, Changes()
            return False
        cache.seq = delta.seq
        cache.held.difference_update(removed)
        cache.held.update(added)
        for found in added:
            cache.pending.pop(found, None)
        if not cache.changes.whole:
            cache.changes.added.difference_update(removed)
            cache.changes.removed.update(removed)
            cache.changes.removed.difference_update(added)
            cache.changes.added.update(added)
        return True

    def placed(self, boot: Boot, granules: Sequence[bytes]) -> None:
        """A request of this prefix was placed there: the next ones of a burst should find it."""
        cache = self._caches.get(boot)
        if cache is None:
            return
        now = self._clock()
        cache.pending = {h: until for h, until in cache.pending.items() if until > now}
        cache.pending.update(dict.fromkeys((h for h in granules if h not in cache.held), now + PENDING_S))

    def leading(self, boot: Boot, granules: Sequence[bytes]) -> int:
        """How many of the prompt's first granules the boot holds, or is about to."""
        cache = self._caches.get(boot)
        if cache is None:
            return 0
        now = self._clock()
        for count, found in enumerate(granules):
            if found not in cache.held and cache.pending.get(found, 0.0) <= now:
                return count
        return len(granules)

    def size(self, boot: Boot) -> int:
        """Granules known of a boot."""
        cache = self._caches.get(boot)
        return 0 if cache is None else len(cache.held)

    def take_changes(self, boot: Boot) -> Changes | None:
        """What the durable side is to be told, once: for all of it, `added` is all that is held. None for nothing."""
        cache = self._caches[boot]
        changes, cache.changes = cache.changes, Changes(whole=False)
        if changes.whole:
            changes.added = set(cache.held)
        return changes if changes.whole or changes.added or changes.removed else None

    def retell(self, boot: Boot) -> None:
        """The durable side did not take it: next time all is told anew."""
        if boot in self._caches:
            self._caches[boot].changes = Changes()


def boot_of(hello: Hello) -> Boot:
    """The key of a worker's boot."""
    return hello.worker_id, hello.epoch


def granules_of(submission: Submission, model: ModelDescriptor) -> list[bytes]:
    """Hashes of the prompt's granules, as the worker's own engine names them; none where it tells no format."""
    if not model.kv_format or not model.kv_granule_blocks:
        return []
    root = root_hash(
        model_digest=model.digest,
        weights_version=model.weights_version,
        cache_salt=submission.cache_salt,
        kv_format=model.kv_format,
        adapter_digest=submission.adapter,
    )
    ids = submission.prompt_ids[:MOST_TOKENS]
    return granule_hashes(root, ids, block_size=model.block_size, granule=model.kv_granule_blocks)


def _hashes(data: bytes) -> list[bytes]:
    return [data[i : i + HASH_BYTES] for i in range(0, len(data) - HASH_BYTES + 1, HASH_BYTES)]
