"""The jobs: each one's state, changed only here and only along the transition table, and its events."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

RECENT = 4096  # events of a job that are answered from memory; older ones from Redis


class JobState(StrEnum):
    """Where a job is; the names are those of lmesh.training.v1.JobState."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    STOPPED = "STOPPED"
    CANCELLED = "CANCELLED"
    FAILED = "FAILED"


class Wish(StrEnum):
    """What a client has asked of a live job."""

    NONE = ""
    STOP = "STOP"
    CANCEL = "CANCEL"


LIVE = frozenset({JobState.QUEUED, JobState.RUNNING})
_ENDS = frozenset({JobState.STOPPED, JobState.CANCELLED, JobState.FAILED})
TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING}) | _ENDS,
    # Back to QUEUED: its trainer was lost, and it goes on from its checkpoint elsewhere.
    JobState.RUNNING: frozenset({JobState.COMPLETED, JobState.QUEUED}) | _ENDS,
    JobState.COMPLETED: frozenset(),
    **{state: frozenset({JobState.QUEUED}) for state in _ENDS},  # ResumeJob
}


class JobTransitionError(RuntimeError):
    """A change that the table does not have."""


class StoredEvent(NamedTuple):
    """A serialised lmesh.training.v1.JobEvent, whose own seq and time are these. `time` is Unix seconds."""

    seq: int
    time: float
    body: bytes


class Place(NamedTuple):
    """Where a trainer finds what a job is made of."""

    source: str  # of the model
    start: str  # artifact:<digest> of the adapter that it goes on from; empty for none


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One job. `spec` is a serialised lmesh.training.v1.JobSpec, `last_step` a serialised Step."""

    id: str
    tenant: str
    model: str  # as the client named it
    source: str  # where its files are
    start: str = ""  # artifact of the adapter that it goes on from
    spec: bytes
    publish_as: str = ""
    nodes: int = 1  # trainers that run it together
    created: float = 0.0
    state: JobState = JobState.QUEUED
    reason: str = ""
    message: str = ""
    changed: float = 0.0
    trainer_id: str = ""  # the one that reports
    members: tuple[str, ...] = ()  # of a run of several trainers, node 0 first; empty for one alone
    port: int = 0  # of node 0, where they meet
    lease: int = 0
    lease_seq: int = 0  # the last report that was taken under the lease
    attempts: int = 0
    wish: Wish = Wish.NONE
    last_event: int = 0
    durable_event: int = 0  # the last one that Redis has: watchers are told no later one, so none is told twice
    last_step: bytes = b""
    artifact: str = ""
    adapter_digest: str = ""
    manifest: str = ""
    recent: deque[StoredEvent] = field(default_factory=lambda: deque(maxlen=RECENT))
    unwritten: list[StoredEvent] = field(default_factory=list)
    version: int = 0  # counts changes, for the writer
    publishing: bool = False  # what it made is on its way into service; then it is COMPLETED
    watchers: set[Callable[[], None]] = field(default_factory=set)

    def written(self, count: int) -> None:
        """Redis has the first `count` of what was to be written; watchers may have it now."""
        if count:
            self.durable_event = self.unwritten[count - 1].seq
            del self.unwritten[:count]
            for tell in list(self.watchers):
                tell()

    def runs_on(self, trainer_id: str) -> bool:
        """Whether a trainer is to hold its run."""
        return trainer_id in self.members or trainer_id == self.trainer_id

    @property
    def live(self) -> bool:
        """Whether it has not ended."""
        return self.state in LIVE


class JobTable:
    """Jobs by id. `changed` is told of every change."""

    def __init__(self, *, wall: Callable[[], float], changed: Callable[[Job], None], jobs: Iterable[Job] = ()) -> None:
        self._wall, self._changed = wall, changed
        self._jobs = {job.id: job for job in jobs}

    def find(self, job_id: str) -> Job | None:
        """The job of that id."""
        return self._jobs.get(job_id)

    def all(self) -> list[Job]:
        """Oldest first."""
        return sorted(self._jobs.values(), key=lambda job: (job.created, job.id))

    def add(self, job: Job) -> None:
        """A new job, QUEUED. Raises JobTransitionError when its id is known."""
        if job.id in self._jobs:
            raise JobTransitionError(f"{job.id} is known already")
        job.created = job.changed = self._wall()
        self._jobs[job.id] = job
        self.touch(job)

    def move(self, job: Job, to: JobState, *, reason: str = "", message: str = "") -> None:
        """Changes the state. Raises JobTransitionError where the table does not have the change."""
        if to not in TRANSITIONS[job.state]:
            raise JobTransitionError(f"{job.id}: {job.state} -> {to}")
        job.state, job.reason, job.message, job.changed = to, reason, message, self._wall()
        if to not in LIVE:
            job.wish = Wish.NONE
        self.touch(job)

    def note(self, job: Job, body: bytes) -> None:
        """An event of the job, serialised."""
        job.last_event += 1
        event = StoredEvent(job.last_event, self._wall(), body)
        job.recent.append(event)
        job.unwritten.append(event)
        self.touch(job)

    def touch(self, job: Job) -> None:
        """Something of the job changed that is to be written."""
        job.version += 1
        self._changed(job)
