"""What can go wrong with a job, each by an UPPER_SNAKE reason."""

from __future__ import annotations

DOMAIN = "lmesh.trainer"


class JobError(ValueError):
    """A job that cannot run, or cannot go on; the message says which setting or file, and what would be right."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type[JobError], tuple[str, str]]:
        return type(self), (self.reason, self.message)  # between ranks
