"""One placement of a live request: the sequences that run under its lease, until it is dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from lmesh_chassis.errors import ServiceError

from lmesh_gateway.live_choice import LiveChoice
from lmesh_gateway.placement import Leg
from lmesh_gateway.plan import Plan
from lmesh_gateway.slots import SequenceListener, SequenceOutput, SequenceStart


class WorkerPort(Protocol):
    """What a live request asks of the workers."""

    def start(self, leg: Leg, start: SequenceStart, listener: SequenceListener) -> Callable[[], None]:
        """Runs a sequence; the returned function drops it, at any time and any number of times."""
        ...


class LegOwner(Protocol):
    """The live request."""

    def take(self, choice: LiveChoice, output: SequenceOutput) -> None:
        """One step's output of one choice, under the lease that is held."""
        ...

    def sequence_lost(self, error: ServiceError) -> None:
        """A sequence that is held has ended without an end."""
        ...


class RunningLeg:
    """Whatever comes once it is dropped, or of a choice that has ended, is not passed on."""

    def __init__(self, leg: Leg, owner: LegOwner) -> None:
        self.leg = leg
        self.started = False  # its first output has come
        self.dropped = False
        self.owner = owner
        self._sequences: list[Sequence] = []

    def start(self, plan: Plan, choices: Iterable[LiveChoice], workers: WorkerPort) -> None:
        """Runs what has not ended, each choice from where it is."""
        for choice in choices:
            if choice.end is None and not self.dropped:
                choice.begin()
                sequence = Sequence(self, choice)
                self._sequences.append(sequence)
                sequence.drop = workers.start(self.leg, _start(plan, self.leg, choice), sequence)

    def drop(self) -> None:
        """Nothing of it is wanted any more."""
        self.dropped = True
        for sequence in self._sequences:
            sequence.drop()


class Sequence:
    """One choice on its worker; implements `slots.SequenceListener`."""

    def __init__(self, running: RunningLeg, choice: LiveChoice) -> None:
        self._running = running
        self._choice = choice
        self.drop: Callable[[], None] = lambda: None

    def on_output(self, output: SequenceOutput) -> None:
        """The request takes it."""
        if self._running.dropped or self._choice.end is not None:
            return
        self._running.owner.take(self._choice, output)
        if self._choice.end is not None:
            self.drop()  # a stop string is found here: the worker does not know of it

    def on_lost(self, error: ServiceError) -> None:
        """The request must go on without it, or ends."""
        if not self._running.dropped and self._choice.end is None:
            self._running.owner.sequence_lost(error)


def _start(plan: Plan, leg: Leg, choice: LiveChoice) -> SequenceStart:
    params = plan.params
    # The prompt's scores are the same for every choice; where nothing is generated they are all that there is to run.
    if choice.prompt_scored or (choice.index > 0 and params.max_tokens > 0):
        params = replace(params, prompt_logprobs=-1)
    return SequenceStart(
        lease=leg.lease,
        request_id=plan.request_id,
        choice=choice.index,
        ids=(*plan.prompt_ids, *choice.ids) if choice.ids else plan.prompt_ids,
        prompt_len=len(plan.prompt_ids),
        params=params,
        cache_salt=plan.cache_salt,
        traceparent=plan.traceparent,
        priority=plan.priority,
        adapter=plan.model.adapter,
    )
