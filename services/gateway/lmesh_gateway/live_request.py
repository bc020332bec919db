"""One request between its submission and its end: placed as often as it takes, reported exactly once."""

from __future__ import annotations

import asyncio
import time

from lmesh_chassis.errors import ServiceError

from lmesh_gateway.errors import CancelledError, DeadlineExceededError, WorkerLostError
from lmesh_gateway.generation import Accepted, Finish, Usage
from lmesh_gateway.live_choice import LiveChoice
from lmesh_gateway.metrics import REPLACED, RequestMetrics
from lmesh_gateway.outbox import ClientOutbox
from lmesh_gateway.placement import Leg, Outcome, Report, RequestEvent, SchedulerPort
from lmesh_gateway.plan import Plan
from lmesh_gateway.running_leg import RunningLeg, WorkerPort
from lmesh_gateway.slots import SequenceOutput, SequenceTiming
from lmesh_gateway.spans import RequestSpan

# The scheduler owns the deadlines; this much later the gateway ends the request itself, for the scheduler may be away.
_BACKSTOP_S = 1.0
_TIMING = ("cached_tokens", "queue_us", "prefill_us", "preemptions")


class LiveRequest:
    """Implements `placement.PlacementListener`. `outbox` is the client's side; `leave` must be called in the end.

    A placement that is lost does not end it: it waits for the next one, and each choice that has not ended goes on
    there from the ids that have come.
    """

    def __init__(
        self, plan: Plan, *, scheduler: SchedulerPort, workers: WorkerPort, metrics: RequestMetrics, span: RequestSpan
    ) -> None:
        self._plan = plan
        self._scheduler = scheduler
        self._workers = workers
        self._metrics = metrics
        self._span = span
        self._running: RunningLeg | None = None
        self._choices = [LiveChoice(plan, index) for index in range(plan.n)]
        self._events: list[RequestEvent] = []
        self._cached_tokens: int | None = None
        self._admitted = False
        self._placed_before = False
        self._ended = False
        self._backstop: asyncio.TimerHandle | None = None
        self.outbox = ClientOutbox(
            plan.model.tokenizer,
            prompt_ids=plan.prompt_ids,
            n=plan.n,
            with_logprobs=plan.params.logprobs >= 0,
        )

    @property
    def delivered_tokens(self) -> int:
        """New tokens so far, over all choices."""
        return sum(choice.completion_tokens for choice in self._choices)

    def submit(self) -> None:
        """Asks for admission; what `SchedulerPort.submit` raises."""
        self._scheduler.submit(self._plan, self)
        delay = self._plan.deadline_at - time.monotonic() + _BACKSTOP_S
        self._backstop = asyncio.get_running_loop().call_later(max(0.0, delay), self._overdue)

    def leave(self) -> None:
        """The client is gone or has everything; a request that still lives is cancelled."""
        # At its deadline a client's call is cancelled, here as at the client: the record should tell the two apart.
        overdue = time.monotonic() >= self._plan.deadline_at
        self._end(Outcome.EXPIRED if overdue else Outcome.CANCELLED, CancelledError("the client went away"))

    def _overdue(self) -> None:
        self._end(Outcome.EXPIRED, DeadlineExceededError("the request's deadline passed"))

    def on_admitted(self) -> None:
        """The scheduler has it in its queue."""
        if not self._admitted:
            self._admitted = True
            plan = self._plan
            self.outbox.accept(
                Accepted(
                    request_id=plan.request_id,
                    model=plan.model.id,
                    prompt_ids=plan.prompt_ids,
                    seed=plan.params.seed,
                    created=plan.created,
                )
            )

    def on_placed(self, leg: Leg) -> None:
        """A worker is to run it: from the start, or from where it is."""
        if self._ended:
            return
        self.on_admitted()
        self._drop_leg()
        self._span.event("placed")
        if self._placed_before:
            REPLACED.inc()
        self._placed_before = True
        self._running = RunningLeg(leg, self)
        self._running.start(self._plan, self._choices, self._workers)

    def on_requeued(self) -> None:
        """Its placement was taken back; the next one follows."""
        self._drop_leg()
        self._span.event("requeued")

    def on_ended(self, error: ServiceError, outcome: Outcome) -> None:
        """The scheduler ended it, or a Cancel call."""
        self._end(outcome, error)

    def sequence_lost(self, error: ServiceError) -> None:
        """A lost worker costs the placement, whose choices share it; a failure of the request itself ends it."""
        if not isinstance(error, WorkerLostError):
            self._end(Outcome.FAILED, error)
        elif self._running is not None:
            lease = self._running.leg.lease
            self._drop_leg()
            self._span.event("leg_lost")
            reason = error.metadata.get("worker_reason", error.reason)
            self._scheduler.leg_lost(self._plan.request_id, lease, reason)

    def take(self, choice: LiveChoice, output: SequenceOutput) -> None:
        """One step's output of one choice. ValueError when its log-probabilities are not of its ids."""
        self._check(output)
        self._note_first(output.timing)
        if output.timing is not None and choice.index == 0 and self._cached_tokens is None:
            self._cached_tokens = output.timing.cached_tokens
        self._metrics.tokens(choice.index, len(output.ids))
        piece = choice.push(output)
        self.outbox.add(choice.index, piece, choice.prompt_logprobs(output))
        if all(c.end is not None for c in self._choices):
            self._end(Outcome.FINISHED, None)

    def _check(self, output: SequenceOutput) -> None:
        count = len(output.logprobs.chosen) if output.logprobs is not None else 0
        if count != (len(output.ids) if self._plan.params.logprobs >= 0 else 0):
            raise ValueError(f"{count} log-probabilities for {len(output.ids)} ids")

    def _note_first(self, timing: SequenceTiming | None) -> None:
        """The scheduler hears of each placement's first output, the timeline of the request's."""
        assert self._running is not None
        if self._running.started:
            return
        self._running.started = True
        self._scheduler.started(self._plan.request_id, self._running.leg.lease)
        if not self._events:
            self._span.event("first_token")
            detail = {} if timing is None else {name: str(getattr(timing, name)) for name in _TIMING}
            self._events.append(RequestEvent(time=time.time(), event="first_token", detail=detail))

    def _drop_leg(self) -> None:
        if self._running is not None:
            self._running.drop()
            self._running = None

    def _end(self, outcome: Outcome, error: ServiceError | None) -> None:
        if self._ended:
            return
        self._ended = True
        if self._backstop is not None:
            self._backstop.cancel()
        lease = None if self._running is None else self._running.leg.lease
        self._drop_leg()
        self._report(lease, outcome, error)
        self._span.used(self.delivered_tokens, self._cached_tokens or 0)
        if error is not None:
            self._metrics.failed(error.reason)
            self._span.failed(error.reason)
            self.outbox.close(error)
        else:
            self._finish()

    def _report(self, lease: int | None, outcome: Outcome, error: ServiceError | None) -> None:
        if lease is None:
            self._scheduler.withdraw(self._plan.request_id)
            return
        self._scheduler.finished(
            Report(
                request_id=self._plan.request_id,
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
            prompt_tokens=len(self._plan.prompt_ids),
            completion_tokens=self.delivered_tokens,
            cached_tokens=self._cached_tokens or 0,
        )
        self._metrics.finished(reasons, usage.prompt_tokens, usage.completion_tokens)
        self._span.finished(reasons)
        self.outbox.close(Finish(choices=ends, usage=usage))
