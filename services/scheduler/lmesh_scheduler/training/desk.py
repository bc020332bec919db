"""Gives jobs to trainers and takes their reports: synchronous, on a clock that is handed in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

from lmesh_scheduler.training.gangs import choose, may_be_met, places, port_of
from lmesh_scheduler.training.jobs import Job, JobState, JobTable, Wish
from lmesh_scheduler.training.trainers import Ack, Ask, Order, RunAsk, Trainer, TrainerHello, Trainers

log = logging.getLogger(__name__)

TRAINER_LOST = "TRAINER_LOST"
# Not the job's own fault: it goes on from its checkpoint, here or elsewhere.
RETRIED = frozenset({TRAINER_LOST, "JOB_DIED", "JOB_BUSY"})


class Ended(NamedTuple):
    """How a run ended, as its trainer says."""

    state: JobState
    reason: str
    message: str


class Made(NamedTuple):
    """What a run made and stored."""

    artifact: str
    adapter_digest: str
    manifest: str


class Report(NamedTuple):
    """One report of a run. `body` is the serialised event, "" for the last one: how it ended is the desk's to say."""

    job_id: str
    lease: int
    seq: int
    body: bytes
    step: bytes = b""
    made: Made | None = None
    ended: Ended | None = None


class TrainingDesk:
    """`state_event` serialises a change of state, `order_spec` the spec that a trainer is sent.

    `publish` is called with a job that is done and is to be published; `published` or `not_published` answers it.
    """

    def __init__(
        self,
        *,
        incarnation: int,
        lease_ttl_s: float,
        alive_s: float,
        max_attempts: int,
        clock: Callable[[], float],
        wall: Callable[[], float],
        changed: Callable[[Job], None],
        state_event: Callable[[JobState, str, str], bytes],
        order_spec: Callable[[Job], bytes],
        publish: Callable[[Job], None],
        jobs: Iterable[Job] = (),
    ) -> None:
        self.jobs = JobTable(wall=wall, changed=changed, jobs=jobs)
        self.trainers = Trainers(lease_ttl_s=lease_ttl_s, alive_s=alive_s, clock=clock)
        self._clock, self._lease_ttl_s, self._max_attempts = clock, lease_ttl_s, max_attempts
        self._state_event, self._order_spec, self._publish = state_event, order_spec, publish
        self._lease = incarnation << 32  # as placements' leases: no two of one mesh are alike
        # Jobs that an earlier scheduler left running; their trainers have until then to say so.
        self._awaited = {job.id: clock() + lease_ttl_s for job in self.jobs.all() if job.state is JobState.RUNNING}

    # -- clients

    def create(self, job: Job) -> None:
        """A new job; given to a trainer at once if one is free. Raises JobTransitionError when its id is known."""
        self.jobs.add(job)
        self._tell_state(job)
        self._assign()

    def ask(self, job: Job, wish: Wish) -> None:
        """A client wants it to stop or to be cancelled; one that waits ends at once. CANCEL is not taken back."""
        if job.state is JobState.QUEUED:
            self._move(job, JobState.STOPPED if wish is Wish.STOP else JobState.CANCELLED)
            return
        job.wish = wish if job.wish is not Wish.CANCEL else job.wish
        self.jobs.touch(job)
        trainer = self.trainers.find(job.trainer_id)
        if trainer is not None and trainer.runs.get(job.id) == job.lease:
            trainer.tell(RunAsk(job.id, job.lease, Ask(job.wish.value)))

    def resume(self, job: Job) -> None:
        """An ended job waits again. Raises JobTransitionError for one that lives or is COMPLETED."""
        job.attempts = 0
        self._move(job, JobState.QUEUED, reason="RESUMED")
        self._assign()

    # -- trainers

    def joined(self, hello: TrainerHello, wake: Callable[[], None]) -> Trainer:
        """A link opens: what it holds under a valid lease goes on, what it should hold and does not is lost."""
        trainer = self.trainers.join(hello)
        trainer.wake = wake
        for job_id, lease in hello.held:
            job = self.jobs.find(job_id)
            if job is None or job.state is not JobState.RUNNING or job.lease != lease:
                trainer.tell(RunAsk(job_id, lease, Ask.DROP))
                continue
            if job.members and hello.trainer_id not in job.members:
                trainer.tell(RunAsk(job_id, lease, Ask.DROP))
                continue
            trainer.runs[job_id] = lease
            if len(self._holders(job)) >= len(job.members):
                self._awaited.pop(job_id, None)
            if job.members and hello.trainer_id != job.trainer_id:
                continue
            job.trainer_id = hello.trainer_id
            if job.lease_seq:
                trainer.tell(Ack(job_id, lease, job.lease_seq))
            if job.wish:
                trainer.tell(RunAsk(job_id, lease, Ask(job.wish.value)))
        for job in self.jobs.all():
            if self._missed(job, trainer):
                self._retry(job, TRAINER_LOST, f"trainer {hello.trainer_id} began anew")
        log.info("trainer joined", extra={"trainer_id": hello.trainer_id, "runs": len(trainer.runs)})
        self._assign()
        return trainer

    @staticmethod
    def _missed(job: Job, trainer: Trainer) -> bool:
        """Whether a job is taken to run there, and does not."""
        there = job.state is JobState.RUNNING and job.runs_on(trainer.hello.trainer_id)
        return there and job.id not in trainer.runs and not job.publishing

    def heard(self, trainer: Trainer, *, draining: bool) -> bool:
        """A sign of life; False when it is lost here or a newer link has its place: this one must end."""
        if not self.trainers.current(trainer):
            return False
        self.trainers.seen(trainer)
        trainer.draining = trainer.draining or draining
        return True

    def unlinked(self, trainer: Trainer) -> None:
        """A link ended: it has until its lease lapses to come back, unless it said that it leaves."""
        trainer.linked = False
        if trainer.draining and self.trainers.current(trainer):
            self._lose(trainer)

    def report(self, trainer: Trainer, report: Report) -> None:
        """One report. A repeat is dropped; one under a lease that is no longer valid ends its run."""
        job = self.jobs.find(report.job_id)
        if job is None or job.lease != report.lease or trainer.runs.get(report.job_id) != report.lease:
            trainer.tell(RunAsk(report.job_id, report.lease, Ask.DROP))
            return
        if job.members and trainer.hello.trainer_id != job.trainer_id:
            self._follower_failed(job, report)
            return
        if report.seq <= job.lease_seq or job.publishing:
            return
        if report.made is not None:
            job.artifact, job.adapter_digest, job.manifest = report.made
        if report.step:
            job.last_step = report.step
        if report.ended is None:
            job.lease_seq = report.seq
            self.jobs.note(job, report.body)
        else:
            self._ended(trainer, job, report.ended, report.seq)

    def _follower_failed(self, job: Job, report: Report) -> None:
        """A member other than node 0 says nothing but that: the attempt has ended for all."""
        if report.ended is not None and report.ended.state is JobState.FAILED and not job.publishing:
            self._dissolve(job)
            self._failed(job, report.ended)
            self._assign()

    def _holders(self, job: Job) -> list[Trainer]:
        """Trainers that have joined and hold its run."""
        found = (self.trainers.find(trainer_id) for trainer_id in (job.members or (job.trainer_id,)))
        return [trainer for trainer in found if trainer is not None and trainer.runs.get(job.id) == job.lease]

    def _dissolve(self, job: Job) -> None:
        """Whoever still holds its run is to drop it."""
        for trainer in self._holders(job):
            del trainer.runs[job.id]
            trainer.tell(RunAsk(job.id, job.lease, Ask.DROP))

    def _failed(self, job: Job, ended: Ended) -> None:
        if ended.reason in RETRIED and job.wish is Wish.NONE:
            self._retry(job, ended.reason, ended.message)
        else:
            self._move(job, ended.state, ended.reason, ended.message)

    def _ended(self, trainer: Trainer, job: Job, ended: Ended, seq: int) -> None:
        if ended.state is JobState.COMPLETED and job.publish_as and job.adapter_digest:
            # Its last report is not acknowledged before it is served: after a crash of this scheduler it comes again.
            job.publishing = True
            self._publish(job)
            return
        job.lease_seq = seq
        trainer.runs.pop(job.id, None)
        self._dissolve(job)
        self._failed(job, ended)
        self._assign()

    def published(self, job: Job, event: bytes) -> None:
        """What a job made serves."""
        self.jobs.note(job, event)
        self._done(job, JobState.COMPLETED, "", "")

    def not_published(self, job: Job, reason: str, message: str) -> None:
        """What a job made is stored, and cannot serve; a later PublishAdapter may do better."""
        self._done(job, JobState.FAILED, reason, f"trained, and not published: {message}")

    def _done(self, job: Job, state: JobState, reason: str, message: str) -> None:
        job.publishing = False
        job.lease_seq += 1  # at least the last report's: nothing follows it
        trainer = self.trainers.find(job.trainer_id)
        if trainer is not None and trainer not in self._holders(job):
            trainer.tell(RunAsk(job.id, job.lease, Ask.DROP))  # whatever its number was, it need not be said again
        self._dissolve(job)
        self._move(job, state, reason, message)
        self._assign()

    def written(self, job_id: str, lease: int, seq: int) -> None:
        """Reports up to `seq` are in Redis: their trainer may forget them."""
        job = self.jobs.find(job_id)
        trainer = self.trainers.find(job.trainer_id) if job is not None else None
        if trainer is not None and lease:
            trainer.tell(Ack(job_id, lease, seq))

    def tick(self) -> None:
        """Loses trainers whose lease has lapsed, and takes back jobs that none has claimed."""
        for trainer in self.trainers.overdue():
            self._lose(trainer)
        now = self._clock()
        for job_id in [job_id for job_id, until in self._awaited.items() if until <= now]:
            del self._awaited[job_id]
            job = self.jobs.find(job_id)
            if job is not None and job.state is JobState.RUNNING and not job.publishing:
                self._retry(job, TRAINER_LOST, "its trainer did not come back")
        self._assign()

    def _lose(self, trainer: Trainer) -> None:
        self.trainers.forget(trainer)
        log.warning("trainer lost", extra={"trainer_id": trainer.hello.trainer_id, "runs": len(trainer.runs)})
        runs, trainer.runs = trainer.runs, {}
        for job_id, lease in runs.items():
            job = self.jobs.find(job_id)
            if job is not None and job.state is JobState.RUNNING and job.lease == lease and not job.publishing:
                self._retry(job, TRAINER_LOST, f"nothing was heard of trainer {trainer.hello.trainer_id}")

    def _retry(self, job: Job, reason: str, message: str) -> None:
        self._dissolve(job)
        if job.wish is not Wish.NONE:  # what was asked for has come about, if not in the way that was meant
            self._move(job, JobState.STOPPED if job.wish is Wish.STOP else JobState.CANCELLED)
        elif job.attempts >= self._max_attempts:
            self._move(job, JobState.FAILED, reason, f"{message}; tried {job.attempts} times")
        else:
            self._move(job, JobState.QUEUED, reason, message)

    def _assign(self) -> None:
        """Oldest first. One that needs more trainers than are free keeps later ones waiting, if enough have joined."""
        free = [trainer for trainer in self.trainers.all() if trainer.free]
        for job in [job for job in self.jobs.all() if job.state is JobState.QUEUED]:
            if not free:
                return
            members = choose(job, free)
            if members:
                self._start(job, members)
                free = [t for t in free if t not in members] + [t for t in members if t.free]
            elif may_be_met(job.nodes, self.trainers.all()):
                return

    def _start(self, job: Job, members: list[Trainer]) -> None:
        gangs = places(members, self.jobs.all())
        self._lease += 1
        job.lease, job.lease_seq, job.trainer_id = self._lease, 0, members[0].hello.trainer_id
        job.members = tuple(trainer.hello.trainer_id for trainer in members) if job.nodes > 1 else ()
        job.port = port_of(gangs[0])
        job.attempts += 1
        self._move(job, JobState.RUNNING)
        for trainer, gang in zip(members, gangs, strict=True):
            trainer.runs[job.id] = job.lease
            trainer.tell(Order(job.id, job.lease, self._order_spec(job), gang))

    def _move(self, job: Job, to: JobState, reason: str = "", message: str = "") -> None:
        self.jobs.move(job, to, reason=reason, message=message)
        self._tell_state(job)

    def _tell_state(self, job: Job) -> None:
        self.jobs.note(job, self._state_event(job.state, job.reason, job.message))
