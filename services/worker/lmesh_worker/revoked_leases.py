"""Leases that the scheduler took back, remembered for starts that were on their way under them."""

from __future__ import annotations

from collections.abc import Iterable

_MOST = 8192  # a start arrives within the grace period of its gateway, long before as many others are revoked


class RevokedLeases:
    """The latest of them, oldest first. Leases are never granted twice, so none has to be forgotten early."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._leases: dict[int, None] = {}

    def __contains__(self, lease: int) -> bool:
        return lease in self._leases

    def add(self, leases: Iterable[int]) -> None:
        """Remembers them."""
        self._leases |= dict.fromkeys(leases)
        while len(self._leases) > self._most:
            del self._leases[next(iter(self._leases))]
