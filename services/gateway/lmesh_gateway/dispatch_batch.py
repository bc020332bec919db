"""What goes to the scheduler in one message, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmesh_gateway.placement import Leg, Report
from lmesh_gateway.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class LegLost:
    """A placement that this gateway lost while its request goes on; `reason` is for the timeline."""

    request_id: str
    lease: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Announce:
    """A placed request as this gateway holds it, for a scheduler that may not know it."""

    plan: Plan
    leg: Leg
    started: bool
    delivered_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeOver:
    """A request that another gateway held, or this one without a client; `owner_epoch` is from the ledger."""

    plan: Plan
    owner_epoch: int
    delivered_tokens: int


@dataclass(slots=True, kw_only=True)
class DispatchBatch:
    """One message. Announces go in messages of their own, before whatever else is said about their requests."""

    submits: list[Plan] = field(default_factory=list)
    cancels: list[str] = field(default_factory=list)  # for a client, wherever they are
    withdrawals: list[str] = field(default_factory=list)  # this gateway's own
    started: list[tuple[str, int]] = field(default_factory=list)
    finished: list[Report] = field(default_factory=list)
    workers_lost: list[tuple[str, str]] = field(default_factory=list)
    legs_lost: list[LegLost] = field(default_factory=list)
    announces: list[Announce] = field(default_factory=list)
    takeovers: list[TakeOver] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Nothing to say."""
        return not (
            self.submits
            or self.cancels
            or self.withdrawals
            or self.started
            or self.finished
            or self.workers_lost
            or self.legs_lost
            or self.announces
            or self.takeovers
        )
