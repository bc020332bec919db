"""Leases in a worker's sessions: what is held, what is dropped, and what is remembered of it."""

from __future__ import annotations

from typing import Any

from lmesh_worker.messages import Abort, Command, Finish, Params, Start
from lmesh_worker.revoked_leases import RevokedLeases
from lmesh_worker.run_order import SessionLimits, StartOrder
from lmesh_worker.run_sessions import RunSessions
from lmesh_worker.session import Session
from lmesh_worker.start_check import Limits


class Scene:
    """Sessions with an engine that only takes notes."""

    def __init__(self, **more: Any) -> None:
        self.sent: list[Command] = []
        limits = SessionLimits(grace_s=10, max_unacked_steps=100, max_unacked_bytes=2**20)
        self.sessions = RunSessions(epoch="e", limits=limits, send=self.sent.append, **more)
        self.sessions.open(Limits(max_model_len=64, vocab_size=100), 1)

    def attach(self, gateway_id: str) -> Session:
        return self.sessions.attach(gateway_id, "e", 0)[0]

    def start(self, session: Session, slot: int, lease: int, request_id: str = "r") -> None:
        order = StartOrder(
            slot=slot,
            lease=lease,
            request_id=request_id,
            choice=0,
            ids=[1, 2],
            prompt_len=2,
            params=Params(max_tokens=4),
            cache_salt="",
            traceparent="",
            priority=0,
        )
        self.sessions.start(session, order)

    def keys(self, kind: type) -> list[int]:
        return [command.key for command in self.sent if isinstance(command, kind)]


def outputs(session: Session) -> list[tuple[int, int, int]]:
    """(slot, lease, finish) of all that the gateway will hear."""
    steps = [step for step, _ in session._unacked]
    return [entry for step in steps for entry in zip(step.slot, step.lease, step.finish, strict=True)]


async def test_revoking_drops_what_runs_and_refuses_what_comes() -> None:
    scene = Scene()
    one, two = scene.attach("one"), scene.attach("two")
    scene.start(one, 1, 10)
    scene.start(one, 2, 10)
    scene.start(one, 3, 11)
    scene.start(two, 1, 12)
    scene.sessions.revoke([10, 12, 13])
    assert scene.keys(Abort) == [1, 2, 4]
    assert outputs(one) == [(1, 10, Finish.ABORTED), (2, 10, Finish.ABORTED)]
    assert len(one._unacked) == 1, "one step for all of them"
    assert outputs(two) == [(1, 12, Finish.ABORTED)]
    assert (scene.sessions.live, scene.sessions.revoked_sequences) == (1, 3)
    scene.start(two, 5, 13)
    assert outputs(two)[1:] == [(5, 13, Finish.ABORTED)]
    assert scene.keys(Start) == [1, 2, 3, 4]
    scene.sessions.revoke([10, 12, 13])  # said again: nothing more happens
    assert scene.sessions.revoked_sequences == 3


async def test_what_is_held_is_counted_by_placement() -> None:
    scene = Scene()
    one, two = scene.attach("one"), scene.attach("two")
    for slot, lease, request_id in ((1, 10, "a"), (2, 10, "a"), (3, 11, "b")):
        scene.start(one, slot, lease, request_id)
    scene.start(two, 1, 12, "c")
    scene.sessions.abort(one, 3, 11)
    assert scene.sessions.held() == {("a", 10): 2, ("c", 12): 1}


async def test_an_engine_that_does_not_read_gets_no_more() -> None:
    behind = [False]
    scene = Scene(engine_behind=lambda: behind[0])
    session = scene.attach("one")
    scene.start(session, 1, 10)
    behind[0] = True
    scene.start(session, 2, 11)
    assert outputs(session) == [(2, 11, Finish.ABORTED)]
    behind[0] = False
    scene.start(session, 2, 12)
    assert scene.keys(Start) == [1, 2]


def test_revoked_leases_are_remembered_up_to_a_bound() -> None:
    leases = RevokedLeases(most=3)
    leases.add([1, 2])
    leases.add([3, 4])
    assert [lease in leases for lease in range(6)] == [False, False, True, True, True, False]
