"""Jobs and trainers on a clock of the test's own: leases, repeats, wishes, and the jobs of a trainer that is lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from lmesh_scheduler.errors import TrainerIdInUseError
from lmesh_scheduler.training.desk import Ended, Made, Report, TrainingDesk
from lmesh_scheduler.training.jobs import LIVE, Job, JobState, JobTransitionError, Wish
from lmesh_scheduler.training.trainers import Ack, Ask, Order, RunAsk, Trainer, TrainerHello


@dataclass
class Scene:
    """A desk, and what it was told to write and to publish."""

    now: float = 100.0
    incarnation: int = 7
    jobs: list[Job] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    to_publish: list[Job] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.desk = TrainingDesk(
            incarnation=self.incarnation,
            lease_ttl_s=5.0,
            alive_s=2.0,
            max_attempts=3,
            clock=lambda: self.now,
            wall=lambda: self.now,
            changed=lambda job: self.changed.append(job.id),
            state_event=lambda state, reason, message: f"{state} {reason}".encode(),
            order_spec=lambda job: job.spec,
            publish=self.to_publish.append,
            jobs=self.jobs,
        )

    def create(self, job_id: str = "a", **fields: Any) -> Job:
        job = Job(id=job_id, tenant="t", model="m", source="s", spec=b"spec", **fields)
        self.desk.create(job)
        return job

    def trainer(self, trainer_id: str = "x", epoch: str = "e1", slots: int = 1, **fields: Any) -> Trainer:
        hello = TrainerHello(trainer_id=trainer_id, epoch=epoch, device="cpu", slots=slots, **fields)
        return self.desk.joined(hello, lambda: None)

    def report(self, trainer: Trainer, job: Job, seq: int, **fields: Any) -> None:
        self.desk.report(trainer, Report(job.id, fields.pop("lease", job.lease), seq, b"event", **fields))

    def end(self, trainer: Trainer, job: Job, seq: int, state: JobState, reason: str = "") -> None:
        self.report(trainer, job, seq, ended=Ended(state, reason, "why"))


def states(job: Job) -> list[bytes]:
    return [event.body for event in job.recent if event.body != b"event"]


def test_a_job_goes_to_a_free_trainer_and_ends() -> None:
    scene = Scene()
    job = scene.create()
    assert job.state is JobState.QUEUED
    trainer = scene.trainer()
    (order,) = trainer.outbox
    assert order == Order("a", job.lease, b"spec") and job.state is JobState.RUNNING
    second = scene.create("b")
    assert second.state is JobState.QUEUED  # one slot
    scene.report(trainer, job, 1, made=Made("folder", "adapter", "{}"))
    scene.end(trainer, job, 2, JobState.COMPLETED)
    assert (job.state, job.artifact, job.adapter_digest) == (JobState.COMPLETED, "folder", "adapter")
    assert second.state is JobState.RUNNING and trainer.runs == {"b": second.lease}
    assert [event.seq for event in job.recent] == [1, 2, 3, 4]


def test_watchers_hear_what_is_kept() -> None:
    scene = Scene()
    job, heard = scene.create(), []
    job.watchers.add(lambda: heard.append(job.durable_event))
    scene.trainer()
    assert (job.last_event, job.durable_event, heard) == (2, 0, [])
    job.written(1)
    job.written(0)
    job.written(1)
    assert heard == [1, 2] and not job.unwritten


def test_repeats_and_older_leases_change_nothing() -> None:
    scene = Scene()
    job, trainer = scene.create(), scene.trainer()
    scene.report(trainer, job, 1)
    scene.report(trainer, job, 1)
    assert states(job) == [b"QUEUED ", b"RUNNING "] and job.last_event == 3
    scene.report(trainer, job, 2, lease=job.lease - 1)
    assert job.last_event == 3 and trainer.outbox[-1] == RunAsk("a", job.lease - 1, Ask.DROP)


def test_a_silent_trainer_loses_its_job_to_another() -> None:
    scene = Scene()
    job, trainer = scene.create(), scene.trainer()
    first = job.lease
    scene.now += 5.1
    other = scene.trainer("y")
    scene.desk.tick()
    assert job.lease != first and other.runs == {"a": job.lease} and job.attempts == 2
    assert not scene.desk.heard(trainer, draining=False)
    back = scene.trainer("x", held=(("a", first),))
    assert RunAsk("a", first, Ask.DROP) in back.outbox and "a" not in back.runs


def test_a_trainer_that_began_anew_gets_its_job_again() -> None:
    scene = Scene()
    job, trainer = scene.create(), scene.trainer()
    trainer.linked = False
    again = scene.trainer(epoch="e2")
    assert again.runs == {"a": job.lease} and b"QUEUED TRAINER_LOST" in states(job)


def test_two_boots_of_one_id_do_not_take_each_other_s_place() -> None:
    scene = Scene()
    scene.trainer()
    with pytest.raises(TrainerIdInUseError):
        scene.trainer(epoch="e2")


def test_a_link_that_broke_goes_on() -> None:
    scene = Scene()
    job, trainer = scene.create(), scene.trainer()
    scene.report(trainer, job, 1)
    scene.desk.unlinked(trainer)
    again = scene.trainer(held=(("a", job.lease),))
    assert again.runs == {"a": job.lease} and again.outbox == [Ack("a", job.lease, 1)] and job.attempts == 1


def test_a_job_that_dies_too_often_fails() -> None:
    scene = Scene()
    job, trainer = scene.create(), scene.trainer()
    for attempt in range(3):
        assert job.attempts == attempt + 1
        scene.end(trainer, job, 1, JobState.FAILED, "JOB_DIED")
    assert (job.state, job.reason) == (JobState.FAILED, "JOB_DIED")
    scene.desk.resume(job)
    assert job.state is JobState.RUNNING and job.attempts == 1


def test_what_a_person_must_put_right_is_not_tried_again() -> None:
    scene = Scene()
    job, trainer = scene.create(), scene.trainer()
    scene.end(trainer, job, 1, JobState.FAILED, "NON_FINITE_LOSS")
    assert (job.state, job.reason, job.attempts) == (JobState.FAILED, "NON_FINITE_LOSS", 1)


@pytest.mark.parametrize(("wish", "state"), [(Wish.STOP, JobState.STOPPED), (Wish.CANCEL, JobState.CANCELLED)])
def test_wishes(wish: Wish, state: JobState) -> None:
    scene = Scene()
    waiting = scene.create()
    scene.desk.ask(waiting, wish)
    assert waiting.state is state
    running = scene.create("b")
    trainer = scene.trainer()
    scene.desk.ask(running, wish)
    assert trainer.outbox[-1] == RunAsk("b", running.lease, Ask(wish.value))
    again = scene.trainer(held=(("b", running.lease),))  # it is said again on a new link
    assert RunAsk("b", running.lease, Ask(wish.value)) in again.outbox
    scene.now += 6  # its trainer is lost before it has obeyed
    scene.desk.tick()
    assert running.state is state


def test_a_cancel_is_not_taken_back() -> None:
    scene = Scene()
    job, trainer = scene.create(), scene.trainer()
    scene.desk.ask(job, Wish.CANCEL)
    scene.desk.ask(job, Wish.STOP)
    assert trainer.outbox[-1] == RunAsk("a", job.lease, Ask.CANCEL)


def test_it_is_completed_when_it_serves() -> None:
    scene = Scene()
    job, trainer = scene.create(publish_as="name"), scene.trainer()
    scene.report(trainer, job, 1, made=Made("folder", "adapter", ""))
    scene.end(trainer, job, 2, JobState.COMPLETED)
    scene.end(trainer, job, 2, JobState.COMPLETED)  # said again meanwhile
    assert scene.to_publish == [job] and job.state is JobState.RUNNING and job.lease_seq == 1
    scene.now += 6
    scene.desk.tick()  # its trainer is lost, which no longer matters
    scene.desk.published(job, b"event")
    assert job.state is JobState.COMPLETED


def test_what_cannot_serve_is_kept() -> None:
    scene = Scene()
    job, trainer = scene.create(publish_as="name"), scene.trainer()
    scene.report(trainer, job, 1, made=Made("folder", "adapter", ""))
    scene.end(trainer, job, 2, JobState.COMPLETED)
    scene.desk.not_published(job, "MODEL_NOT_SERVED", "nobody serves m")
    assert (job.state, job.reason, job.artifact) == (JobState.FAILED, "MODEL_NOT_SERVED", "folder")
    assert not trainer.runs and trainer.free


def test_a_new_scheduler_waits_for_what_runs() -> None:
    before = Scene()
    claimed, lost = before.create("claimed"), before.create("lost")
    before.trainer(slots=2)
    scene = Scene(incarnation=8, jobs=[claimed, lost])
    scene.desk.tick()
    trainer = scene.trainer("x", slots=2, held=(("claimed", claimed.lease),))
    # What it does not hold of its own is lost at once, and so given to it again.
    assert trainer.runs == {"claimed": claimed.lease, "lost": lost.lease} and lost.attempts == 2
    assert lost.lease >> 32 == 8 and claimed.lease >> 32 == 7


def test_a_new_scheduler_does_not_wait_for_ever() -> None:
    before = Scene()
    job = before.create()
    before.trainer()
    scene = Scene(incarnation=8, jobs=[job])
    other = scene.trainer("y")
    assert other.free
    scene.now += 5.1
    other = scene.trainer("y")
    scene.desk.tick()
    assert other.runs == {"a": job.lease}


def test_unknown_changes_are_refused() -> None:
    scene = Scene()
    job, trainer = scene.create(), scene.trainer()
    scene.end(trainer, job, 1, JobState.COMPLETED)
    with pytest.raises(JobTransitionError):
        scene.desk.resume(job)
    with pytest.raises(JobTransitionError):
        scene.create()


class DeskMachine(RuleBasedStateMachine):
    """Whatever happens, a job runs at one trainer at most, under its newest lease, and ends once."""

    def __init__(self) -> None:
        super().__init__()
        self.scene = Scene()
        self.made = 0
        self.links: dict[str, Trainer] = {}
        self.epochs = 0
        self.ended: dict[str, JobState] = {}

    @rule()
    def create(self) -> None:
        self.made += 1
        self.scene.create(f"j{self.made}", publish_as="n" if self.made % 3 == 0 else "")

    @rule(name=st.sampled_from("xy"), slots=st.integers(1, 2), keep=st.booleans())
    def join(self, name: str, slots: int, keep: bool) -> None:
        before = self.links.get(name)
        held: tuple[tuple[str, int], ...] = ()
        epoch = f"e{self.epochs}"
        if before is not None:
            self.scene.desk.unlinked(before)
            held = tuple(before.runs.items()) if keep else ()
            epoch = before.hello.epoch
        if not keep:
            self.epochs += 1
            epoch = f"e{self.epochs}"
        self.links[name] = self.scene.trainer(name, epoch, slots, held=held)

    @precondition(lambda self: self.links)
    @rule(
        data=st.data(),
        step=st.integers(1, 3),
        end=st.sampled_from([None, *JobState]),
        reason=st.sampled_from(["", "JOB_DIED"]),
    )
    def report(self, data: st.DataObject, step: int, end: JobState | None, reason: str) -> None:
        trainer = self.links[data.draw(st.sampled_from(sorted(self.links)))]
        if not trainer.runs or end in LIVE:
            return
        job = self.scene.desk.jobs.find(data.draw(st.sampled_from(sorted(trainer.runs))))
        assert job is not None
        made = Made("folder", "adapter", "") if end is None else None
        ended = None if end is None else Ended(end, reason if end is JobState.FAILED else "", "")
        self.scene.report(trainer, job, job.lease_seq + step, lease=trainer.runs[job.id], made=made, ended=ended)

    @rule(seconds=st.sampled_from([0.5, 3.0, 6.0]), beats=st.booleans())
    def wait(self, seconds: float, beats: bool) -> None:
        self.scene.now += seconds
        for trainer in self.links.values():
            if beats:
                self.scene.desk.heard(trainer, draining=False)
        self.scene.desk.tick()

    @precondition(lambda self: self.made)
    @rule(data=st.data(), wish=st.sampled_from([Wish.STOP, Wish.CANCEL]))
    def ask(self, data: st.DataObject, wish: Wish) -> None:
        job = self.scene.desk.jobs.find(f"j{data.draw(st.integers(1, self.made))}")
        assert job is not None
        if job.live:
            self.scene.desk.ask(job, wish)

    @rule(well=st.booleans())
    def publish(self, well: bool) -> None:
        for job in self.scene.to_publish:
            if well:
                self.scene.desk.published(job, b"event")
            else:
                self.scene.desk.not_published(job, "MODEL_NOT_SERVED", "")
        self.scene.to_publish.clear()

    @invariant()
    def at_one_trainer_at_most(self) -> None:
        holders: dict[str, list[int]] = {}
        for trainer in self.scene.desk.trainers.all():
            assert len(trainer.runs) <= max(trainer.hello.slots, len(trainer.hello.held))
            for job_id, lease in trainer.runs.items():
                holders.setdefault(job_id, []).append(lease)
        for job_id, leases in holders.items():
            job = self.scene.desk.jobs.find(job_id)
            assert job is not None and leases == [job.lease] and job.state is JobState.RUNNING

    @invariant()
    def events_are_contiguous(self) -> None:
        for job in self.scene.desk.jobs.all():
            assert [event.seq for event in job.recent] == list(range(1, job.last_event + 1))

    @invariant()
    def an_end_is_for_good(self) -> None:
        for job in self.scene.desk.jobs.all():
            if job.id in self.ended:
                assert job.state is self.ended[job.id]
            elif not job.live:
                self.ended[job.id] = job.state


DeskMachine.TestCase.settings = hypothesis_settings(max_examples=150, stateful_step_count=30, deadline=None)
TestDeskMachine = DeskMachine.TestCase
