"""Whether the engine makes progress: work that waits, against steps that are committed."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import IntEnum

from lmesh_worker.messages import Progress


class Verdict(IntEnum):
    """What the worker says of itself; the numbers are those of lmesh.scheduler.v1.Progress."""

    OK = 1
    COMPILING = 2
    STUCK = 3


class Watchdog:
    """Stuck means: work has been waiting for longer than the bound, and no step was committed in that time.

    Taking the work away does not mend a stuck engine: it stays stuck until it is heard of again.
    """

    def __init__(self, *, bound_s: float, compile_bound_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._bound_s = bound_s
        self._compile_bound_s = compile_bound_s
        self._clock = clock
        self._steps = 0
        self._compiling = False
        self._working = False
        self._stuck = False
        self._last_sign = clock()

    def step(self, steps: int) -> None:
        """The engine reported; `steps` is its count of committed ones."""
        self._stuck = False
        if steps != self._steps:
            self._steps = steps
            self._last_sign = self._clock()

    def progress(self, progress: int) -> None:
        """The engine entered or left a phase without steps; the bound starts anew."""
        self._stuck = False
        self._compiling = progress == Progress.COMPILING
        self._last_sign = self._clock()

    def verdict(self, live: int) -> Verdict:
        """The state now, with `live` sequences in the engine; to be asked more often than the bound."""
        if not live:
            self._working = False
            return Verdict.STUCK if self._stuck else self._well()
        if not self._working:  # work has just come to an idle engine: its time starts now
            self._working = True
            self._last_sign = self._clock()
        waited = self._clock() - self._last_sign
        self._stuck = self._stuck or waited > (self._compile_bound_s if self._compiling else self._bound_s)
        return Verdict.STUCK if self._stuck else self._well()

    def _well(self) -> Verdict:
        return Verdict.COMPILING if self._compiling else Verdict.OK
