"""Where a request is, as its gateway is told again when it may have missed it."""

from __future__ import annotations

from lmesh_scheduler import errors
from lmesh_scheduler.fleet import Fleet, Worker
from lmesh_scheduler.gateways import Event, Expired, Gateway, Placed, Queued, Revoked
from lmesh_scheduler.placements import Placements
from lmesh_scheduler.requests import Request, State


def tell_standing(gateway: Gateway, request: Request, placements: Placements, fleet: Fleet) -> None:
    """Tells a gateway of a lease that its request lost, and where the request is now."""
    if request.live and request.lost_lease:
        gateway.tell(Revoked(request.id, request.lost_lease, request.lost_reason, requeued=True))
    event = _standing(request, placements, fleet)
    if event is not None:
        gateway.tell(event)


def _standing(request: Request, placements: Placements, fleet: Fleet) -> Event | None:
    """In the words that its gateway was told once; None where there were none."""
    if request.state is State.QUEUED:
        return Queued(request.id, placements.position(request))
    if request.live:
        worker = fleet.find(request.worker_id, request.epoch)
        return None if worker is None else placed(request, worker)
    if request.reported:
        return None
    if request.state is State.EXPIRED:
        return Expired(request.id, not request.lease)
    if request.reason == errors.GATEWAY_LOST and request.lease:
        return None  # its stream may well have gone on meanwhile: it needs no scheduler
    return Revoked(request.id, request.lease, request.reason or errors.CANCELLED)


def placed(request: Request, worker: Worker) -> Placed:
    """The placement that a request has on a worker."""
    hello = worker.hello
    return Placed(request.id, hello.worker_id, hello.epoch, hello.address, request.lease)
