"""The trainers: who they are, until when that holds, and what each is to be told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from lmesh_scheduler.errors import TrainerIdInUseError


class Ask(StrEnum):
    """What a run is asked; the names are those of lmesh.scheduler.v1.Wish."""

    STOP = "STOP"
    CANCEL = "CANCEL"
    DROP = "DROP"


class Gang(NamedTuple):
    """A trainer's place in a run of several."""

    node: int
    nodes: int
    rendezvous: str  # host:port of node 0


class Order(NamedTuple):
    """A job to run. `spec` is a serialised JobSpec whose model is a source."""

    job_id: str
    lease: int
    spec: bytes
    gang: Gang | None = None


class RunAsk(NamedTuple):
    """Something to ask a run."""

    job_id: str
    lease: int
    ask: Ask


class Ack(NamedTuple):
    """Reports of a run that were taken for good."""

    job_id: str
    lease: int
    seq: int


class Query(NamedTuple):
    """A question that needs a trainer's code; `body` is a serialised lmesh.scheduler.v1.Query."""

    id: int
    body: bytes


Told = Order | RunAsk | Ack | Query


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerHello:
    """A trainer as it joins."""

    trainer_id: str
    epoch: str
    device: str
    slots: int
    held: tuple[tuple[str, int], ...] = ()  # (job id, lease) of what it runs already
    rendezvous: str = ""  # host:port where other trainers reach it; empty: it runs no job of several


@dataclass(slots=True, kw_only=True, eq=False)
class Trainer:
    """One link of a trainer's boot."""

    hello: TrainerHello
    seen: float
    wake: Callable[[], None] = lambda: None
    linked: bool = True
    draining: bool = False
    runs: dict[str, int] = field(default_factory=dict)  # job id -> lease
    outbox: list[Told] = field(default_factory=list)

    def tell(self, what: Told) -> None:
        """Queues something; all that gathers until the link writes goes in one message."""
        self.outbox.append(what)
        self.wake()

    @property
    def free(self) -> bool:
        """Whether it may be given a job."""
        return self.linked and not self.draining and len(self.runs) < self.hello.slots


class Trainers:
    """Trainers by id."""

    def __init__(self, *, lease_ttl_s: float, alive_s: float, clock: Callable[[], float]) -> None:
        self._lease_ttl_s, self._alive_s, self._clock = lease_ttl_s, alive_s, clock
        self._trainers: dict[str, Trainer] = {}

    def all(self) -> list[Trainer]:
        """By id."""
        return [self._trainers[i] for i in sorted(self._trainers)]

    def find(self, trainer_id: str) -> Trainer | None:
        """The trainer of that id."""
        return self._trainers.get(trainer_id)

    def join(self, hello: TrainerHello) -> Trainer:
        """Takes a trainer in. Raises TrainerIdInUseError while another boot of that id is heard of."""
        before = self._trainers.get(hello.trainer_id)
        alive = before is not None and before.linked and self._clock() - before.seen < self._alive_s
        if before is not None and before.hello.epoch != hello.epoch and alive:
            raise TrainerIdInUseError(
                f"trainer id {hello.trainer_id} is in use: give each trainer its own", field="trainer_id"
            )
        trainer = Trainer(hello=hello, seen=self._clock())
        self._trainers[hello.trainer_id] = trainer
        return trainer

    def current(self, trainer: Trainer) -> bool:
        """Whether no newer link has taken over, and its lease holds."""
        return self._trainers.get(trainer.hello.trainer_id) is trainer

    def seen(self, trainer: Trainer) -> None:
        """A sign of life."""
        trainer.seen = self._clock()

    def overdue(self) -> list[Trainer]:
        """Trainers whose lease has lapsed."""
        limit = self._clock() - self._lease_ttl_s
        return [trainer for trainer in self.all() if trainer.seen < limit]

    def forget(self, trainer: Trainer) -> None:
        """It is lost, or has left."""
        if self.current(trainer):
            del self._trainers[trainer.hello.trainer_id]
