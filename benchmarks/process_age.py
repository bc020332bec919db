"""How long ago this process began, or the command that became it."""

from __future__ import annotations

import os
import time
from pathlib import Path

BEGAN = "LMESH_BENCH_BEGAN"  # CLOCK_MONOTONIC seconds, which all processes of a machine share


def now() -> float:
    """Seconds by the clock that `BEGAN` is in."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def process_age_s() -> float:
    """Seconds since the time that $LMESH_BENCH_BEGAN tells, else since the kernel started this process."""
    told = os.environ.get(BEGAN)
    if told:
        return now() - float(told)
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # the 22nd field of all: ticks after boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started
