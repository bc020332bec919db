"""Which worker holds which adapter: asked for when published, when a worker joins, and when a request needs one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from lmesh_scheduler.adapters.registry import AdapterRegistry, Published
from lmesh_scheduler.fleet import Fleet, Worker

BANK_FULL = "ADAPTER_BANK_FULL"
RETRY_S = 30.0  # after a worker could not load an adapter
BUSY_RETRY_S = 1.0  # after it had no room because all that it holds is in use


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a worker does not hold an adapter; it is not asked again before `until`."""

    reason: str
    message: str
    until: float


@dataclass(slots=True)
class Shelf:
    """One worker's adapters as the scheduler knows them, by content digest."""

    held: dict[str, float] = field(default_factory=dict)  # and when each was last placed
    asked: dict[str, bool] = field(default_factory=dict)  # loads on their way; True: a request waits for it
    faults: dict[str, Fault] = field(default_factory=dict)
    loads: list[tuple[str, str]] = field(default_factory=list)  # (digest, artifact) that it is to be told
    drops: list[str] = field(default_factory=list)


class Residency:
    """Synchronous, as the scheduler is. `in_use` gives the digests that a worker's placements run with."""

    def __init__(
        self,
        registry: AdapterRegistry,
        fleet: Fleet,
        *,
        clock: Callable[[], float],
        in_use: Callable[[Worker], set[str]],
    ) -> None:
        self._registry, self._fleet, self._clock, self._in_use = registry, fleet, clock, in_use
        self._shelves: dict[tuple[str, str], Shelf] = {}  # by worker's id and epoch
        self._artifacts: dict[str, str] = {}  # of what is offered and not published yet

    def shelf(self, worker: Worker) -> Shelf:
        """The shelf of a worker's boot."""
        return self._shelves.setdefault((worker.hello.worker_id, worker.hello.epoch), Shelf())

    def joined(self, worker: Worker, held: Iterable[str]) -> None:
        """A link begins: the worker's word is the truth. The newest version of everything is to be there."""
        boots = {(w.hello.worker_id, w.hello.epoch) for w in self._fleet.workers()}
        self._shelves = {boot: shelf for boot, shelf in self._shelves.items() if boot in boots}
        shelf = Shelf(held=dict.fromkeys(held, self._clock()))
        self._shelves[worker.hello.worker_id, worker.hello.epoch] = shelf
        model = worker.hello.model
        known = self._registry.of_model(model.id, model.digest)
        newest = {(entry.tenant, entry.name): entry.digest for entry in known}
        for digest in newest.values():
            self._ask(worker, digest, needed=False)

    def told(self, worker: Worker, digest: str, *, held: bool, reason: str = "", message: str = "") -> None:
        """A worker says how an adapter stands."""
        shelf = self.shelf(worker)
        needed = shelf.asked.pop(digest, False)
        if held and self._artifact(digest) is None:
            self._drop(worker, digest)  # deleted while it was on its way
        elif held:
            shelf.held[digest] = self._clock()
            shelf.faults.pop(digest, None)
        elif reason == BANK_FULL:
            self._no_room(worker, digest, message, needed=needed)
        elif reason:
            shelf.held.pop(digest, None)
            shelf.faults[digest] = Fault(reason, message, self._clock() + RETRY_S)

    def _no_room(self, worker: Worker, digest: str, message: str, *, needed: bool) -> None:
        """Makes room for what a request waits for, by what was used longest ago; else it is tried again later."""
        shelf = self.shelf(worker)
        if not needed:
            return
        idle = shelf.held.keys() - self._in_use(worker)
        if not idle:
            shelf.faults[digest] = Fault(BANK_FULL, message, self._clock() + BUSY_RETRY_S)
            return
        self._drop(worker, min(idle, key=lambda held: (shelf.held[held], held)))
        self._ask(worker, digest, needed=True)

    def holds(self, worker: Worker, digest: str) -> bool:
        """Whether a request with this adapter ("" for none) may be placed there."""
        return not digest or digest in self.shelf(worker).held

    def used(self, worker: Worker, digest: str) -> None:
        """A request with it was placed there."""
        if digest:
            self.shelf(worker).held[digest] = self._clock()

    def want(self, model: str, digest: str) -> None:
        """A request waits for it, and no worker with room holds it: one more is to, the least loaded that can."""
        workers = sorted(self._fleet.serving(model), key=lambda w: (w.placed, w.hello.worker_id))
        asked = [worker for worker in workers if digest in self.shelf(worker).asked]
        for worker in asked or workers:
            self._ask(worker, digest, needed=True)
            if digest in self.shelf(worker).asked:
                return

    def offer(self, entry: Published) -> None:
        """Has every worker of its model load what is about to be published."""
        self._artifacts[entry.digest] = entry.artifact
        for worker in self._fleet.serving(entry.model):
            self.shelf(worker).faults.pop(entry.digest, None)
            self._ask(worker, entry.digest, needed=True)

    def settled(self, entry: Published) -> bool:
        """Whether an offer has come to something: a worker holds it, or none will."""
        return self.holders(entry.model, entry.digest) > 0 or self.hopeless(entry.model, entry.digest) is not None

    def withdraw(self, digest: str) -> None:
        """An offer was published by now, or not taken up."""
        self._artifacts.pop(digest, None)

    def tick(self) -> None:
        """Workers let go what is published no more, when nothing is placed with it there."""
        for worker in self._fleet.workers():
            gone = [digest for digest in self.shelf(worker).held if self._artifact(digest) is None]
            if gone:
                busy = self._in_use(worker)
                for digest in gone:
                    if digest not in busy:
                        self._drop(worker, digest)

    def holders(self, model: str, digest: str) -> int:
        """Workers of the model that hold it."""
        return sum(1 for worker in self._fleet.serving(model) if digest in self.shelf(worker).held)

    def hopeless(self, model: str, digest: str) -> Fault | None:
        """Why no worker that is there will hold it soon; None when one does or may, or when there is none at all."""
        workers = self._fleet.serving(model)
        faults = [self.shelf(worker).faults.get(digest) for worker in workers if not self.holds(worker, digest)]
        if not workers or len(faults) < len(workers):
            return None
        if self._artifact(digest) is None:
            return Fault("ADAPTER_NOT_FOUND", f"no adapter of content {digest[:12]} is published any more", 0.0)
        told = [fault for fault in faults if fault is not None and fault.reason != BANK_FULL]
        return told[0] if len(told) == len(workers) else None

    def _artifact(self, digest: str) -> str | None:
        published = self._registry.with_digest(digest)
        return published[0].artifact if published else self._artifacts.get(digest)

    def _ask(self, worker: Worker, digest: str, *, needed: bool) -> None:
        shelf, artifact = self.shelf(worker), self._artifact(digest)
        if digest in shelf.held or artifact is None:
            return
        if digest in shelf.asked:
            shelf.asked[digest] |= needed
            return
        fault = shelf.faults.get(digest)
        if fault is not None and self._clock() < fault.until:
            return
        shelf.faults.pop(digest, None)
        shelf.asked[digest] = needed
        shelf.loads.append((digest, artifact))
        worker.wake()

    def _drop(self, worker: Worker, digest: str) -> None:
        shelf = self.shelf(worker)
        shelf.held.pop(digest, None)
        shelf.asked.pop(digest, None)
        shelf.loads = [load for load in shelf.loads if load[0] != digest]
        shelf.drops.append(digest)
        worker.wake()
