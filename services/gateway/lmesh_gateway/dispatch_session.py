"""What this gateway has with the scheduler: submitted requests, what is to be said, what a broken link costs."""

from __future__ import annotations

import logging
from collections import OrderedDict
from dataclasses import dataclass, field

from lmesh_chassis.errors import ServiceError

from lmesh_gateway.errors import (
    CancelledError,
    DeadlineExceededError,
    DrainingError,
    DuplicateRequestIdError,
    InvalidArgumentError,
    ModelNotFoundError,
    NoWorkerError,
    QueueFullError,
    QueueTimeoutError,
    SchedulerUnavailableError,
    WorkerLostError,
)
from lmesh_gateway.placement import Leg, Outcome, PlacementListener, Report
from lmesh_gateway.plan import Plan

_log = logging.getLogger(__name__)

_REFUSALS: dict[str, type[ServiceError]] = {
    error.reason: error
    for error in (
        QueueFullError,
        ModelNotFoundError,
        NoWorkerError,
        DuplicateRequestIdError,
        DrainingError,
        InvalidArgumentError,
    )
}
# Prompt ids in one batch; at up to 5 bytes an id this stays well below the message size limit.
_MAX_IDS = 1_000_000
_ENDED_KEPT = 4096
_RETRY_MS = 1000


@dataclass(slots=True, eq=False)
class Submitted:
    """One live request; `said_again` after it was submitted on a second stream."""

    plan: Plan
    listener: PlacementListener
    sent: bool = False
    said_again: bool = False
    leg: Leg | None = None


@dataclass(slots=True, eq=False)
class Ended:
    """A request that ended here; `stream` is the one that its report went out on, 0 before."""

    report: Report | None
    stream: int = 0


@dataclass(slots=True, kw_only=True)
class DispatchBatch:
    """What goes to the scheduler in one message."""

    submits: list[Plan] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)
    started: list[tuple[str, int]] = field(default_factory=list)
    finished: list[Report] = field(default_factory=list)
    workers_lost: list[tuple[str, str]] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Nothing to say."""
        return not (self.submits or self.cancels or self.started or self.finished or self.workers_lost)


class DispatchSession:
    """Pure bookkeeping, no sockets.

    After a break the scheduler tells each live request's standing again, so repeats are ignored; what was on its way
    up is said again.
    """

    def __init__(self) -> None:
        self._live: dict[str, Submitted] = {}
        self._ended: OrderedDict[str, Ended] = OrderedDict()
        self._stream = 0  # how many streams there were
        self._outbox = DispatchBatch()
        self._writing = DispatchBatch()

    def live(self, request_id: str) -> Submitted | None:
        """The live request of that id in this gateway."""
        return self._live.get(request_id)

    def ended_lately(self, request_id: str) -> bool:
        """Whether a request of that id ended in this gateway, as far as that is remembered."""
        return request_id in self._ended

    def submit(self, plan: Plan, listener: PlacementListener) -> None:
        """Asks for admission; DuplicateRequestIdError when the id is live here."""
        if plan.request_id in self._live:
            raise DuplicateRequestIdError(f"request id {plan.request_id} is live; choose another", field="request_id")
        self._live[plan.request_id] = Submitted(plan, listener)
        self._outbox.submits.append(plan)

    def withdraw(self, request_id: str) -> None:
        """A request that was not placed is no longer wanted."""
        entry = self._forget(request_id, None)
        if entry is None:
            return
        self._unsay(entry.plan)
        if entry.sent:
            self._outbox.cancels.append(request_id)

    def cancel(self, request_id: str) -> None:
        """Cancels a request of another gateway."""
        self._outbox.cancels.append(request_id)

    def started(self, request_id: str, lease: int) -> None:
        """The first output of a request has come."""
        self._outbox.started.append((request_id, lease))

    def finished(self, report: Report) -> None:
        """A placed request has ended."""
        if self._forget(report.request_id, report) is not None:
            self._outbox.finished.append(report)

    def worker_lost(self, worker_id: str, epoch: str) -> None:
        """A Run link was given up."""
        self._outbox.workers_lost.append((worker_id, epoch))

    def collect(self) -> DispatchBatch | None:
        """The next batch, or None. Asking for it says that the one before has been written."""
        whole, self._outbox = self._outbox, DispatchBatch()
        budget, count = _MAX_IDS, 0
        while count < len(whole.submits) and budget > 0:
            budget -= len(whole.submits[count].prompt_ids)
            count += 1
        self._outbox.submits, whole.submits = whole.submits[count:], whole.submits[:count]
        for plan in whole.submits:
            self._live[plan.request_id].sent = True
        for report in whole.finished:
            if (ended := self._ended.get(report.request_id)) is not None:
                ended.stream = self._stream
        self._writing = whole
        return None if whole.empty else whole

    def connected(self) -> None:
        """A stream is up."""
        self._stream += 1
        waiting = {plan.request_id for plan in self._outbox.submits}
        for request_id, entry in self._live.items():
            if entry.leg is None and request_id not in waiting:
                entry.said_again = True
                self._outbox.submits.append(entry.plan)

    def broken(self) -> None:
        """The stream is gone: what was being written may not have arrived."""
        lost, self._writing = self._writing, DispatchBatch()
        self._outbox.cancels[:0] = lost.cancels
        self._outbox.started[:0] = lost.started
        self._outbox.finished[:0] = lost.finished
        self._outbox.workers_lost[:0] = lost.workers_lost

    def give_up(self) -> None:
        """The scheduler stayed away: what is not placed ends; what runs goes on."""
        for request_id, entry in list(self._live.items()):
            if entry.leg is None:
                error = SchedulerUnavailableError("the scheduler cannot be reached", retry_after_ms=_RETRY_MS)
                self._end(request_id, error, Outcome.FAILED)

    def on_queued(self, request_id: str) -> None:
        """The scheduler admitted a request."""
        entry = self._live.get(request_id)
        if entry is not None:
            entry.listener.on_admitted()

    def on_placed(self, request_id: str, leg: Leg) -> None:
        """The scheduler placed a request."""
        entry = self._live.get(request_id)
        if entry is None:
            self._report_again(request_id, leg)
        elif entry.leg is None:
            entry.leg = leg
            entry.listener.on_placed(leg)
        elif entry.leg.lease != leg.lease:
            _log.error("a second placement", extra={"request_id": request_id, "lease": leg.lease})

    def _report_again(self, request_id: str, leg: Leg) -> None:
        """Placed, and ended here: the report was lost, or the withdrawal crossed the placement."""
        ended = self._ended.get(request_id)
        if ended is None or ended.report is None or ended.report.lease != leg.lease:
            ended = Ended(Report(request_id=request_id, lease=leg.lease, outcome=Outcome.CANCELLED))
            self._remember(request_id, ended)
        assert ended.report is not None
        if ended.stream != self._stream and ended.report not in self._outbox.finished:
            self._outbox.finished.append(ended.report)

    def on_revoked(self, request_id: str, lease: int, reason: str) -> None:
        """The scheduler took a lease back, or ended a queued request."""
        entry = self._live.get(request_id)
        if entry is None or (entry.leg is not None and lease not in (0, entry.leg.lease)):
            return
        outcome = Outcome.CANCELLED if reason == "CANCELLED" else Outcome.FAILED
        self._end(request_id, _revocation(reason), outcome)

    def on_expired(self, request_id: str, queued: bool) -> None:
        """A deadline passed."""
        if queued:
            error: ServiceError = QueueTimeoutError("no worker took the request in time", retry_after_ms=_RETRY_MS)
        else:
            error = DeadlineExceededError("the request's deadline passed")
        self._end(request_id, error, Outcome.EXPIRED)

    def on_refused(self, request_id: str, reason: str, message: str, retry_after_ms: int) -> None:
        """The scheduler did not admit a request."""
        entry = self._live.get(request_id)
        if entry is None or (entry.said_again and reason == DuplicateRequestIdError.reason):
            return  # what it has is the very request that we said again
        error = _REFUSALS.get(reason, SchedulerUnavailableError)
        self._end(request_id, error(message, retry_after_ms=retry_after_ms or None), Outcome.FAILED)

    def _end(self, request_id: str, error: ServiceError, outcome: Outcome) -> None:
        entry = self._live.get(request_id)
        if entry is None:
            return
        if entry.leg is None:
            self._forget(request_id, None)
            self._unsay(entry.plan)
        entry.listener.on_ended(error, outcome)

    def _unsay(self, plan: Plan) -> None:
        """Takes back a submission, the first or a repeated one, that has not gone out yet."""
        self._outbox.submits = [waiting for waiting in self._outbox.submits if waiting is not plan]

    def _forget(self, request_id: str, report: Report | None) -> Submitted | None:
        entry = self._live.pop(request_id, None)
        if entry is not None:
            self._remember(request_id, Ended(report))
        return entry

    def _remember(self, request_id: str, ended: Ended) -> None:
        self._ended[request_id] = ended
        self._ended.move_to_end(request_id)
        while len(self._ended) > _ENDED_KEPT:
            self._ended.popitem(last=False)


def _revocation(reason: str) -> ServiceError:
    if reason == "CANCELLED":
        return CancelledError("the request was cancelled")
    if reason == "DRAINING":
        return DrainingError("the worker is leaving; try again", retry_after_ms=_RETRY_MS)
    if reason == "MODEL_NOT_FOUND":
        return ModelNotFoundError("the last worker that served the model has left", field="model")
    if reason == "GATEWAY_LOST":
        text = "this gateway had no scheduler for too long; try again"
        return SchedulerUnavailableError(text, retry_after_ms=_RETRY_MS)
    return WorkerLostError("the worker that held the request is lost")
