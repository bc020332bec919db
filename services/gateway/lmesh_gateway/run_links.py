"""All Run links of this gateway process: one to each boot of each worker that it has requests on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from lmesh_chassis.tls import PLAIN, Tls

from lmesh_gateway.placement import Leg
from lmesh_gateway.run_link import RunLink
from lmesh_gateway.slots import SequenceListener, SequenceStart

Abort = Callable[[], None]


class RunLinks:
    """Opens links as placements need them; `on_worker_lost(worker_id, epoch)` hears of each worker given up."""

    def __init__(
        self, gateway_id: str, *, grace_s: float, on_worker_lost: Callable[[str, str], None], tls: Tls = PLAIN
    ) -> None:
        self._tls = tls
        self._gateway_id = gateway_id
        self._grace_s = grace_s
        self._on_worker_lost = on_worker_lost
        self._links: dict[tuple[str, str], RunLink] = {}

    def start(self, leg: Leg, start: SequenceStart, listener: SequenceListener) -> Abort:
        """Runs a sequence on the leg's worker; the returned function drops it, at any time and any number of times."""
        link = self._links.get((leg.worker_id, leg.epoch))
        if link is None:
            link = RunLink(leg, self._gateway_id, grace_s=self._grace_s, on_gone=self._forget, tls=self._tls)
            self._links[(leg.worker_id, leg.epoch)] = link
        slot = link.start(start, listener)
        return lambda: link.abort(slot)

    def _forget(self, link: RunLink, lost: bool) -> None:
        self._links.pop((link.worker_id, link.epoch), None)
        if lost:
            self._on_worker_lost(link.worker_id, link.epoch)

    async def close(self) -> None:
        """Says what is left to say on every link and ends them."""
        await asyncio.gather(*(link.close() for link in list(self._links.values())))
