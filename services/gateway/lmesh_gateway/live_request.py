"""One request between its submission and its end: placed, run as n sequences, reported exactly once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from lmesh_chassis.errors import ServiceError

from lmesh_gateway.choice import ChoiceAssembler, Piece
from lmesh_gateway.errors import CancelledError, DeadlineExceededError
from lmesh_gateway.generation import Accepted, ChoiceEnd, Finish, FinishReason, Usage
from lmesh_gateway.logprobs import LogprobColumns
from lmesh_gateway.metrics import RequestMetrics
from lmesh_gateway.outbox import ClientOutbox
from lmesh_gateway.placement import Leg, Outcome, Report, RequestEvent, SchedulerPort
from lmesh_gateway.plan import Plan
from lmesh_gateway.slots import SequenceFinish, SequenceListener, SequenceOutput, SequenceStart, SequenceTiming
from lmesh_gateway.spans import RequestSpan

# The scheduler owns the deadlines; this much later the gateway ends the request itself, for the scheduler may be away.
_BACKSTOP_S = 1.0
_REASONS: dict[SequenceFinish, FinishReason] = {SequenceFinish.STOP: "stop", SequenceFinish.LENGTH: "length"}
_TIMING = ("cached_tokens", "queue_us", "prefill_us", "preemptions")


class WorkerPort(Protocol):
    """What a live request asks of the workers."""

    def start(self, leg: Leg, start: SequenceStart, listener: SequenceListener) -> Callable[[], None]:
        """Runs a sequence; the returned function drops it, at any time and any number of times."""
        ...


class Sequence:
    """One choice on its worker; implements `slots.SequenceListener`."""

    def __init__(self, request: LiveRequest, choice: int, assembler: ChoiceAssembler) -> None:
        self._request = request
        self.choice = choice
        self.assembler = assembler
        self.drop: Callable[[], None] = lambda: None
        self.prompt_logprobs: LogprobColumns | None = None  # what has come of them so far
        self.end: ChoiceEnd | None = None

    def on_output(self, output: SequenceOutput) -> None:
        """The request takes it."""
        self._request.take(self, output)

    def on_lost(self, error: ServiceError) -> None:
        """The request cannot go on without it."""
        self._request.on_ended(error, Outcome.FAILED)


class LiveRequest:
    """Implements `placement.PlacementListener`. `outbox` is the client's side; `leave` must be called in the end."""

    def __init__(
        self, plan: Plan, *, scheduler: SchedulerPort, workers: WorkerPort, metrics: RequestMetrics, span: RequestSpan
    ) -> None:
        self._plan = plan
        self._scheduler = scheduler
        self._workers = workers
        self._metrics = metrics
        self._span = span
        self._leg: Leg | None = None
        self._sequences: list[Sequence] = []
        self._events: list[RequestEvent] = []
        self._cached_tokens = 0
        self._admitted = False
        self._started = False
        self._ended = False
        self._backstop: asyncio.TimerHandle | None = None
        self.outbox = ClientOutbox(
            plan.model.tokenizer,
            prompt_ids=plan.prompt_ids,
            n=plan.n,
            with_logprobs=plan.params.logprobs >= 0,
        )

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
        """A worker is to run it."""
        self.on_admitted()
        self._span.event("placed")
        self._leg = leg
        self._sequences = [self._sequence(choice) for choice in range(self._plan.n)]
        for sequence in self._sequences:
            sequence.drop = self._workers.start(leg, self._start(leg, sequence.choice), sequence)

    def on_ended(self, error: ServiceError, outcome: Outcome) -> None:
        """The scheduler or a worker ended it."""
        self._end(outcome, error)

    def _sequence(self, choice: int) -> Sequence:
        plan = self._plan
        assembler = ChoiceAssembler(
            plan.model.tokenizer,
            prompt_ids=plan.prompt_ids,
            stop=plan.stop,
            keep_special_tokens=plan.keep_special_tokens,
        )
        return Sequence(self, choice, assembler)

    def _start(self, leg: Leg, choice: int) -> SequenceStart:
        plan, params = self._plan, self._plan.params
        if choice > 0 and params.max_tokens > 0:
            params = replace(params, prompt_logprobs=-1)  # they are the same for every choice
        return SequenceStart(
            lease=leg.lease,
            request_id=plan.request_id,
            choice=choice,
            ids=plan.prompt_ids,
            prompt_len=len(plan.prompt_ids),
            params=params,
            cache_salt=plan.cache_salt,
            traceparent=plan.traceparent,
        )

    def take(self, sequence: Sequence, output: SequenceOutput) -> None:
        """One step's output of one sequence. ValueError when its log-probabilities are not of its ids."""
        if self._ended or sequence.end is not None:
            return
        self._check(output)
        if not self._started:
            self._first_output(output.timing)
        if output.timing is not None and sequence.choice == 0:
            self._cached_tokens = output.timing.cached_tokens
        self._metrics.tokens(sequence.choice, len(output.ids))
        piece = sequence.assembler.push(output.ids, finish=_REASONS.get(output.finish), logprobs=output.logprobs)
        self.outbox.add(sequence.choice, piece, self._prompt_logprobs(sequence, output))
        if piece.reason is not None:
            self._choice_ended(sequence, piece)

    def _check(self, output: SequenceOutput) -> None:
        count = len(output.logprobs.chosen) if output.logprobs is not None else 0
        if count != (len(output.ids) if self._plan.params.logprobs >= 0 else 0):
            raise ValueError(f"{count} log-probabilities for {len(output.ids)} ids")

    def _first_output(self, timing: SequenceTiming | None) -> None:
        self._started = True
        assert self._leg is not None
        self._scheduler.started(self._plan.request_id, self._leg.lease)
        self._span.event("first_token")
        detail = {} if timing is None else {name: str(getattr(timing, name)) for name in _TIMING}
        self._events.append(RequestEvent(time=time.time(), event="first_token", detail=detail))

    def _prompt_logprobs(self, sequence: Sequence, output: SequenceOutput) -> LogprobColumns | None:
        """The prompt's log-probabilities once they are whole; they come in parts when the prompt was computed so."""
        if sequence.choice > 0 or self._plan.params.prompt_logprobs < 0:
            return None
        if output.prompt_logprobs is not None:
            if sequence.prompt_logprobs is None:
                sequence.prompt_logprobs = LogprobColumns(k=output.prompt_logprobs.k)
            sequence.prompt_logprobs.extend(output.prompt_logprobs)
        if not output.ids and output.finish is SequenceFinish.RUNNING:
            return None
        columns, sequence.prompt_logprobs = sequence.prompt_logprobs, None
        return columns

    def _choice_ended(self, sequence: Sequence, piece: Piece) -> None:
        sequence.drop()  # a stop string is found here: the worker does not know of it
        assert piece.reason is not None
        sequence.end = ChoiceEnd(
            choice=sequence.choice,
            reason=piece.reason,
            stop_string=piece.stop_string,
            stop_token_id=piece.stop_token_id,
        )
        if all(s.end is not None for s in self._sequences):
            self._end(Outcome.FINISHED, None)

    def _end(self, outcome: Outcome, error: ServiceError | None) -> None:
        if self._ended:
            return
        self._ended = True
        if self._backstop is not None:
            self._backstop.cancel()
        for sequence in self._sequences:
            sequence.drop()
        completion_tokens = sum(s.assembler.completion_tokens for s in self._sequences)
        self._report(outcome, error, completion_tokens)
        self._span.used(completion_tokens, self._cached_tokens)
        if error is not None:
            self._metrics.failed(error.reason)
            self._span.failed(error.reason)
            self.outbox.close(error)
        else:
            self._finish(completion_tokens)

    def _report(self, outcome: Outcome, error: ServiceError | None, completion_tokens: int) -> None:
        if self._leg is None:
            self._scheduler.withdraw(self._plan.request_id)
            return
        self._scheduler.finished(
            Report(
                request_id=self._plan.request_id,
                lease=self._leg.lease,
                outcome=outcome,
                reason=error.reason if error is not None and outcome is Outcome.FAILED else "",
                completion_tokens=completion_tokens,
                cached_tokens=self._cached_tokens,
                events=tuple(self._events),
            )
        )

    def _finish(self, completion_tokens: int) -> None:
        ends = tuple(s.end for s in self._sequences if s.end is not None)
        reasons = [str(end.reason) for end in ends]
        prompt_tokens = len(self._plan.prompt_ids)
        self._metrics.finished(reasons, prompt_tokens, completion_tokens)
        self._span.finished(reasons)
        usage = Usage(
            prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, cached_tokens=self._cached_tokens
        )
        self.outbox.close(Finish(choices=ends, usage=usage))
