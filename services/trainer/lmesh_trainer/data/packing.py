"""Rows into microbatches of at most so many tokens, fewest first; every row whole and once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar


class Sized(Protocol):
    """What has token ids."""

    @property
    def ids(self) -> Sequence[int]:
        """Token ids."""


R = TypeVar("R", bound=Sized)


def pack(rows: Sequence[R], max_tokens: int) -> list[list[R]]:
    """Best fit, longest first: each row into the fullest pack that still takes it, or into a new one.

    A row longer than `max_tokens` has a pack to itself. The same rows give the same packs, in a fixed order: at most
    11/9 of the fewest possible, and one more (Johnson 1974).
    """
    packs: list[tuple[int, list[R]]] = []
    longest_first = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    for index in longest_first:
        size = len(rows[index].ids)
        room = [(max_tokens - used - size, at) for at, (used, _) in enumerate(packs) if used + size <= max_tokens]
        if room:
            _, at = min(room)
            used, members = packs[at]
            packs[at] = (used + size, [*members, rows[index]])
        else:
            packs.append((size, [rows[index]]))
    return [members for _, members in packs]
