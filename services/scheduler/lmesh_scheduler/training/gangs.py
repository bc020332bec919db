"""Which trainers run a job together, all or none, and where they meet."""

from __future__ import annotations

from collections.abc import Iterable

from lmesh_scheduler.training.jobs import Job, JobState
from lmesh_scheduler.training.trainers import Gang, Trainer


def choose(job: Job, free: list[Trainer]) -> list[Trainer]:
    """The trainers that run a job, node 0 first; none where too few of the free ones can.

    Of several the one that led before leads again, where its checkpoints are; the others follow by id.
    """
    if job.nodes == 1:
        return free[:1]
    able = [trainer for trainer in free if trainer.hello.rendezvous]
    able.sort(key=lambda trainer: (trainer.hello.trainer_id != job.trainer_id, trainer.hello.trainer_id))
    return able[: job.nodes] if len(able) >= job.nodes else []


def may_be_met(nodes: int, trainers: Iterable[Trainer]) -> bool:
    """Whether so many have joined, busy ones too: a job for which they suffice may keep free ones waiting for them."""
    there = [t for t in trainers if t.linked and not t.draining and (nodes == 1 or t.hello.rendezvous)]
    return len(there) >= nodes


def places(members: list[Trainer], jobs: Iterable[Job]) -> list[Gang | None]:
    """Each member's place; none for a trainer alone. Runs that one trainer leads meet at ports of their own."""
    if len(members) == 1:
        return [None]
    first = members[0].hello
    host, _, port = first.rendezvous.rpartition(":")
    running = (job for job in jobs if job.members and job.state is JobState.RUNNING)
    taken = {job.port for job in running if job.trainer_id == first.trainer_id}
    number = next(n for n in range(int(port), int(port) + len(taken) + 1) if n not in taken)
    return [Gang(node, len(members), f"{host}:{number}") for node in range(len(members))]


def port_of(gang: Gang | None) -> int:
    """Where a run's ranks meet; 0 for a run of one."""
    return 0 if gang is None else int(gang.rendezvous.rpartition(":")[2])
