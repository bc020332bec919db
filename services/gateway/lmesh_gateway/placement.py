"""What the gateway and the scheduler tell each other about a request, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from lmesh_chassis.errors import ServiceError

from lmesh_gateway.plan import Plan


class Outcome(IntEnum):
    """How a request ended; the numbers are those of lmesh.scheduler.v1.Outcome."""

    FINISHED = 1
    CANCELLED = 2
    EXPIRED = 3
    FAILED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """One worker's part in a placement; `lease` fences everything that is said about it."""

    worker_id: str
    epoch: str
    address: str
    lease: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEvent:
    """One event of a request's timeline; `time` is Unix time in seconds."""

    time: float
    event: str
    detail: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The terminal report of a placed request; `reason` is for FAILED."""

    request_id: str
    lease: int
    outcome: Outcome
    reason: str = ""
    completion_tokens: int = 0
    cached_tokens: int = 0
    events: tuple[RequestEvent, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """A request as the scheduler knows it; `state` as in lmesh.scheduler.v1.DescribeRequestResponse."""

    request_id: str
    state: str
    model: str
    worker_id: str
    timeline: tuple[RequestEvent, ...]
    failure_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    durable: bool
    tenant: str = ""

    @property
    def ended(self) -> bool:
        """Whether the state is a terminal one."""
        return self.state in ("FINISHED", "CANCELLED", "EXPIRED", "FAILED")


class PlacementListener(Protocol):
    """The owner of a submitted request. Called on the event loop; must not block or raise."""

    def on_admitted(self) -> None:
        """The scheduler has it in its queue."""
        ...

    def on_placed(self, leg: Leg) -> None:
        """A worker is to run it; whatever ran under an earlier lease is not to be heard any more."""
        ...

    def on_requeued(self) -> None:
        """Its placement was taken back and it waits for the next one."""
        ...

    @property
    def delivered_tokens(self) -> int:
        """New tokens so far, over all choices."""
        ...

    def on_ended(self, error: ServiceError, outcome: Outcome) -> None:
        """The scheduler refused, revoked or expired it, or went away before placing it."""
        ...


class SchedulerPort(Protocol):
    """What a live request asks of the scheduler."""

    def submit(self, plan: Plan, listener: PlacementListener) -> None:
        """Asks for admission. Raises DuplicateRequestIdError or SchedulerUnavailableError."""
        ...

    def take_over(self, plan: Plan, listener: PlacementListener, owner_epoch: int) -> None:
        """Asks for a request that another gateway held. Raises as `submit`."""
        ...

    def disown(self, request_id: str) -> None:
        """The request is another gateway's now: nothing is said of it any more."""
        ...

    def withdraw(self, request_id: str) -> None:
        """The request, not placed now, is no longer wanted."""
        ...

    def started(self, request_id: str, lease: int) -> None:
        """Its first output has come."""
        ...

    def leg_lost(self, request_id: str, lease: int, reason: str) -> None:
        """Its placement is lost, once a placement; the next one comes by itself. `reason` is for the timeline."""
        ...

    def finished(self, report: Report) -> None:
        """It has ended; exactly once for each placed request."""
        ...
