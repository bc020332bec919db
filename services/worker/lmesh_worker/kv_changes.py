"""What changed in a set of block hashes since it was last told: the net of it, however often a hash came and went."""

from __future__ import annotations

from collections.abc import Iterable

from lmesh_kernels.blocks import HASH_BYTES


class KvChanges:
    """Gathers changes of a set and gives them out; whoever applies all of them has the set.

    Never larger than what is in the set and what was told to be in it, so it is bounded by the set's owner.
    """

    __slots__ = ("_added", "_removed")

    def __init__(self) -> None:
        self._added: dict[bytes, None] = {}
        self._removed: dict[bytes, None] = {}

    def __bool__(self) -> bool:
        return bool(self._added or self._removed)

    def add(self, block_hash: bytes) -> None:
        """The hash has come into the set."""
        if block_hash in self._removed:
            del self._removed[block_hash]  # it was told, and its going was not
        else:
            self._added[block_hash] = None

    def remove(self, block_hash: bytes) -> None:
        """The hash has left the set."""
        if block_hash in self._added:
            del self._added[block_hash]  # nobody has heard of it
        else:
            self._removed[block_hash] = None

    def restart(self, held: Iterable[bytes]) -> None:
        """Nothing was told so far, and `held` is the set."""
        self._added, self._removed = dict.fromkeys(held), {}

    def take(self, most: int = 0) -> tuple[bytes, bytes]:
        """Up to `most` changes (0: all) as (added, removed), hashes end to end; what left goes first."""
        most = most or len(self._added) + len(self._removed)
        removed = _pop(self._removed, most)
        return _pop(self._added, most - len(removed) // HASH_BYTES), removed


def split_hashes(joined: bytes) -> list[bytes]:
    """Hashes that were put end to end."""
    return [joined[at : at + HASH_BYTES] for at in range(0, len(joined), HASH_BYTES)]


def _pop(hashes: dict[bytes, None], most: int) -> bytes:
    """Takes the oldest ones out."""
    if not hashes or not most:
        return b""
    if len(hashes) <= most:
        joined = b"".join(hashes)
        hashes.clear()
        return joined
    taken = [block_hash for block_hash, _ in zip(hashes, range(most), strict=False)]
    for block_hash in taken:
        del hashes[block_hash]
    return b"".join(taken)
