"""What this gateway has with the scheduler: submitted requests, what is to be said, what a broken link costs."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

from lmesh_chassis.errors import ServiceError

from lmesh_gateway.dispatch_batch import Announce, DispatchBatch, LegLost, TakeOver
from lmesh_gateway.errors import (
    DeadlineExceededError,
    DuplicateRequestIdError,
    QueueTimeoutError,
    ResumedElsewhereError,
    SchedulerUnavailableError,
    WorkerLostError,
)
from lmesh_gateway.placement import Leg, Outcome, PlacementListener, Report
from lmesh_gateway.plan import Plan
from lmesh_gateway.verdicts import RETRY_MS, refusal, revocation

# Prompt ids in one batch; at up to 5 bytes an id this stays well below the message size limit.
_MAX_IDS = 1_000_000
_ENDED_KEPT = 4096


@dataclass(slots=True, eq=False)
class Submitted:
    """One live request. With `leg` it is placed; with `lost` alone it waits to be placed again."""

    plan: Plan
    listener: PlacementListener
    owner_epoch: int = 0  # of a take-over, else 0
    sent: bool = False
    leg: Leg | None = None
    lost: Leg | None = None
    started: bool = False  # the leg's first output has come
    newest_lease: int = 0
    lost_reason: str = ""
    lost_stream: int = 0  # the stream that the loss was told on last
    known_to: int = 0  # the incarnation that last said where it stands

    @property
    def held(self) -> Leg | None:
        """The placement that the scheduler believes in, as far as is known here."""
        return self.leg or self.lost


@dataclass(slots=True, eq=False)
class Ended:
    """A request that ended here; `stream` is the one that its report went out on, 0 before."""

    report: Report | None
    entry: Submitted | None = None  # until its report was written: a new scheduler must be told both
    stream: int = 0


class DispatchSession:
    """Pure bookkeeping, no sockets.

    After a break the scheduler tells each live request's standing again, so repeats are ignored; what was on its way
    up is said again. A scheduler of a new incarnation is told what is placed, and gets submitted again what is not.
    """

    def __init__(self) -> None:
        self._live: dict[str, Submitted] = {}
        self._ended: OrderedDict[str, Ended] = OrderedDict()
        self._stream = 0  # how many streams there were
        self._incarnation = 0
        self._given_up = False
        self._outbox = DispatchBatch()
        self._writing = DispatchBatch()

    @property
    def given_up(self) -> bool:
        """No scheduler has been there for longer than the grace."""
        return self._given_up

    @property
    def count(self) -> int:
        """Live requests of this gateway."""
        return len(self._live)

    def live(self, request_id: str) -> Submitted | None:
        """The live request of that id in this gateway."""
        return self._live.get(request_id)

    def ended_lately(self, request_id: str) -> bool:
        """Whether a request of that id ended in this gateway, as far as that is remembered."""
        return request_id in self._ended

    def submit(self, plan: Plan, listener: PlacementListener) -> None:
        """Asks for admission; DuplicateRequestIdError when the id is live here."""
        self._open(Submitted(plan, listener))
        self._outbox.submits.append(plan)

    def take_over(self, plan: Plan, listener: PlacementListener, owner_epoch: int) -> None:
        """Asks for a request that is live elsewhere or whose gateway is gone; DuplicateRequestIdError as above."""
        entry = Submitted(plan, listener, owner_epoch=owner_epoch)
        self._open(entry)
        self._say_taken_over(entry)

    def _open(self, entry: Submitted) -> None:
        request_id = entry.plan.request_id
        if request_id in self._live:
            raise DuplicateRequestIdError(f"request id {request_id} is live; choose another", field="request_id")
        self._live[request_id] = entry

    def withdraw(self, request_id: str) -> None:
        """A request that is not placed now is no longer wanted."""
        entry = self._forget(request_id, None)
        if entry is None:
            return
        self._unsay(entry)
        if entry.sent or entry.held is not None:
            self._outbox.withdrawals.append(request_id)

    def disown(self, request_id: str) -> None:
        """A request is another owner's now: nothing is said of it."""
        entry = self._forget(request_id, None)
        if entry is not None:
            self._unsay(entry)

    def cancel(self, request_id: str) -> None:
        """Cancels a request of another gateway."""
        self._outbox.cancels.append(request_id)

    def started(self, request_id: str, lease: int) -> None:
        """The first output under a lease has come."""
        entry = self._live.get(request_id)
        if entry is not None:
            entry.started = True
        self._outbox.started.append((request_id, lease))

    def finished(self, report: Report) -> None:
        """A placed request has ended."""
        if self._forget(report.request_id, report) is not None:
            self._outbox.finished.append(report)

    def leg_lost(self, request_id: str, lease: int, reason: str) -> None:
        """A placement is lost and its request goes on: it is to be placed again."""
        entry = self._live.get(request_id)
        if entry is None or entry.leg is None or entry.leg.lease != lease:
            return
        self._lose_leg(entry)
        entry.lost_reason = reason
        self._say_lost(entry)
        if self._given_up:
            # Nobody is there to place it again, and nobody was for longer than the grace.
            self._end(request_id, WorkerLostError("its worker is lost, and no scheduler is there"), Outcome.FAILED)

    def worker_lost(self, worker_id: str, epoch: str) -> None:
        """A Run link was given up."""
        self._outbox.workers_lost.append((worker_id, epoch))

    def collect(self) -> DispatchBatch | None:
        """The next batch, or None. Asking for it says that the one before has been written."""
        for report in self._writing.finished:
            if (ended := self._ended.get(report.request_id)) is not None:
                ended.entry = None
        self._writing = self._announcing() if self._outbox.announces else self._everything()
        return None if self._writing.empty else self._writing

    def _announcing(self) -> DispatchBatch:
        waiting = self._outbox.announces
        count = _fitting([announce.plan for announce in waiting])
        self._outbox.announces = waiting[count:]
        return DispatchBatch(announces=waiting[:count])

    def _everything(self) -> DispatchBatch:
        whole, self._outbox = self._outbox, DispatchBatch()
        count = _fitting(whole.submits)
        self._outbox.submits, whole.submits = whole.submits[count:], whole.submits[:count]
        count = _fitting([takeover.plan for takeover in whole.takeovers])
        self._outbox.takeovers, whole.takeovers = whole.takeovers[count:], whole.takeovers[:count]
        for plan in (*whole.submits, *(takeover.plan for takeover in whole.takeovers)):
            self._live[plan.request_id].sent = True
        for report in whole.finished:
            if (ended := self._ended.get(report.request_id)) is not None:
                ended.stream = self._stream
        return whole

    def connected(self, incarnation: int = 1) -> None:
        """A stream is up, to a scheduler of that incarnation."""
        self._stream += 1
        self._given_up = False
        if incarnation != self._incarnation:
            self._incarnation = incarnation
            self._announce_ended()
        waiting = {plan.request_id for plan in self._outbox.submits}
        for request_id, entry in self._live.items():
            if entry.held is not None:
                if entry.known_to != incarnation:
                    self._announce(entry, entry.held)
            elif entry.owner_epoch:
                self._say_taken_over(entry)
            elif request_id not in waiting:
                self._outbox.submits.append(entry.plan)

    def _say_taken_over(self, entry: Submitted) -> None:
        self._unsay(entry)
        self._outbox.takeovers.append(
            TakeOver(plan=entry.plan, owner_epoch=entry.owner_epoch, delivered_tokens=entry.listener.delivered_tokens)
        )

    def _announce(self, entry: Submitted, leg: Leg) -> None:
        self._outbox.announces.append(
            Announce(plan=entry.plan, leg=leg, started=entry.started, delivered_tokens=entry.listener.delivered_tokens)
        )
        if entry.leg is None:
            self._say_lost(entry)

    def _announce_ended(self) -> None:
        """What ended while no scheduler listened: a report on what it has never heard of would be dropped."""
        for report in self._outbox.finished:
            entry = self._ended[report.request_id].entry if report.request_id in self._ended else None
            if entry is not None and entry.held is not None:
                self._announce(entry, entry.held)

    def broken(self) -> None:
        """The stream is gone: what was being written may not have arrived."""
        lost, self._writing = self._writing, DispatchBatch()
        self._outbox.cancels[:0] = lost.cancels
        self._outbox.withdrawals[:0] = lost.withdrawals
        self._outbox.started[:0] = lost.started
        self._outbox.finished[:0] = lost.finished
        self._outbox.workers_lost[:0] = lost.workers_lost
        self._outbox.legs_lost[:0] = lost.legs_lost
        self._outbox.announces.clear()  # made anew for whoever comes next

    def give_up(self) -> None:
        """The scheduler stayed away: what is not placed ends; what runs goes on."""
        self._given_up = True
        for request_id, entry in list(self._live.items()):
            if entry.leg is None:
                error = SchedulerUnavailableError("the scheduler cannot be reached", retry_after_ms=RETRY_MS)
                self._end(request_id, error, Outcome.FAILED)

    def on_queued(self, request_id: str) -> None:
        """The scheduler admitted a request."""
        entry = self._heard(request_id)
        if entry is not None:
            entry.listener.on_admitted()

    def on_placed(self, request_id: str, leg: Leg) -> None:
        """The scheduler placed a request, for the first time or again, or tells its standing."""
        entry = self._heard(request_id)
        if entry is None:
            self._report_again(request_id, leg)
        elif leg.lease > entry.newest_lease:  # leases only ever grow
            entry.leg, entry.lost, entry.started, entry.newest_lease = leg, None, False, leg.lease
            entry.listener.on_placed(leg)
        elif entry.leg is None and entry.lost is not None and entry.lost.lease == leg.lease:
            self._say_lost(entry)  # the scheduler has not heard of it

    def _heard(self, request_id: str) -> Submitted | None:
        entry = self._live.get(request_id)
        if entry is not None:
            entry.known_to = self._incarnation
        return entry

    def _report_again(self, request_id: str, leg: Leg) -> None:
        """Placed, and ended here: the report was lost, or the end crossed the placement."""
        ended = self._ended.get(request_id)
        if ended is None or ended.report is None:
            ended = Ended(Report(request_id=request_id, lease=leg.lease, outcome=Outcome.CANCELLED))
            self._remember(request_id, ended)
        elif ended.report.lease != leg.lease:
            # It ended under a lease that had been taken back already: what came of it stands.
            ended = Ended(replace(ended.report, lease=leg.lease))
            self._remember(request_id, ended)
        assert ended.report is not None
        if ended.stream != self._stream and ended.report not in self._outbox.finished:
            self._outbox.finished.append(ended.report)

    def on_revoked(self, request_id: str, lease: int, reason: str, requeued: bool = False) -> None:
        """The scheduler took a lease back, or ended a queued request; `requeued` ones are placed again."""
        entry = self._heard(request_id)
        if entry is None or (entry.leg is not None and lease not in (0, entry.leg.lease)):
            return
        if requeued:
            if entry.leg is not None and lease:
                self._lose_leg(entry)
                entry.lost_reason = reason
                entry.lost_stream = self._stream  # it need not be told of it
                entry.listener.on_requeued()
            return
        if reason == ResumedElsewhereError.reason:
            if entry.owner_epoch and lease and (entry.held is None or entry.held.lease != lease):
                return  # it is what was here before that this one took over
            self._forget(request_id, None)  # a report would be on the new owner's request
        outcome = Outcome.CANCELLED if reason == "CANCELLED" else Outcome.FAILED
        self._end(request_id, revocation(reason, adapter=bool(entry.plan.model.adapter)), outcome, entry)

    def on_expired(self, request_id: str, queued: bool) -> None:
        """A deadline passed."""
        if queued:
            error: ServiceError = QueueTimeoutError("no worker took the request in time", retry_after_ms=RETRY_MS)
        else:
            error = DeadlineExceededError("the request's deadline passed")
        self._end(request_id, error, Outcome.EXPIRED)

    def on_refused(self, request_id: str, reason: str, message: str, retry_after_ms: int) -> None:
        """The scheduler did not admit a request."""
        entry = self._live.get(request_id)
        if entry is None:
            return
        self._end(request_id, refusal(reason, message, retry_after_ms), Outcome.FAILED)

    def _end(self, request_id: str, error: ServiceError, outcome: Outcome, entry: Submitted | None = None) -> None:
        entry = entry or self._live.get(request_id)
        if entry is None:
            return
        if entry.leg is None:
            self._forget(request_id, None)
            self._unsay(entry)
        entry.listener.on_ended(error, outcome)

    def _lose_leg(self, entry: Submitted) -> None:
        entry.lost, entry.leg, entry.started = entry.leg, None, False

    def _say_lost(self, entry: Submitted) -> None:
        """Once a stream: the scheduler's standing may have crossed it."""
        assert entry.lost is not None
        told = LegLost(request_id=entry.plan.request_id, lease=entry.lost.lease, reason=entry.lost_reason)
        if entry.lost_stream != self._stream and told not in self._outbox.legs_lost:
            self._outbox.legs_lost.append(told)
        entry.lost_stream = self._stream

    def _unsay(self, entry: Submitted) -> None:
        """Takes back a submission, the first or a repeated one, that has not gone out yet."""
        plan, outbox = entry.plan, self._outbox
        outbox.submits = [waiting for waiting in outbox.submits if waiting is not plan]
        outbox.takeovers = [waiting for waiting in outbox.takeovers if waiting.plan is not plan]

    def _forget(self, request_id: str, report: Report | None) -> Submitted | None:
        entry = self._live.pop(request_id, None)
        if entry is not None:
            self._remember(request_id, Ended(report, None if report is None else entry))
        return entry

    def _remember(self, request_id: str, ended: Ended) -> None:
        self._ended[request_id] = ended
        self._ended.move_to_end(request_id)
        while len(self._ended) > _ENDED_KEPT:
            self._ended.popitem(last=False)


def _fitting(plans: list[Plan]) -> int:
    """How many of the first ones go into one message."""
    budget, count = _MAX_IDS, 0
    while count < len(plans) and budget > 0:
        budget -= len(plans[count].prompt_ids)
        count += 1
    return count
