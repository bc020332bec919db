"""One sequence (one choice of one request) as the engine sees it."""

from __future__ import annotations

import time
from enum import Enum, auto

from lmesh_kernels.blocks import block_hash

from lmesh_worker.messages import Finish, Params, Start


class State(Enum):
    """Where a sequence is."""

    WAITING = auto()  # holds no blocks
    RUNNING = auto()  # holds blocks and a slot
    ENDED = auto()


class Sequence:
    """A sequence's ids, blocks and progress. The batcher writes it; runner and commit read and append."""

    __slots__ = (
        "adapter",
        "blocks",
        "cached_tokens",
        "choice",
        "computed",
        "counted",
        "first_output_at",
        "first_scheduled_at",
        "hashes",
        "ids",
        "key",
        "most",
        "order",
        "params",
        "pending",
        "preemptions",
        "priority",
        "prompt_len",
        "prompt_logprobs",
        "registered",
        "request_id",
        "rollbacks",
        "root",
        "slot",
        "started_at",
        "state",
        "stop_ids",
        "tenure",
    )

    def __init__(self, start: Start, root: bytes, order: int) -> None:
        self.key = start.key
        self.request_id = start.request_id
        self.choice = start.choice
        self.adapter = start.adapter
        self.ids = list(start.ids)  # known ids: the prompt, then what was sampled and read back
        self.prompt_len = start.prompt_len
        self.params: Params = start.params
        # max_tokens 0 only scores the prompt; the id that its last position gives is not reported.
        self.most = start.prompt_len + max(1, start.params.max_tokens)  # ids at its end, if nothing stops it
        self.stop_ids = frozenset(start.params.stop_token_ids)
        self.priority = start.priority
        self.order = order  # of arrival
        self.root = root  # parent of the first block's hash
        self.hashes: list[bytes] = []  # of full blocks, as far as they were needed
        self.registered = 0  # blocks, from the first, that are findable or have a findable twin
        self.state = State.WAITING
        self.blocks: list[int] = []
        self.tenure = -1  # its slot's owner has a number of its own, each time that it gets one
        self.slot = -1  # row of the device's per-sequence tensors
        self.computed = 0  # tokens whose K and V are written or will be by a launched step
        self.counted = False  # since it was admitted: the logit tables have its row
        self.pending = 0  # sampled ids that are still on the device
        self.rollbacks = 0  # outputs launched before the last rollback are void
        self.preemptions = 0
        self.cached_tokens = 0  # prompt tokens found in the cache at the first admission
        self.prompt_logprobs: tuple[list[float], list[int], list[float]] = ([], [], [])
        self.started_at = time.monotonic()
        self.first_scheduled_at = 0.0
        self.first_output_at = 0.0

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller goes first."""
        return self.priority, self.order

    @property
    def length(self) -> int:
        """Ids so far, those on the device included."""
        return len(self.ids) + self.pending

    @property
    def uncomputed(self) -> int:
        """Tokens to run before the next id can be sampled."""
        return len(self.ids) + self.pending - self.computed

    def saturated(self, max_model_len: int) -> bool:
        """Whether what is launched already reaches the last id that may be sampled."""
        length = len(self.ids) + self.pending
        return length >= self.most or length >= max_model_len

    def end(self, max_model_len: int) -> Finish | None:
        """How the ids read back end it, STOP or LENGTH; None while another may be sampled."""
        new = len(self.ids) - self.prompt_len
        if new and self.ids[-1] in self.stop_ids:
            return Finish.STOP
        return Finish.LENGTH if new >= self.params.max_tokens or len(self.ids) >= max_model_len else None

    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt positions still need their logits."""
        return self.params.prompt_logprobs >= 0 and self.first_output_at == 0.0

    def full_block_hash(self, index: int, block_size: int) -> bytes:
        """The hash of the index-th block, all of whose ids are known."""
        while len(self.hashes) <= index:
            begin = len(self.hashes) * block_size
            parent = self.hashes[-1] if self.hashes else self.root
            self.hashes.append(block_hash(parent, self.ids[begin : begin + block_size]))
        return self.hashes[index]
