"""Log files of the services: appended to by them, kept small by the supervisor."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import BinaryIO

MAX_BYTES = 16 * 2**20


def open_append(path: Path) -> BinaryIO:
    """A file for a child's output. Append mode is what lets `bound` shorten it under a running child."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("ab")


def bound(path: Path, max_bytes: int = MAX_BYTES) -> bool:
    """Moves a log that has grown over `max_bytes` to `<name>.1`, the previous one's place; True if it did.

    The file is copied and truncated, not renamed, because its writer keeps it open. Lines written in between are lost.
    """
    if not path.exists() or path.stat().st_size <= max_bytes:
        return False
    shutil.copyfile(path, path.with_name(path.name + ".1"))
    with path.open("r+b") as file:
        file.truncate(0)
    return True


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log; empty when there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 64 * 1024))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
