"""Faults planted into the mesh's own code, to show that the simulation finds such as these.

A plant takes away one of the checks that hold the mesh together. It names the shape of life in which it matters.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from lmesh_gateway.dispatch_session import DispatchSession
from lmesh_gateway.run_session import RunSession
from lmesh_scheduler.fleet import Fleet, Worker
from lmesh_scheduler.scheduler import Scheduler
from lmesh_worker.run_sessions import RunSessions

from tests.chaos.simulation import Shape

WORKERS = frozenset({"worker killed", "engine killed", "worker paused", "engine stopped"})
SCHEDULERS = frozenset({"scheduler killed"})
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


def _takes_repeats(take: Any) -> Any:
    def patched(self: RunSession, step_seq: int, entries: Any) -> bool:
        self.last_seq = min(self.last_seq, step_seq - 1)
        return bool(take(self, step_seq, entries))

    return patched


def _any_epoch(attach: Any) -> Any:
    return lambda self, gateway_id, epoch, after: attach(self, gateway_id, self._epoch, after)


def _keeps_old_boot(join: Any) -> Any:
    """A worker's new boot is taken for the old one gone on: what was placed there is not lost."""

    def patched(self: Fleet, hello: Any) -> tuple[Worker, Worker | None]:
        worker, _ = join(self, hello)
        return worker, None

    return patched


def _forgets_reports(broken: Any) -> Any:
    def patched(self: DispatchSession) -> None:
        self._writing.finished.clear()
        broken(self)

    return patched


def _any_lease(finished: Any) -> Any:
    def patched(self: Scheduler, ending: Any) -> None:
        request = self.requests.find(ending.request_id)
        finished(self, ending if request is None else ending._replace(lease=request.lease))

    return patched


PLANTS: dict[str, Plant] = {
    "a worker's room is not given back": Plant(_no(Worker, "take_back"), Shape(faults=0), seeds=3),
    "a worker takes whoever asks for an earlier boot": Plant(
        _wrapped(RunSessions, "attach", _any_epoch), Shape(kinds=WORKERS, faults=6)
    ),
    "a scheduler does not see that a worker was born again": Plant(
        _wrapped(Fleet, "join", _keeps_old_boot), Shape(kinds=WORKERS, faults=6)
    ),
    "a report that a break swallowed is not said again": Plant(
        _wrapped(DispatchSession, "broken", _forgets_reports), Shape(kinds=LINKS, faults=12, slow=True)
    ),
    "a step that was sent again is taken again": Plant(
        _wrapped(RunSession, "take", _takes_repeats), Shape(kinds=LINKS, faults=12, slow=True)
    ),
    "a report under an earlier lease is taken": Plant(
        _wrapped(Scheduler, "finished", _any_lease), Shape(kinds=WORKERS | LINKS, faults=12, slow=True)
    ),
}
