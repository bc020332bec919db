"""Processes by pid and birth, so that a recycled pid is never taken for one of ours."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import psutil  # type: ignore[import-untyped]


def birth(pid: int) -> str | None:
    """A mark of the process's start, unique on this machine together with `pid`; None when it is not alive."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return _start_ticks(pid) or f"{process.create_time():.2f}"
    except psutil.Error:
        return None


def is_alive(pid: int, born: str) -> bool:
    """Whether the process that had this pid and birth is still alive."""
    return pid > 0 and birth(pid) == born


def signal_group(pid: int, number: signal.Signals) -> None:
    """Signals the process group that `pid` leads; nothing happens when it is gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _start_ticks(pid: int) -> str | None:
    # Ticks since boot do not move when the clock is set, unlike the wall time that psutil computes from them.
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    return f"{boot}/{stat.rpartition(')')[2].split()[19]}"
