"""KV blocks: who holds them, which are findable by hash, and which is evicted next. O(1) an operation."""

from __future__ import annotations

from collections import OrderedDict

from lmesh_worker.kv_changes import KvChanges


class PoolExhaustedError(RuntimeError):
    """No block is free. The batcher asks before it takes, so reaching this is our own bug."""


class BlockPool:
    """Reference counts over `num_blocks` blocks.

    A block with references is held. One without is free, and stays findable by its hash until it is taken again:
    free blocks without a hash go first, then the least recently released. `changes` gathers which granules (see
    `lmesh_kernels.blocks.granule_blocks`) became findable and which no longer are.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._ends_granule = bytearray(num_blocks)  # 1 where a findable block is the last of a granule
        self.changes = KvChanges()
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can still give."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Blocks with references."""
        return self.num_blocks - len(self._free)

    def references(self, block: int) -> int:
        """How many sequences hold `block`."""
        return self._references[block]

    def find(self, block_hash: bytes) -> int | None:
        """The block with this content, held or free, or None."""
        return self._block_of.get(block_hash)

    def allocate(self) -> int:
        """Takes the next block to evict, with one reference; its old content is no longer findable."""
        if not self._free:
            raise PoolExhaustedError(f"all {self.num_blocks} KV blocks are held")
        block, _ = self._free.popitem(last=False)
        self.withdraw(block)
        self._references[block] = 1
        return block

    def share(self, block: int) -> None:
        """Adds a reference to a block that `find` gave."""
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def release(self, block: int) -> None:
        """Drops one reference; the last one makes the block free."""
        if self._references[block] <= 0:
            raise AssertionError(f"block {block} is released more often than it was taken")
        self._references[block] -= 1
        if self._references[block]:
            return
        self._free[block] = None
        if self._hash_of[block] is None:
            self._free.move_to_end(block, last=False)

    def register(self, block: int, block_hash: bytes, *, ends_granule: bool = False) -> bool:
        """Makes a held block findable; False where another block already has this content (that one stays)."""
        if block_hash in self._block_of:
            return False
        self.withdraw(block)
        self._block_of[block_hash] = block
        self._hash_of[block] = block_hash
        if ends_granule:
            self._ends_granule[block] = 1
            self.changes.add(block_hash)
        return True

    def withdraw(self, block: int) -> None:
        """Makes a block unfindable, if it was findable."""
        block_hash = self._hash_of[block]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block] = None
            if self._ends_granule[block]:
                self._ends_granule[block] = 0
                self.changes.remove(block_hash)
            if self._references[block] == 0 and block in self._free:
                self._free.move_to_end(block, last=False)
