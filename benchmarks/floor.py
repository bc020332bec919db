"""The least time that a workload can take on a device: what must be moved, and what must be computed.

    floor_s = max(bytes / copy rate, operations / product rate)

bytes       weights once a step, with the fewest steps there can be (the longest output of all: everything runs at
            once), and for each new token the keys and values before it, once; a prefix that all requests share is
            read once a step for all of them.
operations  2 x weights of the layers for each token that must be computed (a shared prefix once), 2 x head for each
            new token, and the attention's 4 x query width x layers for each token and token before it.

For one stream the first term is weights x new tokens / copy rate: the decode floor.
A true bound and not a forecast: no engine is below it, and where one phase is bound by memory and the other by
arithmetic, as G1 is, the best one stays above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from card import Card
from lmesh_kernels.models.config import ModelConfig
from lmesh_kernels.models.footprint import parameter_bytes
from workloads import Job


@dataclass(frozen=True, slots=True)
class Work:
    """What a workload needs at least."""

    bytes_moved: int
    operations: int

    def seconds(self, card: Card) -> float:
        """On a device."""
        return max(self.bytes_moved / card.copy_bytes_s, self.operations / card.flop_s)


def least_work(model: ModelConfig, jobs: Sequence[Job], dtype: torch.dtype) -> Work:
    """The least work of all jobs together, submitted at once."""
    shared = _shared_prefix(jobs)
    steps = max(job.new_tokens for job in jobs)
    own = [len(job.prompt) - shared for job in jobs]
    computed = shared + sum(n + job.new_tokens - 1 for n, job in zip(own, jobs, strict=True))
    new = sum(job.new_tokens for job in jobs)
    pairs = _triangle(0, shared) + sum(_triangle(shared, len(job.prompt) + job.new_tokens - 1 - shared) for job in jobs)
    kv_token = 2 * model.num_layers * model.kv_size * dtype.itemsize
    read = shared * (steps - 1) + sum(_triangle(n, job.new_tokens - 1) for n, job in zip(own, jobs, strict=True))
    return Work(
        bytes_moved=steps * weight_bytes(model, dtype) + read * kv_token,
        operations=2 * computed * _layer_weights(model)
        + 2 * new * model.vocab_size * model.hidden_size
        + 4 * pairs * model.q_size * model.num_layers,
    )


def weight_bytes(model: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of weights that a step reads: all but the rotation table and, of an untied embedding, the other rows."""
    rotations = model.max_position_embeddings * model.head_dim * 4
    untied = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size * dtype.itemsize
    return parameter_bytes(model, dtype) - rotations - untied


def _layer_weights(model: ModelConfig) -> int:
    attention = model.hidden_size * (2 * model.q_size + 2 * model.kv_size)
    return model.num_layers * (attention + 3 * model.hidden_size * model.intermediate_size)


def _triangle(before: int, count: int) -> int:
    """Pairs of a token and one that it sees, of `count` tokens after `before`."""
    return count * before + count * (count + 1) // 2


def _shared_prefix(jobs: Sequence[Job]) -> int:
    """Tokens with which all prompts begin, a whole prompt never; 0 for one request alone."""
    if len(jobs) < 2:
        return 0
    shortest = min(len(job.prompt) for job in jobs) - 1
    first = jobs[0].prompt
    differing = (next((i for i in range(shortest) if job.prompt[i] != first[i]), shortest) for job in jobs[1:])
    return min(differing, default=0)
