"""When a service that died is started again, and when it is given up."""

from __future__ import annotations

# A service exits with this status when its settings are wrong: at its first start trying again cannot help.
BAD_SETTINGS_STATUS = 2


class RestartPolicy:
    """Delays that double from `first_s` to `most_s`; gives up after `limit` deaths in a row.

    A life of at least `steady_s` wipes the slate. A service that has never been ready gets only `first_limit` more
    tries, so that a mesh that cannot work fails soon.
    """

    def __init__(
        self,
        *,
        first_s: float = 0.1,
        most_s: float = 15.0,
        limit: int = 6,
        first_limit: int = 2,
        steady_s: float = 60.0,
    ) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._limit = limit
        self._first_limit = first_limit
        self._steady_s = steady_s
        self._deaths = 0
        self._was_ready = False

    @property
    def deaths(self) -> int:
        """Deaths in a row."""
        return self._deaths

    def after_death(self, *, status: int, lived_s: float, ready: bool) -> float | None:
        """Seconds until the next start, or None to give up; `ready` says whether this life got as far as serving."""
        self._was_ready = self._was_ready or ready
        if ready and lived_s >= self._steady_s:
            self._deaths = 0
        self._deaths += 1
        if status == BAD_SETTINGS_STATUS and not self._was_ready:
            return None
        if self._deaths > (self._limit if self._was_ready else self._first_limit):
            return None
        return min(self._most_s, self._first_s * 2.0 ** (self._deaths - 1))
