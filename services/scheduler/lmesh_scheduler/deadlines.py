"""When requests must have ended: a heap of times, swept of those that ended before."""

from __future__ import annotations

import heapq
import math

from lmesh_scheduler.requests import Request, State

SWEEP_FROM = 1024  # below this many entries a sweep is not worth its while


class Deadlines:
    """The next requests to expire, without looking at the others."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []
        self._entries = 0  # ever added; orders equal times
        self._sweep_at = SWEEP_FROM

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, request: Request) -> None:
        """Watches a request's deadline and queue deadline, as far as it has them."""
        for when in {request.deadline, min(request.deadline, request.queue_deadline)} - {math.inf}:
            self._entries += 1
            heapq.heappush(self._heap, (when, self._entries, request))
        if len(self._heap) > self._sweep_at:
            self._sweep()

    def due(self, now: float) -> list[Request]:
        """Takes the live requests that are overdue at `now`, each once."""
        found: dict[str, Request] = {}
        while self._heap and self._heap[0][0] <= now:
            request = heapq.heappop(self._heap)[2]
            if request.live and _overdue(request, now):
                found[request.id] = request
        return list(found.values())

    def _sweep(self) -> None:
        """Most requests end long before their deadline: what is kept of them must not pile up."""
        self._heap = [entry for entry in self._heap if entry[2].live]
        heapq.heapify(self._heap)
        self._sweep_at = max(SWEEP_FROM, 2 * len(self._heap))


def _overdue(request: Request, now: float) -> bool:
    return now >= request.deadline or (request.state is State.QUEUED and now >= request.queue_deadline)
