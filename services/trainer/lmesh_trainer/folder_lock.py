"""One process at a time trains in a folder: a lock that ends with its process, however that ends."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WAIT_S = 60.0  # an earlier process that lost its server leaves at its next step
_POLL_S = 0.1


class JobBusyError(RuntimeError):
    """Another process did not leave the folder in time."""


@contextmanager
def own_folder(folder: Path, *, wait_s: float = WAIT_S) -> Iterator[None]:
    """Holds `folder/lock`, exclusively, waiting up to `wait_s` seconds for whoever has it. Raises JobBusyError."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    with (folder / "lock").open("ab") as file:
        while not _taken(file.fileno()):
            if time.monotonic() > deadline:
                raise JobBusyError(f"another process has trained in {folder} for {wait_s:g} s and does not leave")
            time.sleep(_POLL_S)
        yield


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
