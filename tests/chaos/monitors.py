"""What must hold at every step, and once everything is at rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from lmesh_gateway.ledger_record import record_key
from lmesh_scheduler.errors import GATEWAY_LOST
from lmesh_scheduler.journal import LIVE_KEY, Journal
from lmesh_scheduler.requests import LIVE, Request, State
from lmesh_worker.messages import Start
from lmesh_worker.run_sessions import RunSessions, StartOrder
from lmesh_worker.session import Session

from tests.chaos.nodes import Mesh
from tests.chaos.oracle import Spec, token
from tests.chaos.sim_redis import SimStore


class Monitor:
    """Watches records, leases and starts; `fail` hears of everything that must not be."""

    def __init__(self, specs: dict[str, Spec], fail: Callable[[str], None]) -> None:
        self._specs, self._fail = specs, fail
        self._states: dict[tuple[int, str], tuple[State, int, str]] = {}  # by incarnation and request
        self._leases: dict[int, tuple[str, str]] = {}  # lease -> request, the worker's epoch

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sees every change of every record."""
        note = Journal.note

        def noted(journal: Journal, request: Request) -> None:
            self._changed(journal._incarnation, request)
            note(journal, request)

        start = RunSessions.start

        def started(sessions: RunSessions, session: Session, order: StartOrder) -> None:
            granted = self._leases.get(order.lease)
            if granted != (order.request_id, sessions._epoch):
                self._fail(f"{order.request_id} runs in {sessions._epoch} under {order.lease}, which is for {granted}")
            start(sessions, session, order)

        with mock.patch.object(Journal, "note", noted), mock.patch.object(RunSessions, "start", started):
            yield

    def _changed(self, incarnation: int, request: Request) -> None:
        key = (incarnation, request.id)
        before, before_lease, reason = self._states.get(key, (None, 0, ""))
        self._states[key] = (request.state, request.lease, request.reason)
        # Given up with its gateway, that came back all the same; or another carries on, as when an end was lost.
        again = reason == GATEWAY_LOST or before is State.FINISHED
        back = again and request.timeline[-1].event in ("announced", "resumed")
        if before is not None and before not in LIVE and request.state is not before and not back:
            self._fail(f"{request.id} went from {before} to {request.state}: it ended twice")
        if request.state not in (State.PLACED, State.RUNNING):
            return
        mine = (request.id, request.epoch)
        owner = self._leases.setdefault(request.lease, mine)
        if owner != mine or not request.lease:
            self._fail(f"lease {request.lease} was given to {owner} and to {mine}")
        if before in (State.PLACED, State.RUNNING) and before_lease != request.lease:
            self._fail(f"{request.id} has lease {request.lease} while {before_lease} was not taken back")

    def on_start(self, start: Start) -> None:
        """A sequence begins in an engine."""
        spec = self._specs[start.request_id]
        prompt, rest = tuple(start.ids[: start.prompt_len]), start.ids[start.prompt_len :]
        if prompt != spec.prompt or start.params.seed != spec.seed or start.params.max_tokens != spec.max_tokens:
            self._fail(f"{start.request_id}.{start.choice} was started as another request: {start}")
        first = len(spec.prompt)
        due = [token(spec.seed, start.choice, first + i) for i in range(len(rest))]
        if rest != due:
            self._fail(f"{start.request_id}.{start.choice} goes on from {rest}, not from {due}")
        if len(rest) >= len(spec.whole[start.choice].ids):
            self._fail(f"{start.request_id}.{start.choice} was started again when it had ended")


class Owners:
    """The ledger's records: who owns a request is counted upwards, until Redis loses all."""

    def __init__(self, store: SimStore, request_ids: Iterable[str]) -> None:
        self._store, self._keys = store, [record_key(request_id) for request_id in request_ids]
        self._known: dict[tuple[str, bytes], int] = {}

    def faults(self) -> Iterator[str]:
        """Records that went back to an earlier owner since they were last looked at."""
        pipe = self._store.client.pipeline(transaction=False)
        for key in self._keys:
            pipe.hmget(key, "nonce", "epoch")
        for key, (nonce, epoch) in zip(self._keys, pipe.execute(), strict=True):
            if nonce is None:
                self._known.clear()
                continue
            known, self._known[key, nonce] = self._known.get((key, nonce), 0), int(epoch)
            if int(epoch) < known:
                yield f"{key} was its owner {known}'s, and is owner {int(epoch)}'s again"


def books(mesh: Mesh) -> Iterator[str]:
    """Faults of the scheduler's own books, which must agree at any time."""
    if not mesh.scheduler.up or mesh.scheduler.part is None:
        return
    core = mesh.scheduler.part.scheduler
    holders: dict[str, str] = {}
    for worker in core.fleet.workers():
        if worker.placed != sum(worker.placements.values()) or worker.placed < 0:
            yield f"{worker.hello.worker_id} counts {worker.placed} sequences, and holds {worker.placements}"
        for request_id in worker.placements:
            if request_id in holders:
                yield f"{request_id} is placed on {holders[request_id]} and on {worker.hello.worker_id}"
            holders[request_id] = worker.hello.worker_id
    for request in core.requests.live():
        if request.state is State.QUEUED and request.id in holders:
            yield f"{request.id} is queued, and placed on {holders[request.id]}"


def strangers(mesh: Mesh) -> Iterator[str]:
    """What runs and is counted nowhere: not to be, once everybody has been linked for a while."""
    known = {request.lease for request in mesh.scheduler.part.scheduler.requests.live()}
    for node in mesh.workers:
        for sequence in node.part.sessions._sequences.values():
            if sequence.lease not in known:
                yield f"{node.name} runs a sequence under {sequence.lease}, of which the scheduler knows nothing"


def leftovers(mesh: Mesh) -> Iterator[str]:
    """What is left of requests when nobody wants anything any more."""
    core = mesh.scheduler.part.scheduler
    yield from (f"the scheduler holds {r.id} {r.state} of {r.gateway_id[:4]}" for r in core.requests.live())
    if listed := mesh.store.client.zrange(LIVE_KEY, 0, -1):
        yield f"Redis says that {listed} are live"
    for worker in core.fleet.workers():
        if worker.placements or worker.placed:
            yield f"the scheduler counts {worker.placed} on {worker.hello.worker_id}: {worker.placements}"
    gateways = {gateway.part.gateway_id for gateway in mesh.gateways}
    for node in mesh.workers:
        if gone := node.part.sessions._sessions.keys() - gateways:
            yield f"{node.name} keeps sessions of {len(gone)} gateways that are gone"
        if node.part.sessions.live:
            yield f"{node.name} holds {node.part.sessions.live} sequences"
        assert node.engine is not None
        if node.engine.sequences:
            yield f"{node.name}'s engine runs {[r.start.request_id for r in node.engine.sequences.values()]}"
    for gateway in mesh.gateways:
        yield from _gateway_leftovers(gateway.part, gateway.name)


def _gateway_leftovers(gateway: Any, name: str) -> Iterator[str]:
    session = gateway._dispatch._session
    if session._live:
        yield f"{name} holds {sorted(session._live)}"
    table = gateway.generator._table
    if len(table) or table._requests:
        yield f"{name} counts {len(table)} live requests: {sorted(table._requests)}"
    if gateway._ledger._dirty:
        yield f"{name} has still to write {sorted(gateway._ledger._dirty)}"
    for link in gateway._runs._links.values():
        if not link._session.idle:
            yield f"{name} holds slots at {link.worker_id}"


def healthy(mesh: Mesh) -> Iterator[str]:
    """What of the mesh itself has not come back."""
    for node in mesh.nodes:
        if not node.up or node.part is None:
            yield f"{node.name} is down"
            return
    core = mesh.scheduler.part.scheduler
    known = {(w.hello.worker_id, w.hello.epoch) for w in core.fleet.workers() if w.linked}
    for node in mesh.workers:
        if (node.name, node.part.epoch) not in known:
            yield f"{node.name} has not joined"
    for gateway in mesh.gateways:
        if not gateway.part.ready:
            yield f"{gateway.name} is not ready"
