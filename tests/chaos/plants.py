"""Faults planted into the mesh's own code, to show that the simulation finds such as these.

A plant takes away one of the checks that hold the mesh together. It names the shape of life in which it matters.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from lmesh_gateway import ledger_entry, replay, resume, running_leg
from lmesh_gateway.delivery import Delivery
from lmesh_gateway.dispatch_session import DispatchSession
from lmesh_gateway.ledger_scripts import Script
from lmesh_gateway.live_request import LiveRequest
from lmesh_gateway.run_session import RunSession
from lmesh_gateway.running_leg import RunningLeg
from lmesh_scheduler.fleet import Worker
from lmesh_scheduler.orphans import Orphans
from lmesh_scheduler.scheduler import Scheduler
from lmesh_worker.run_sessions import RunSessions

from tests.chaos.simulation import Shape

DEATHS = frozenset({"worker killed"})
LINKS = frozenset({"link broken", "link stalled"})


@dataclass(frozen=True)
class Plant:
    """`apply` holds it in place; it is found within `seeds` lives of `shape`."""

    apply: Callable[[], AbstractContextManager[Any]]
    shape: Shape
    seeds: int = 150


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _no(cls: type, name: str) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.object(cls, name, _nothing)


def _wrapped(cls: type, name: str, make: Callable[[Any], Any]) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: mock.patch.object(cls, name, make(getattr(cls, name)))


def _any_epoch(attach: Any) -> Any:
    return lambda self, gateway_id, epoch, after: attach(self, gateway_id, self._epoch, after)


def _loses_last(start: Any) -> Any:
    def patched(plan: Any, leg: Any, choice: Any) -> Any:
        ids, choice.ids = choice.ids, choice.ids[:-1]
        try:
            return start(plan, leg, choice)
        finally:
            choice.ids = ids

    return patched


def _short_continuation() -> AbstractContextManager[Any]:
    return mock.patch.object(running_leg, "_start", _loses_last(running_leg._start))


def _never_expires(detach: Any) -> Any:
    def patched(self: RunSessions, session: Any, stream: Any) -> None:
        detach(self, session, stream)
        if session.expiry is not None:
            session.expiry.cancel()

    return patched


def _forgets_cursor() -> AbstractContextManager[Any]:
    whole = lambda plan, choice, ids, end, cursor: replay.rest_of(plan, choice, ids, end, 0)  # noqa: E731
    return mock.patch.object(resume, "rest_of", whole)


def _shows_at_once(add: Any) -> Any:
    def patched(self: Delivery, *output: Any) -> None:
        plan, self._plan = self._plan, replace(self._plan, sync=False)
        add(self, *output)
        self._plan = plan

    return patched


def _cancels_detached(leave: Any) -> Any:
    def patched(self: LiveRequest, outbox: Any) -> None:
        self.plan = replace(self.plan, detach_ttl_s=None)
        leave(self, outbox)

    return patched


def _no_owner_epoch() -> AbstractContextManager[Any]:
    fence = "if held[1] == nonce and tonumber(held[3]) > epoch then return -1 end"
    text = ledger_entry.WRITE.text
    assert fence in text
    return mock.patch.object(ledger_entry, "WRITE", Script(text.replace(fence, "")))


AWAY = frozenset({"gateway killed", "gateway paused"})

PLANTS: dict[str, Plant] = {
    "a worker's room is not given back": Plant(_no(Worker, "take_back"), Shape(faults=0), seeds=3),
    "a worker takes whoever asks for an earlier boot": Plant(
        _wrapped(RunSessions, "attach", _any_epoch),
        Shape(kinds=DEATHS, faults=8, clients=10, slow=True),
    ),
    "a worker keeps a lost gateway's sequences for good": Plant(
        _wrapped(RunSessions, "detach", _never_expires), Shape(kinds=frozenset({"gateway killed"}), faults=3)
    ),
    "a start that a break swallowed is not said again": Plant(
        _no(RunSession, "connected"), Shape(kinds=LINKS, faults=12, slow=True)
    ),
    "a report that a break swallowed is not said again": Plant(
        _no(DispatchSession, "_report_again"), Shape(kinds=LINKS, faults=12, slow=True)
    ),
    "a gateway that comes back is not told where its requests stand": Plant(
        _no(Scheduler, "_tell_standing"), Shape(kinds=LINKS, faults=12, slow=True)
    ),
    "a lost gateway's requests are kept": Plant(
        _no(Scheduler, "_drop_requests_of"), Shape(kinds=frozenset({"gateway killed"}), faults=3)
    ),
    "a new scheduler does not look for what the one before it left": Plant(
        _no(Orphans, "learn"), Shape(kinds=frozenset({"gateway killed", "scheduler killed"}), faults=8)
    ),
    "a lost leg is not told": Plant(_no(DispatchSession, "_say_lost"), Shape(kinds=LINKS, faults=12, slow=True)),
    "what runs is not announced to a new scheduler": Plant(
        _no(DispatchSession, "_announce"), Shape(kinds=frozenset({"scheduler killed"}), faults=3, clients=10)
    ),
    "a continuation begins one id too early": Plant(_short_continuation, Shape(kinds=DEATHS, faults=6)),
    "an earlier leg goes on beside the new one": Plant(
        _no(RunningLeg, "drop"), Shape(kinds=DEATHS | LINKS, faults=8, slow=True)
    ),
    "a replay begins at the beginning": Plant(_forgets_cursor, Shape(kinds=AWAY, faults=2)),
    "a client is shown what the ledger does not have": Plant(
        _wrapped(Delivery, "add", _shows_at_once), Shape(kinds=frozenset({"gateway killed", "redis away"}), faults=6)
    ),
    "a detached request ends with its client": Plant(
        _wrapped(LiveRequest, "leave", _cancels_detached), Shape(faults=0)
    ),
    "the ledger takes what comes from an earlier owner": Plant(
        _no_owner_epoch, Shape(kinds=AWAY | LINKS, faults=8, clients=10, slow=True)
    ),
}
