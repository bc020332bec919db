"""Jobs of several trainers at the desk: all or none, one lease, and one member's end is everybody's."""

from __future__ import annotations

import pytest
from lmesh_scheduler.training.desk import Made
from lmesh_scheduler.training.jobs import Job, JobState, Wish
from lmesh_scheduler.training.store import _fields, _job
from lmesh_scheduler.training.trainers import Ask, Gang, Order, RunAsk, Trainer

from tests.unit.test_training_desk import Scene, states


def joined(scene: Scene, *names: str, slots: int = 1, epoch: str = "e1", **fields: object) -> list[Trainer]:
    return [scene.trainer(n, epoch=epoch, slots=slots, rendezvous=f"{n}:29500", **fields) for n in names]


def orders(trainer: Trainer) -> list[Order]:
    return [told for told in trainer.outbox if isinstance(told, Order)]


def drop(job: Job, lease: int | None = None) -> RunAsk:
    return RunAsk(job.id, job.lease if lease is None else lease, Ask.DROP)


def test_all_or_none() -> None:
    scene = Scene()
    (first,) = joined(scene, "x")
    scene.trainer("w")  # nobody can reach that one
    job = scene.create(nodes=2)
    assert job.state is JobState.QUEUED and not first.runs
    (second,) = joined(scene, "y")
    assert job.state is JobState.RUNNING and (job.trainer_id, job.members) == ("x", ("x", "y"))
    assert orders(first) == [Order("a", job.lease, b"spec", Gang(0, 2, "x:29500"))]
    assert orders(second) == [Order("a", job.lease, b"spec", Gang(1, 2, "x:29500"))]


def test_a_gang_that_can_be_met_is_waited_for_and_one_that_cannot_is_passed() -> None:
    scene = Scene()
    x, y = joined(scene, "x", "y")
    jobs = []
    for name, nodes in (("before", 1), ("gang", 2), ("after", 1)):
        scene.now += 0.1
        jobs.append(scene.create(name, nodes=nodes))
    before, gang, after = jobs
    assert (before.state, gang.state, after.state) == (JobState.RUNNING, JobState.QUEUED, JobState.QUEUED)
    scene.end(x, before, 1, JobState.COMPLETED)
    assert gang.state is JobState.RUNNING and after.state is JobState.QUEUED
    scene.end(x, gang, 1, JobState.COMPLETED)
    scene.now += 0.1
    large = scene.create("large", nodes=3)
    scene.now += 0.1
    small = scene.create("small")
    assert after.state is JobState.RUNNING and small.state is JobState.RUNNING and large.state is JobState.QUEUED
    assert y.runs


def test_its_end_frees_every_member() -> None:
    scene = Scene()
    x, y = joined(scene, "x", "y")
    job = scene.create(nodes=2)
    scene.report(x, job, 1)
    scene.end(x, job, 2, JobState.COMPLETED)
    assert job.state is JobState.COMPLETED and not x.runs and not y.runs
    assert drop(job) in y.outbox and drop(job) not in x.outbox  # whose last report is acknowledged


def test_members_are_held_until_it_is_published() -> None:
    scene = Scene()
    x, y = joined(scene, "x", "y")
    job = scene.create(nodes=2, publish_as="mine")
    scene.report(x, job, 1, made=Made("folder", "adapter", "{}"))
    scene.end(x, job, 2, JobState.COMPLETED)
    assert scene.to_publish == [job] and y.runs
    scene.desk.published(job, b"published")
    assert job.state is JobState.COMPLETED and not x.runs and not y.runs
    assert drop(job) in x.outbox and drop(job) in y.outbox


@pytest.mark.parametrize("lost", ["x", "y"])
def test_a_lost_member_ends_the_attempt_on_all(lost: str) -> None:
    scene = Scene()
    members = dict(zip("xy", joined(scene, "x", "y"), strict=True))
    job = scene.create(nodes=2)
    lease, (kept,) = job.lease, [t for n, t in members.items() if n != lost]
    scene.now += 5.1
    scene.desk.heard(kept, draining=False)
    scene.desk.tick()
    assert job.state is JobState.QUEUED and b"QUEUED TRAINER_LOST" in states(job)
    assert drop(job, lease) in kept.outbox and not kept.runs
    (again,) = joined(scene, lost, epoch="e2", held=(("a", lease),))
    assert drop(job, lease) in again.outbox
    assert job.state is JobState.RUNNING and job.lease > lease and job.attempts == 2
    assert kept.runs == again.runs == {"a": job.lease}


def test_who_led_leads_again() -> None:
    scene = Scene()
    x, y = joined(scene, "x", "y")
    job = scene.create(nodes=2)
    (w,) = joined(scene, "a")
    scene.end(y, job, 1, JobState.FAILED, "JOB_DIED")
    assert job.members == ("x", "a") and not y.runs and orders(w)[0].gang == Gang(1, 2, "x:29500")
    x.draining = True
    scene.end(w, job, 1, JobState.FAILED, "JOB_DIED")
    assert job.members == ("a", "y")


def test_a_follower_says_only_that_it_failed() -> None:
    scene = Scene()
    x, y = joined(scene, "x", "y")
    job = scene.create(nodes=2)
    lease, events = job.lease, job.last_event
    scene.report(y, job, 1)
    scene.end(y, job, 2, JobState.COMPLETED)
    assert (job.state, job.last_event, job.lease_seq) == (JobState.RUNNING, events, 0)
    scene.end(y, job, 3, JobState.FAILED, "JOB_DIED")
    assert job.state is JobState.RUNNING and job.lease > lease and job.attempts == 2
    assert drop(job, lease) in x.outbox and drop(job, lease) in y.outbox
    scene.end(y, job, 1, JobState.FAILED, "MODEL_NOT_FOUND")
    assert (job.state, job.reason) == (JobState.FAILED, "MODEL_NOT_FOUND") and not x.runs and not y.runs


def test_wishes_are_node_0s_to_hear() -> None:
    scene = Scene()
    x, y = joined(scene, "x", "y")
    job = scene.create(nodes=2)
    scene.desk.ask(job, Wish.STOP)
    assert RunAsk("a", job.lease, Ask.STOP) in x.outbox and RunAsk("a", job.lease, Ask.STOP) not in y.outbox
    scene.end(x, job, 1, JobState.STOPPED)
    assert job.state is JobState.STOPPED and not y.runs


def test_another_scheduler_waits_for_every_member() -> None:
    scene = Scene()
    joined(scene, "x", "y")
    job = scene.create(nodes=2)
    kept = _job("a", {name.encode(): _bytes(value) for name, value in _fields(job).items()})
    assert (kept.nodes, kept.members, kept.port) == (2, ("x", "y"), 29500)
    whole, half = (Scene(incarnation=8, jobs=[again]) for again in (kept, _job("a", _old(job))))
    held = (("a", job.lease),)
    joined(whole, "x", "y", held=held)
    (follower,) = joined(half, "y", held=held)
    for later in (whole, half):
        later.now += 4.9
        for trainer in later.desk.trainers.all():
            later.desk.heard(trainer, draining=False)
        later.now += 0.2
        later.desk.tick()
    assert kept.state is JobState.RUNNING and kept.lease == job.lease and kept.trainer_id == "x"
    assert half.jobs[0].state is JobState.QUEUED and not follower.runs


def test_a_record_of_before_there_were_any_is_of_one() -> None:
    scene = Scene()
    fields = {name.encode(): _bytes(value) for name, value in _fields(scene.create()).items()}
    for name in (b"nodes", b"members", b"port"):
        del fields[name]
    job = _job("a", fields)
    assert (job.nodes, job.members, job.port) == (1, (), 0)


def test_runs_that_one_trainer_leads_meet_at_ports_of_their_own() -> None:
    scene = Scene()
    x, _ = joined(scene, "x", "y", slots=2)
    first, second = scene.create("first", nodes=2), scene.create("second", nodes=2)
    assert (first.port, second.port) == (29500, 29501)
    scene.end(x, first, 1, JobState.COMPLETED)
    third = scene.create("third", nodes=2)
    assert third.state is JobState.RUNNING and third.port == 29500


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


def _old(job: Job) -> dict[bytes, bytes]:
    return {name.encode(): _bytes(value) for name, value in _fields(job).items()}
