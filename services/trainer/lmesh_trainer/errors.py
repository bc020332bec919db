"""What can go wrong with a job, each by an UPPER_SNAKE reason."""

from __future__ import annotations

import errno

DOMAIN = "lmesh.trainer"

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class JobError(ValueError):
    """A job that cannot run, or cannot go on; the message says which setting or file, and what would be right."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type[JobError], tuple[str, str]]:
        return type(self), (self.reason, self.message)  # between ranks


def disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of room; safetensors says so in words only."""
    told = any(f"os error {number}" in str(error) for number in _FULL)
    return told or (isinstance(error, OSError) and error.errno in _FULL)


def unforeseen(error: Exception) -> JobError:
    """What ended a job at its edge, by name."""
    reason = "DISK_FULL" if disk_full(error) else "JOB_FAILED"
    return JobError(reason, f"{type(error).__name__}: {error}")
