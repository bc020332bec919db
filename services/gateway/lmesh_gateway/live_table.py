"""All requests of this gateway process that live or still have a client."""

from __future__ import annotations

from lmesh_gateway.live_request import LiveRequest
from lmesh_gateway.metrics import LIVE


class LiveTable:
    """Counts requests from their arrival on, and finds them by id once they are submitted."""

    def __init__(self) -> None:
        self._requests: dict[str, LiveRequest] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def enter(self) -> None:
        """A request has arrived."""
        self._count += 1
        LIVE.inc()

    def leave(self) -> None:
        """A request is gone."""
        self._count -= 1
        LIVE.dec()

    def put(self, live: LiveRequest) -> None:
        """It can be found; it has entered."""
        self._requests[live.plan.request_id] = live

    def closed(self, live: LiveRequest) -> None:
        """It has neither life nor client."""
        if self._requests.get(live.plan.request_id) is live:
            del self._requests[live.plan.request_id]
        live.span.end()
        self.leave()

    def find(self, request_id: str) -> LiveRequest | None:
        """The request of that id that is here, live or with its client."""
        return self._requests.get(request_id)

    def abandon(self) -> None:
        """This process leaves: what still lives is left to other gateways."""
        for live in list(self._requests.values()):
            live.abandon()
