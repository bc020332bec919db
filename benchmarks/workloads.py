"""The CPU workloads W1-W3: token-id requests with fixed lengths and fresh ids for every run.

Every output length is reached exactly (end of sequence ignored, greedy), and all requests of a
workload are submitted at once. Fresh ids keep one run from being served by the cache of another.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

# Plain text tokens of SmolLM2's vocabulary (49,152 entries); the first thousand hold the special ones.
FIRST_ID, LAST_ID = 1_000, 48_000


@dataclass(frozen=True, slots=True)
class Job:
    """One request: its prompt ids and the number of new tokens."""

    prompt: tuple[int, ...]
    new_tokens: int


def _ids(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(FIRST_ID, LAST_ID) for _ in range(count))


def _even(low: int, high: int, count: int) -> list[int]:
    return [round(low + (high - low) * i / (count - 1)) for i in range(count)]


def one_stream(rng: random.Random) -> list[Job]:
    """W1: one request, 128 in, 128 out."""
    return [Job(_ids(rng, 128), 128)]


def ragged(rng: random.Random) -> list[Job]:
    """W2: 32 requests, prompts and outputs each spread evenly over 32-256 tokens (4,608 in, 4,608 out)."""
    lengths = random.Random(12_345)  # the same pairing in every run
    prompts, outputs = _even(32, 256, 32), _even(32, 256, 32)
    lengths.shuffle(prompts)
    lengths.shuffle(outputs)
    return [Job(_ids(rng, p), o) for p, o in zip(prompts, outputs, strict=True)]


def shared_prefix(rng: random.Random) -> list[Job]:
    """W3: 32 requests that share 512 tokens and have 32 of their own, 32 out each (17,408 in, 1,024 out)."""
    prefix = _ids(rng, 512)
    return [Job(prefix + _ids(rng, 32), 32) for _ in range(32)]


WORKLOADS: dict[str, Callable[[random.Random], list[Job]]] = {
    "W1": one_stream,
    "W2": ragged,
    "W3": shared_prefix,
}


def make(name: str, run: int) -> list[Job]:
    """The jobs of workload `name` for run number `run` (the same for every system measured)."""
    return WORKLOADS[name](random.Random(1_000 + run))


def warm_up() -> list[Job]:
    """Small jobs that touch the shapes of the real ones: single rows, a batch, a long prompt."""
    rng = random.Random(7)
    return [Job(_ids(rng, 16), 8), *(Job(_ids(rng, 24 + 8 * i), 4) for i in range(8))]
