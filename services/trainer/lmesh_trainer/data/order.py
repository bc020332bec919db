"""Which rows come next, a function of seed and epoch: a permutation, a stream's draws, and a fixed share held out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import TypeVar

T = TypeVar("T")


def _draw(seed: int, *parts: int) -> bytes:
    return blake2b("/".join(map(str, (seed, *parts))).encode(), digest_size=8).digest()


@lru_cache(maxsize=2)  # every step of an epoch asks for it
def epoch_order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    """A permutation of range(count): rows sorted by a hash of (seed, epoch, row), the same on every machine."""
    return tuple(sorted(range(count), key=lambda row: (_draw(seed, epoch, row), row)))


def drawn_index(seed: int, epoch: int, draw: int, count: int) -> int:
    """Which of `count` rows a stream's draw number `draw` of an epoch takes; 64 bits over `count` are even enough."""
    return int.from_bytes(_draw(seed, epoch, draw)) % count


def held_out(seed: int, rows: Sequence[T], count: int) -> tuple[list[T], list[T]]:
    """(kept, held out): `count` rows chosen by a hash of (seed, row), both in their own order.

    ValueError unless something is kept.
    """
    if not 0 <= count < len(rows):
        raise ValueError(f"of {len(rows)} rows at most {len(rows) - 1} can be held out, not {count}")
    chosen = set(sorted(range(len(rows)), key=lambda row: (_draw(seed, -1, row), row))[:count])
    kept = [row for number, row in enumerate(rows) if number not in chosen]
    return kept, [rows[number] for number in sorted(chosen)]
