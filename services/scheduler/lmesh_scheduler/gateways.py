"""The gateways' Dispatch links: what each is to be told next, and how long one that is gone is waited for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Queued:
    """Admitted; `position` requests go before it."""

    request_id: str
    position: int


@dataclass(frozen=True, slots=True)
class Placed:
    """Placed on one worker."""

    request_id: str
    worker_id: str
    epoch: str
    address: str
    lease: int


@dataclass(frozen=True, slots=True)
class Revoked:
    """A lease taken back, or (lease 0) a queued request ended by another party."""

    request_id: str
    lease: int
    reason: str
    requeued: bool = False  # it waits for another worker


@dataclass(frozen=True, slots=True)
class Expired:
    """The deadline passed."""

    request_id: str
    queued: bool


@dataclass(frozen=True, slots=True)
class Refused:
    """Not admitted."""

    request_id: str
    reason: str
    message: str
    retry_after_ms: int


Event = Queued | Placed | Revoked | Expired | Refused


@dataclass(slots=True, eq=False)
class Gateway:
    """One gateway process's boot."""

    id: str
    wake: Callable[[], None]  # its link has something to write
    linked: bool = True
    left_at: float = 0.0
    given_up: bool = False  # its queued requests have been dropped
    events: list[Event] = field(default_factory=list)
    catalog_due: bool = True

    def tell(self, event: Event) -> None:
        """Queues an event; all that gathers until the link writes goes in one message."""
        self.events.append(event)
        self.wake()

    def tell_catalog(self) -> None:
        """The catalog has changed."""
        self.catalog_due = True
        self.wake()

    def take(self, limit: int) -> list[Event]:
        """What is to be told next, at most `limit` events."""
        events, self.events = self.events[:limit], self.events[limit:]
        return events


class Gateways:
    """Gateways by id."""

    def __init__(self, *, grace_s: float, lost_s: float, clock: Callable[[], float]) -> None:
        self._grace_s, self._lost_s, self._clock = grace_s, lost_s, clock
        self._gateways: dict[str, Gateway] = {}

    def __len__(self) -> int:
        return sum(1 for g in self._gateways.values() if g.linked)

    def all(self) -> list[Gateway]:
        """Every gateway that is linked or may come back."""
        return list(self._gateways.values())

    def find(self, gateway_id: str) -> Gateway | None:
        """The gateway of this id."""
        return self._gateways.get(gateway_id)

    def current(self, gateway: Gateway) -> bool:
        """Whether no newer link of the same boot has taken over."""
        return self._gateways.get(gateway.id) is gateway

    def join(self, gateway_id: str, wake: Callable[[], None]) -> Gateway:
        """A link opens. Of what an earlier one had not told only refusals are kept: the rest is in the requests."""
        before = self._gateways.get(gateway_id)
        kept: list[Event] = [event for event in before.events if isinstance(event, Refused)] if before else []
        gateway = Gateway(gateway_id, wake, events=kept)
        self._gateways[gateway_id] = gateway
        if before is not None:
            before.wake()  # its link, if it still stands, sees that it is not the current one
        return gateway

    def leave(self, gateway: Gateway) -> None:
        """A link broke."""
        gateway.linked, gateway.left_at = False, self._clock()

    def given_up(self) -> list[Gateway]:
        """Gateways that did not come back in time, each once."""
        overdue = [g for g in self._away(self._grace_s) if not g.given_up]
        for gateway in overdue:
            gateway.given_up = True
        return overdue

    def lost(self) -> list[Gateway]:
        """Forgets and returns the gateways that have been away for so long that nothing of theirs can run any more."""
        gone = self._away(self._lost_s)
        for gateway in gone:
            del self._gateways[gateway.id]
        return gone

    def _away(self, seconds: float) -> list[Gateway]:
        limit = self._clock() - seconds
        return [g for g in self._gateways.values() if not g.linked and g.left_at < limit]
