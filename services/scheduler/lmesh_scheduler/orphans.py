"""Requests that an earlier scheduler left live and that no gateway has told this one of yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

from lmesh_scheduler import errors
from lmesh_scheduler.gateways import Gateway, Refused
from lmesh_scheduler.requests import Request, RequestTable, State

_A_TICK = 1000  # ends of one tick: each is journaled, and the links want their turn


class Orphans:
    """What Redis told of them at boot. Their gateways have `lost_s` from then on to come back for them.

    Until then they are live to everybody: others cannot have their ids, a resume takes them over, a Cancel ends them.
    """

    def __init__(self, requests: RequestTable, *, lost_s: float, clock: Callable[[], float]) -> None:
        self._requests, self._clock = requests, clock
        self._until = clock() + lost_s
        self._found: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._found)

    def learn(self, found: Iterable[Request]) -> None:
        """Live records of an earlier scheduler; what the table has already is left alone."""
        self._found.update({r.id: r for r in found if self._requests.find(r.id) is None})

    def find(self, request_id: str) -> Request | None:
        """The orphan of that id, as its record has it."""
        return self._found.get(request_id)

    def restore(self, gateway: Gateway, request_id: str) -> None:
        """A gateway comes back after all with what was given up as lost with it: an orphan again, for it to claim."""
        known = self._requests.find(request_id)
        if known is None or known.gateway_id != gateway.id or known.reported:
            return
        if not known.live and known.reason == errors.GATEWAY_LOST:
            self._requests.forget(known)
            self._found[request_id] = known

    def claim(self, request: Request) -> None:
        """`request` is about to enter the table: it is no orphan, and what its record tells of its past is kept."""
        orphan = self._found.pop(request.id, None)
        if orphan is not None:
            request.timeline = [*orphan.timeline, *request.timeline]
            request.owner_epoch = max(request.owner_epoch, orphan.owner_epoch)

    def refusal(self, gateway: Gateway, request_id: str) -> Refused | None:
        """Why a gateway cannot submit under that id: it is another's, who may come back."""
        orphan = self._found.get(request_id)
        if orphan is None or orphan.gateway_id == gateway.id:
            return None
        message = f"request id {request_id} is live; choose another"
        return Refused(request_id, errors.DUPLICATE_REQUEST_ID, message, 0)

    def overtaken(self, gateway: Gateway, request_id: str, lease: int) -> bool:
        """Whether the record shows that another gateway had the request under a later lease."""
        orphan = self._found.get(request_id)
        return orphan is not None and orphan.gateway_id != gateway.id and orphan.lease > lease

    def cancel(self, request_id: str) -> bool:
        """Ends one for its client; a gateway that comes back for it is told. False when there is none of that id."""
        if request_id not in self._found:
            return False
        self._end(request_id, State.CANCELLED, "")
        return True

    def tick(self) -> None:
        """Once their time is over, ends those whose gateways did not come back for them."""
        if self._found and self._clock() >= self._until:
            for request_id in list(islice(self._found, _A_TICK)):
                self._end(request_id, State.FAILED, errors.GATEWAY_LOST)

    def _end(self, request_id: str, state: State, reason: str) -> None:
        self._requests.add_ended(self._found.pop(request_id), state, reason)
