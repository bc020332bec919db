"""What a run has to report: numbered without a gap, kept until the scheduler has taken it, bounded."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass

from lmesh_trainer.events import Reported, StepDone

_log = logging.getLogger(__name__)

MOST_UNACKED = 1024  # numbered and sent; the rest waits without a number


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One event of a run."""

    seq: int  # from 1
    time_ns: int  # since 1970, when it happened
    event: Reported


class Outbox:
    """The reports of one lease.

    Events get their numbers only when they are first sent, so that some can still be left out while nobody hears: of
    more than `most_waiting` the oldest steps go, and nothing else ever does. What is left then is bounded by a job's
    evaluations and checkpoints.
    """

    def __init__(self, most_waiting: int = 100_000) -> None:
        self._most_waiting = most_waiting
        self._waiting: deque[tuple[int, Reported]] = deque()
        self._unacked: deque[Report] = deque()
        self._sent = 0  # of `_unacked`, on the present stream
        self._numbered = 0
        self.left_out = 0

    def add(self, event: Reported) -> None:
        """Something happened, now."""
        self._waiting.append((time.time_ns(), event))
        if len(self._waiting) > self._most_waiting:
            self._leave_out()

    def _leave_out(self) -> None:
        for at, (_, event) in enumerate(self._waiting):
            if isinstance(event, StepDone):
                del self._waiting[at]
                if not self.left_out:
                    _log.warning("reports wait for a scheduler: the oldest steps are left out")
                self.left_out += 1
                return

    def next(self) -> Report | None:
        """The next report to send on the present stream, if there is one and the scheduler is not too far behind."""
        if self._sent == len(self._unacked):
            if not self._waiting or len(self._unacked) == MOST_UNACKED:
                return None
            self._numbered += 1
            time_ns, event = self._waiting.popleft()
            self._unacked.append(Report(seq=self._numbered, time_ns=time_ns, event=event))
        self._sent += 1
        return self._unacked[self._sent - 1]

    def restart(self) -> None:
        """A new stream: what was not acknowledged is sent again."""
        self._sent = 0

    def acked(self, seq: int) -> None:
        """The scheduler has taken everything up to `seq`."""
        while self._unacked and self._unacked[0].seq <= seq:
            self._unacked.popleft()
            self._sent = max(0, self._sent - 1)

    @property
    def pending(self) -> int:
        """Reports that the scheduler has not acknowledged."""
        return len(self._waiting) + len(self._unacked)

    @property
    def empty(self) -> bool:
        """Whether the scheduler has all of it."""
        return not self._waiting and not self._unacked
