"""What can be wrong with a dataset, each with the line where it is."""

from __future__ import annotations


class DatasetError(ValueError):
    """A dataset that cannot be used as it is; `reason` is UPPER_SNAKE, the message says what would be right."""

    def __init__(self, reason: str, message: str, *, line: int | None = None) -> None:
        super().__init__(message if line is None else f"line {line}: {message}")
        self.reason = reason
        self.line = line
