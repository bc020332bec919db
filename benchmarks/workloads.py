"""Token-id workloads with fixed lengths and fresh ids for every run: W1-W3 for a CPU, G1-G4 for a GPU.

Every output length is reached exactly (end of sequence ignored, greedy), and all requests of a
workload are submitted at once. Fresh ids keep one run from being served by the cache of another.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

# Plain text tokens of SmolLM2's vocabulary (49,152 entries); the first thousand hold the special ones.
FIRST_ID, LAST_ID = 1_000, 48_000
# Of the G workloads: ids that every model with random weights has.
GPU_IDS = (100, 10_000)
_UNIFORM = re.compile(r"(\d+)x(\d+)\+(\d+)")


@dataclass(frozen=True, slots=True)
class Job:
    """One request: its prompt ids and the number of new tokens."""

    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Ids:
    """Draws token ids from [first, last)."""

    rng: random.Random
    first: int = FIRST_ID
    last: int = LAST_ID

    def __call__(self, count: int) -> tuple[int, ...]:
        """`count` ids."""
        return tuple(self.rng.randrange(self.first, self.last) for _ in range(count))


def _even(low: int, high: int, count: int) -> list[int]:
    return [round(low + (high - low) * i / (count - 1)) for i in range(count)]


def one_stream(ids: Ids) -> list[Job]:
    """W1: one request, 128 in, 128 out."""
    return [Job(ids(128), 128)]


def ragged(ids: Ids) -> list[Job]:
    """W2: 32 requests, prompts and outputs each spread evenly over 32-256 tokens (4,608 in, 4,608 out)."""
    lengths = random.Random(12_345)  # the same pairing in every run
    prompts, outputs = _even(32, 256, 32), _even(32, 256, 32)
    lengths.shuffle(prompts)
    lengths.shuffle(outputs)
    return [Job(ids(p), o) for p, o in zip(prompts, outputs, strict=True)]


def shared_prefix(ids: Ids) -> list[Job]:
    """W3: 32 requests that share 512 tokens and have 32 of their own, 32 out each (17,408 in, 1,024 out)."""
    prefix = ids(512)
    return [Job(prefix + ids(32), 32) for _ in range(32)]


def gpu_ragged(ids: Ids) -> list[Job]:
    """G1: 256 requests, prompts and outputs drawn from 100-1,024 tokens (144,831 in, 144,160 out)."""
    lengths = random.Random(0)  # of all prompts first, then of all outputs; the same in every run
    prompts = [lengths.randint(100, 1024) for _ in range(256)]
    return [Job(ids(p), lengths.randint(100, 1024)) for p in prompts]


def gpu_one_stream(ids: Ids) -> list[Job]:
    """G2: one request, 512 in, 256 out."""
    return [Job(ids(512), 256)]


def gpu_shared_prefix(ids: Ids) -> list[Job]:
    """G3: 64 requests that share 4,096 tokens and have 128 of their own, 64 out each."""
    prefix = ids(4096)
    return [Job(prefix + ids(128), 64) for _ in range(64)]


def gpu_long_prompts(ids: Ids) -> list[Job]:
    """G4: 8 requests of 8,192 tokens, 16 out each."""
    return [Job(ids(8192), 16) for _ in range(8)]


WORKLOADS: dict[str, Callable[[Ids], list[Job]]] = {
    "W1": one_stream,
    "W2": ragged,
    "W3": shared_prefix,
}
GPU_WORKLOADS: dict[str, Callable[[Ids], list[Job]]] = {
    "G1": gpu_ragged,
    "G2": gpu_one_stream,
    "G3": gpu_shared_prefix,
    "G4": gpu_long_prompts,
}


def make(name: str, run: int, *, vocab: int = LAST_ID) -> list[Job]:
    """The jobs of workload `name` for run number `run` (the same for every system measured).

    Besides W1-W3 and G1-G4 a name may be like 64x512+256: so many requests, tokens in and tokens out. `vocab` bounds
    the ids. ValueError for a name that is none of these.
    """
    rng = random.Random(1_000 + run)
    if name in WORKLOADS:
        return WORKLOADS[name](Ids(rng))
    ids = Ids(rng, min(GPU_IDS[0], vocab // 2), min(GPU_IDS[1], vocab))
    if name in GPU_WORKLOADS:
        return GPU_WORKLOADS[name](ids)
    uniform = _UNIFORM.fullmatch(name)
    if uniform is None:
        known = ", ".join([*WORKLOADS, *GPU_WORKLOADS])
        raise ValueError(f"workload {name!r}: write one of {known}, or like 64x512+256")
    count, prompt, new = map(int, uniform.groups())
    return [Job(ids(prompt), new) for _ in range(count)]


def warm_up() -> list[Job]:
    """Small jobs that touch the shapes of the real ones: single rows, a batch, a long prompt."""
    ids = Ids(random.Random(7))
    return [Job(ids(16), 8), *(Job(ids(24 + 8 * i), 4) for i in range(8))]
