"""Waiting between attempts: exponential with full jitter, so that peers do not come back in step."""

from __future__ import annotations

import random


class Backoff:
    """Delays before the next attempts; `reset` after one that worked."""

    def __init__(self, *, first_s: float = 0.1, most_s: float = 0.3) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._attempts = 0

    def reset(self) -> None:
        """Starts over with the shortest delay."""
        self._attempts = 0

    def next_s(self) -> float:
        """Seconds to wait now: between half of and the whole of a delay that doubles up to `most_s`."""
        # The exponent is capped: 2**attempts of a link that was down for a week is no float.
        ceiling = min(self._most_s, self._first_s * 2.0 ** min(self._attempts, 30))
        self._attempts += 1
        return ceiling * (0.5 + random.random() / 2)
