"""The request table: every request's state, changed only here and only along the transition table."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import chain
from typing import NamedTuple

from opentelemetry.trace import Span


class State(StrEnum):
    """Where a request is."""

    QUEUED = "QUEUED"
    PLACED = "PLACED"
    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"
    FAILED = "FAILED"


LIVE = frozenset({State.QUEUED, State.PLACED, State.RUNNING})
_ENDS = frozenset({State.CANCELLED, State.EXPIRED, State.FAILED})
TRANSITIONS: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.PLACED}) | _ENDS,
    # Back to QUEUED: the worker was lost and the request is placed again.
    State.PLACED: frozenset({State.RUNNING, State.FINISHED, State.QUEUED}) | _ENDS,
    State.RUNNING: frozenset({State.FINISHED, State.QUEUED}) | _ENDS,
    **{state: frozenset() for state in (State.FINISHED, State.CANCELLED, State.EXPIRED, State.FAILED)},
}


class TransitionError(RuntimeError):
    """A change that the table does not have."""


@dataclass(frozen=True, slots=True)
class TimelineEvent:
    """Something that happened to a request; `time` is Unix seconds."""

    time: float
    event: str
    detail: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What a gateway submits; times are remaining seconds, 0 for none."""

    request_id: str
    model: str
    prompt_ids: Sequence[int]
    max_tokens: int
    n: int = 1
    deadline_s: float = 0.0
    queue_timeout_s: float = 0.0
    tenant: str = ""
    priority: int = 0
    traceparent: str = ""
    cache_salt: str = ""
    adapter: str = ""  # content digest of the adapter that it runs with
    delivered_tokens: int = 0  # new tokens of an earlier placement, here or under an earlier scheduler


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One request. Only RequestTable writes `state`, `version`, `reported` and `timeline`."""

    submission: Submission
    gateway_id: str
    prompt_tokens: int
    deadline: float = math.inf  # by the scheduler's clock
    queue_deadline: float = math.inf
    expires_at: float = 0.0  # the deadline in Unix seconds, for other readers; 0 for none
    state: State = State.QUEUED
    version: int = 0  # the table's count of changes at the last one; the journal's compare-and-set goes by it
    durable_version: int = 0  # the last one that Redis confirmed
    worker_id: str = ""
    epoch: str = ""
    lease: int = 0
    placements: int = 0  # leases that it was given so far
    lost_lease: int = 0  # the last one that it lost, and why
    lost_reason: str = ""
    charged: float = 0.0  # tokens that its tenant was charged in advance and that are not set right yet
    owner_epoch: int = 0  # of the ledger, when it has changed hands
    reason: str = ""
    completion_tokens: int = 0
    cached_tokens: int = 0
    reported: bool = False  # its gateway has told how it ended
    timeline: list[TimelineEvent] = field(default_factory=list)
    span: Span | None = None  # while queued
    granules: list[bytes] | None = None  # hashes of its prompt for the prefix index, once they were needed

    @property
    def id(self) -> str:
        """The request's id."""
        return self.submission.request_id

    @property
    def live(self) -> bool:
        """Whether it has not ended."""
        return self.state in LIVE

    @property
    def durable(self) -> bool:
        """Whether Redis holds this very state."""
        return self.durable_version == self.version


class Ending(NamedTuple):
    """A gateway's terminal report."""

    request_id: str
    lease: int
    state: State
    reason: str
    completion_tokens: int
    cached_tokens: int
    events: list[TimelineEvent]


class RequestTable:
    """Live requests, and the last ended ones."""

    def __init__(self, *, ended_kept: int, wall: Callable[[], float], journal: Callable[[Request], None]) -> None:
        self._live: dict[str, Request] = {}
        self._ended: OrderedDict[str, Request] = OrderedDict()
        self._ended_kept = ended_kept
        self._wall = wall
        self._journal = journal
        self._changes = 0  # over all requests, so that no two states of any record have the same version
        self.refused_transitions = 0
        self.ended_by_state: Counter[State] = Counter()

    def __len__(self) -> int:
        return len(self._live)

    def live(self) -> list[Request]:
        """All live requests."""
        return list(self._live.values())

    def of_gateway(self, gateway_id: str) -> list[Request]:
        """A gateway's requests, live and lately ended."""
        known: Iterator[Request] = chain(self._ended.values(), self._live.values())
        return [request for request in known if request.gateway_id == gateway_id]

    def find(self, request_id: str) -> Request | None:
        """A live or lately ended request."""
        return self._live.get(request_id) or self._ended.get(request_id)

    def add(self, request: Request) -> None:
        """A new request, QUEUED. Raises TransitionError when its id is known."""
        if self.find(request.id) is not None:
            raise TransitionError(f"{request.id} is known already")
        self._live[request.id] = request
        self._note(request, "queued", {})

    def adopt(self, request: Request, *, started: bool) -> None:
        """A request that an earlier scheduler placed, with its lease. Raises TransitionError when its id is known."""
        if self.find(request.id) is not None:
            raise TransitionError(f"{request.id} is known already")
        request.state = State.RUNNING if started else State.PLACED
        self._live[request.id] = request
        self._note(request, "announced", {"worker_id": request.worker_id})

    def forget(self, request: Request) -> None:
        """An ended request is to live again, as another under its id."""
        self._ended.pop(request.id, None)

    def hand_over(self, old: Request | None, new: Request, detail: dict[str, str]) -> None:
        """`new` takes the place of `old`, live or ended, under the same id: QUEUED, with the same timeline."""
        if old is not None:
            self._ended.pop(old.id, None)
            self._live.pop(old.id, None)
            old.state = State.CANCELLED  # nobody's any more: it is not journaled, and deadlines pass it by
            new.timeline = [*old.timeline, *new.timeline]
        self._live[new.id] = new
        self._note(new, "resumed", detail)

    def add_ended(self, request: Request, state: State, reason: str) -> None:
        """A request that an earlier scheduler left live ends here. Raises TransitionError when its id is known."""
        if self.find(request.id) is not None:
            raise TransitionError(f"{request.id} is known already")
        self._live[request.id] = request
        request.reason = reason
        self.move(request, state, {"reason": reason} if reason else {})

    def move(self, request: Request, to: State, detail: dict[str, str] | None = None) -> None:
        """Changes the state; TransitionError, counted, where the table does not have the change."""
        if to not in TRANSITIONS[request.state]:
            self.refused_transitions += 1
            raise TransitionError(f"{request.id}: {request.state} -> {to}")
        request.state = to
        self._note(request, to.value.lower(), detail or {})
        if to not in LIVE:
            self._retire(request)

    def report(
        self, request: Request, *, completion_tokens: int, cached_tokens: int, events: Sequence[TimelineEvent]
    ) -> None:
        """What a gateway reports of a request, taken once: counts, and events that others saw, in order of time."""
        if request.reported:
            return
        request.reported = True
        request.completion_tokens, request.cached_tokens = completion_tokens, cached_tokens
        request.timeline = sorted([*request.timeline, *events], key=lambda event: event.time)
        self._changed(request)

    def _note(self, request: Request, event: str, detail: dict[str, str]) -> None:
        request.timeline.append(TimelineEvent(self._wall(), event, detail))
        self._changed(request)

    def _changed(self, request: Request) -> None:
        self._changes += 1
        request.version = self._changes
        self._journal(request)

    def _retire(self, request: Request) -> None:
        request.submission = replace(
            request.submission, prompt_ids=()
        )  # thousands of ended prompts are a lot of memory
        request.granules = None
        self.ended_by_state[request.state] += 1
        del self._live[request.id]
        self._ended[request.id] = request
        while len(self._ended) > self._ended_kept:
            self._ended.popitem(last=False)
