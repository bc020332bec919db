"""What can go wrong with an artifact."""

from __future__ import annotations


class ArtifactError(Exception):
    """`reason` is UPPER_SNAKE: UNKNOWN_ARTIFACT, CORRUPT_ARTIFACT, STORE_FULL, BAD_UPLOAD or BAD_NAME."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
