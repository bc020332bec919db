"""One request between its submission and its end: placed as often as it takes, reported exactly once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lmesh_chassis.errors import ServiceError

from lmesh_gateway.delivery import Delivery
from lmesh_gateway.errors import (
    CancelledError,
    DeadlineExceededError,
    DrainingError,
    DuplicateRequestIdError,
    LedgerUnavailableError,
    ResumedElsewhereError,
    WorkerLostError,
)
from lmesh_gateway.generation import Accepted, ChoiceEnd, Finish, Usage
from lmesh_gateway.ledger import Ledger
from lmesh_gateway.ledger_entry import LedgerEntry, Standing
from lmesh_gateway.ledger_record import FailedEnd
from lmesh_gateway.live_choice import LiveChoice
from lmesh_gateway.metrics import DETACHED, REPLACED, RequestMetrics
from lmesh_gateway.outbox import ClientOutbox
from lmesh_gateway.pace import Pace
from lmesh_gateway.placement import Leg, Outcome, Report, RequestEvent, SchedulerPort
from lmesh_gateway.plan import Plan
from lmesh_gateway.running_leg import RunningLeg, WorkerPort
from lmesh_gateway.slots import SequenceOutput, SequenceTiming
from lmesh_gateway.spans import RequestSpan

# The scheduler owns the deadlines; this much later the gateway ends the request itself, for the scheduler may be away.
_BACKSTOP_S = 1.0
# A request that another gateway claimed in the ledger is told by the scheduler too, unless that gateway died of it.
_HANDOVER_S = 10.0
# What says that the id is another owner's, whose end is not this one.
_ANOTHERS = (ResumedElsewhereError, DuplicateRequestIdError)
_TIMING = ("cached_tokens", "queue_us", "prefill_us", "preemptions")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What all live requests of a process share. `on_closed` hears when a request has neither life nor client."""

    scheduler: SchedulerPort
    workers: WorkerPort
    ledger: Ledger
    on_closed: Callable[[LiveRequest], None]
    pace: Pace = field(default_factory=Pace)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claimed:
    """What the ledger has of a request that this gateway claimed."""

    nonce: str
    epoch: int
    ids: Sequence[Sequence[int]]
    ends: Sequence[ChoiceEnd | None]


class LiveRequest:
    """Implements `placement.PlacementListener` and `ledger_entry.Keeper`.

    A placement that is lost does not end it: it waits for the next one, and each choice that has not ended goes on
    there from the ids that have come. Its clients `attach` and must `leave`.
    """

    def __init__(
        self, plan: Plan, parts: Parts, *, metrics: RequestMetrics, span: RequestSpan, claimed: Claimed | None = None
    ) -> None:
        self.plan = plan
        self.span = span
        self._parts, self._metrics = parts, metrics
        self._running: RunningLeg | None = None
        self._claimed = claimed
        self._choices = [
            LiveChoice(plan, i) if claimed is None else LiveChoice(plan, i, claimed.ids[i], claimed.ends[i])
            for i in range(plan.n)
        ]
        self._delivery = Delivery(plan, self._choices, parts.pace)
        self._entry: LedgerEntry | None = None
        self._events: list[RequestEvent] = []
        self._cached_tokens: int | None = None
        self._admitted = False
        self._placed_before = claimed is not None
        self.ended = False
        self._given_away = False  # another gateway has claimed it
        self._given_lease: int | None = None
        self._alone = False  # it is detached: no client, and it runs on
        self._backstop: asyncio.TimerHandle | None = None
        self._patience: asyncio.TimerHandle | None = None

    @property
    def delivered_tokens(self) -> int:
        """New tokens so far, over all choices."""
        return sum(choice.completion_tokens for choice in self._choices)

    @property
    def attachable(self) -> bool:
        """Another client may take it up here."""
        return not (self.ended or self._given_away)

    # -- its beginning

    def submit(self) -> None:
        """Asks for admission; what `SchedulerPort.submit` raises."""
        self._parts.scheduler.submit(self.plan, self)
        self._await_deadline()

    def take_over(self) -> None:
        """Asks for what another gateway held; what `SchedulerPort.take_over` raises."""
        assert self._claimed is not None
        self._parts.scheduler.take_over(self.plan, self, self._claimed.epoch)
        self._await_deadline()

    def _await_deadline(self) -> None:
        delay = self.plan.deadline_at - time.monotonic() + _BACKSTOP_S
        self._backstop = asyncio.get_running_loop().call_later(max(0.0, delay), self._overdue)

    def _overdue(self) -> None:
        self._end(Outcome.EXPIRED, DeadlineExceededError("the request's deadline passed"))

    # -- its clients

    def attach(self, cursor: Sequence[int] = ()) -> ClientOutbox:
        """A client that has `cursor` ids of each choice; the one before it is ended. LedgerBehindError."""
        outbox = self._delivery.attach(cursor)
        self._set_alone(False)
        return outbox

    def leave(self, outbox: ClientOutbox) -> None:
        """That client is gone or has everything; a request that still lives is cancelled, or detached."""
        if not self._delivery.detach(outbox):
            return
        if self.ended:
            self._parts.on_closed(self)
        elif self._given_away:
            return
        elif time.monotonic() >= self.plan.deadline_at:
            # At its deadline a client's call is cancelled, here as at the client: the record should tell the two apart.
            self._end(Outcome.EXPIRED, CancelledError("the client went away"))
        elif self.plan.detach_ttl_s is None:
            self._end(Outcome.CANCELLED, CancelledError("the client went away"))
        else:
            self._set_alone(True)

    def _set_alone(self, alone: bool) -> None:
        if alone == self._alone:
            return
        self._alone = alone
        DETACHED.inc(1 if alone else -1)
        if self._patience is not None:
            self._patience.cancel()
        if alone:
            assert self.plan.detach_ttl_s is not None
            self._patience = asyncio.get_running_loop().call_later(self.plan.detach_ttl_s, self._forsaken)
            self.span.event("detached")

    def _forsaken(self) -> None:
        self._end(Outcome.CANCELLED, CancelledError("its client did not come back in time"))

    # -- what the scheduler says

    def on_admitted(self) -> None:
        """The scheduler has it in its queue."""
        if self._admitted or self.ended:
            return
        self._admitted = True
        plan, ledger, claimed = self.plan, self._parts.ledger, self._claimed
        if claimed is None:
            self._entry = ledger.open(plan, self._choices, self)
        else:
            self._entry = ledger.go_on(plan, self._choices, self, nonce=claimed.nonce, epoch=claimed.epoch)
        self._delivery.keep_in(self._entry)
        self._delivery.accept(accepted(plan))

    def on_placed(self, leg: Leg) -> None:
        """A worker is to run it: from the start, or from where it is."""
        if self._given_away:
            self._given_lease = leg.lease
        if self.ended or self._given_away:
            return
        self._drop_leg()
        self.span.event("placed")
        if self._placed_before:
            REPLACED.inc()
        self._placed_before = True
        self._running = RunningLeg(leg, self)
        self._running.start(self.plan, self._choices, self._parts.workers)
        self.on_admitted()  # after the start, which is then written before the client is told

    def on_requeued(self) -> None:
        """Its placement was taken back; the next one follows."""
        self._drop_leg()
        self.span.event("requeued")

    def on_ended(self, error: ServiceError, outcome: Outcome) -> None:
        """The scheduler ended it, or a Cancel call."""
        self._end(outcome, error)

    # -- what the ledger says

    def on_kept(self, version: int) -> None:
        """The ledger has it up to there."""
        self._delivery.kept(version)

    def on_dropped(self) -> None:
        """The ledger will not have it."""
        if self.plan.sync:
            error = LedgerUnavailableError("the ledger has been away for too long; try again", retry_after_ms=1000)
            self._delivery.fail(error)
            self._end(Outcome.FAILED, error)

    def on_fenced(self) -> None:
        """Another gateway claimed it: it stops here, and ends when the scheduler gives it to that one."""
        error = ResumedElsewhereError("the request goes on in another stream")
        if not self.ended or self.plan.sync:
            self._delivery.fail(error)
        if self.ended:
            return
        self._given_away = True
        self._given_lease = None if self._running is None else self._running.leg.lease
        self._drop_leg()
        self._set_alone(False)
        loop = asyncio.get_running_loop()
        self._patience = loop.call_later(_HANDOVER_S, self._end, Outcome.CANCELLED, error)

    # -- what workers give

    def sequence_lost(self, error: ServiceError) -> None:
        """A worker that is lost or leaves costs the placement, shared by all choices; other failures end it."""
        if not isinstance(error, WorkerLostError | DrainingError):
            self._end(Outcome.FAILED, error)
        elif self._running is not None:
            lease = self._running.leg.lease
            self._drop_leg()
            self.span.event("leg_lost")
            reason = error.metadata.get("worker_reason", error.reason)
            self._parts.scheduler.leg_lost(self.plan.request_id, lease, reason)

    def take(self, choice: LiveChoice, output: SequenceOutput) -> None:
        """One step's output of one choice. ValueError when its log-probabilities are not of its ids."""
        self._check(output)
        self._note_first(output.timing)
        if output.timing is not None and choice.index == 0 and self._cached_tokens is None:
            self._cached_tokens = output.timing.cached_tokens
        self._metrics.tokens(choice.index, len(output.ids))
        piece = choice.push(output)
        self._delivery.add(choice, piece, choice.prompt_logprobs(output))
        if all(c.end is not None for c in self._choices):
            self._end(Outcome.FINISHED, None)

    def _check(self, output: SequenceOutput) -> None:
        count = len(output.logprobs.chosen) if output.logprobs is not None else 0
        if count != (len(output.ids) if self.plan.params.logprobs >= 0 else 0):
            raise ValueError(f"{count} log-probabilities for {len(output.ids)} ids")

    def _note_first(self, timing: SequenceTiming | None) -> None:
        """The scheduler hears of each placement's first output, the timeline of the request's."""
        assert self._running is not None
        if self._running.started:
            return
        self._running.started = True
        self._parts.scheduler.started(self.plan.request_id, self._running.leg.lease)
        if not self._events and self._claimed is None:
            self.span.event("first_token")
            detail = {} if timing is None else {name: str(getattr(timing, name)) for name in _TIMING}
            self._events.append(RequestEvent(time=time.time(), event="first_token", detail=detail))

    def _drop_leg(self) -> None:
        if self._running is not None:
            self._running.drop()
            self._running = None

    # -- its end

    def abandon(self) -> None:
        """This process leaves; the request is left to whichever gateway resumes it, if the ledger has it."""
        if self.ended:
            return
        if self._entry is None or self._entry.standing is not Standing.KEPT:
            self._end(Outcome.CANCELLED, DrainingError("this gateway is leaving; send the request again"))
            return
        self._stop()
        self._delivery.fail(DrainingError("this gateway is leaving; resume the request elsewhere"))
        self._close()

    def _end(self, outcome: Outcome, error: ServiceError | None) -> None:
        if self.ended:
            return
        lease = self._stop()
        self._report(lease, outcome, error)
        self.span.used(self.delivered_tokens, self._cached_tokens or 0)
        if error is None:
            self._finish()
        else:
            self._metrics.failed(error.reason)
            self.span.failed(error.reason)
            if self._entry is not None and not self._given_away and not isinstance(error, _ANOTHERS):
                self._entry.ended(FailedEnd.of(error))
            self._delivery.fail(error)
        self._close()

    def _stop(self) -> int | None:
        """Nothing more comes; the lease that it had."""
        self.ended = True
        self._set_alone(False)
        for timer in (self._backstop, self._patience):
            if timer is not None:
                timer.cancel()
        lease = self._given_lease if self._running is None else self._running.leg.lease
        self._drop_leg()
        return lease

    def _close(self) -> None:
        if not self._delivery.attached:
            self._parts.on_closed(self)

    def _report(self, lease: int | None, outcome: Outcome, error: ServiceError | None) -> None:
        if lease is None:
            if self._given_away:
                self._parts.scheduler.disown(self.plan.request_id)  # a Cancel would be for the new owner's
            else:
                self._parts.scheduler.withdraw(self.plan.request_id)
            return
        self._parts.scheduler.finished(
            Report(
                request_id=self.plan.request_id,
                lease=lease,
                outcome=outcome,
                reason=error.reason if error is not None and outcome is Outcome.FAILED else "",
                completion_tokens=self.delivered_tokens,
                cached_tokens=self._cached_tokens or 0,
                events=tuple(self._events),
            )
        )

    def _finish(self) -> None:
        ends = tuple(choice.end for choice in self._choices if choice.end is not None)
        reasons = [str(end.reason) for end in ends]
        usage = Usage(
            prompt_tokens=len(self.plan.prompt_ids),
            completion_tokens=self.delivered_tokens,
            cached_tokens=self._cached_tokens or 0,
        )
        self._metrics.finished(reasons, usage.prompt_tokens, usage.completion_tokens)
        self.span.finished(reasons)
        version = 0 if self._entry is None else self._entry.ended(usage)
        self._delivery.finish(Finish(choices=ends, usage=usage), version, waits=self._parts.ledger.ok)


def accepted(plan: Plan) -> Accepted:
    """The first event of a request's streams."""
    return Accepted(
        request_id=plan.request_id,
        model=plan.model.id,
        prompt_ids=plan.prompt_ids,
        seed=plan.params.seed,
        created=plan.created,
    )
