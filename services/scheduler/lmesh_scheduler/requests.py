"""The request table: every request's state, changed only here and only along the transition table."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

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
    prompt_ids: tuple[int, ...]
    max_tokens: int
    n: int = 1
    deadline_s: float = 0.0
    queue_timeout_s: float = 0.0
    tenant: str = ""
    priority: int = 0
    traceparent: str = ""


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One request. Only `RequestTable.move` writes `state`, `version` and `timeline`."""

    submission: Submission
    gateway_id: str
    deadline: float  # by the scheduler's clock; inf for none
    queue_deadline: float
    order: int  # of arrival
    state: State = State.QUEUED
    version: int = 0  # grows with every change; the journal's compare-and-set goes by it
    durable_version: int = 0  # the last one that Redis confirmed
    worker_id: str = ""
    epoch: str = ""
    lease: int = 0
    reason: str = ""
    completion_tokens: int = 0
    cached_tokens: int = 0
    timeline: list[TimelineEvent] = field(default_factory=list)
    span: Span | None = None  # while queued

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


class RequestTable:
    """Live requests, and the last ended ones."""

    def __init__(self, *, ended_kept: int, wall: Callable[[], float], journal: Callable[[Request], None]) -> None:
        self._live: dict[str, Request] = {}
        self._ended: OrderedDict[str, Request] = OrderedDict()
        self._ended_kept = ended_kept
        self._wall = wall
        self._journal = journal
        self.refused_transitions = 0

    def __len__(self) -> int:
        return len(self._live)

    def live(self) -> list[Request]:
        """All live requests."""
        return list(self._live.values())

    def find(self, request_id: str) -> Request | None:
        """A live or lately ended request."""
        return self._live.get(request_id) or self._ended.get(request_id)

    def add(self, request: Request) -> None:
        """A new request, QUEUED. Its id must not be live."""
        if request.id in self._live:
            raise TransitionError(f"{request.id} is live already")
        self._ended.pop(request.id, None)
        self._live[request.id] = request
        self._note(request, "queued", {})

    def move(self, request: Request, to: State, detail: dict[str, str] | None = None) -> None:
        """Changes the state; TransitionError, counted, where the table does not have the change."""
        if to not in TRANSITIONS[request.state]:
            self.refused_transitions += 1
            raise TransitionError(f"{request.id}: {request.state} -> {to}")
        request.state = to
        self._note(request, to.value.lower(), detail or {})
        if to not in LIVE:
            self._retire(request)

    def record(self, request: Request, events: list[TimelineEvent]) -> None:
        """Adds events that others saw, in order of time; the last state's stays last."""
        request.timeline = sorted([*request.timeline, *events], key=lambda e: e.time)
        self._changed(request)

    def _note(self, request: Request, event: str, detail: dict[str, str]) -> None:
        request.timeline.append(TimelineEvent(self._wall(), event, detail))
        self._changed(request)

    def _changed(self, request: Request) -> None:
        request.version += 1
        self._journal(request)

    def _retire(self, request: Request) -> None:
        del self._live[request.id]
        self._ended[request.id] = request
        while len(self._ended) > self._ended_kept:
            self._ended.popitem(last=False)
