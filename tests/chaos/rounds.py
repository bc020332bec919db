"""One round of chaos on a real mesh: a crowd of streams, one blow while all of them flow, and what it cost."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.chaos.real_mesh import RealMesh, until
from tests.chaos.streams import Received, crowd, request, run

FELT_S = 0.5
PROBES = 8  # connections; that all of them get to one of two gateway processes is unlikely enough
STREAMS = {"worker": 16, "scheduler": 8, "gateway": 8, "redis": 8, "redis-away": 8, "engine": 16}
REDIS_AWAY_S = 10.0
REST_S = 30.0
Blow = Callable[[RealMesh, random.Random], None]


def _kill_worker(mesh: RealMesh, rng: random.Random) -> None:
    mesh.kill(rng.choice(("worker-0", "worker-1")))


def _kill_scheduler(mesh: RealMesh, rng: random.Random) -> None:
    mesh.kill("scheduler")


def _kill_gateway(mesh: RealMesh, rng: random.Random) -> None:
    rng.choice(mesh.gateways()).send_signal(signal.SIGKILL)


def _kill_redis(mesh: RealMesh, rng: random.Random) -> None:
    mesh.kill("redis")


def _stop_redis(mesh: RealMesh, rng: random.Random) -> None:
    """For ten seconds; what it is sent meanwhile it does afterwards."""
    redis = mesh.process("redis")
    redis.suspend()
    timer = threading.Timer(REDIS_AWAY_S, redis.resume)
    timer.daemon = True
    timer.start()


def _stop_engine(mesh: RealMesh, rng: random.Random) -> None:
    """It goes on only when the round is over."""
    mesh.engine(rng.choice(("worker-0", "worker-1"))).suspend()


BLOWS: dict[str, Blow] = {
    "worker": _kill_worker,
    "scheduler": _kill_scheduler,
    "gateway": _kill_gateway,
    "redis": _kill_redis,
    "redis-away": _stop_redis,
    "engine": _stop_engine,
}
KINDS = tuple(BLOWS)
WORDS = {
    "worker": "kill -9 of a worker",
    "scheduler": "kill -9 of the scheduler",
    "gateway": "kill -9 of a gateway",
    "redis": "kill -9 of Redis",
    "redis-away": "SIGSTOP of Redis for 10 s",
    "engine": "SIGSTOP of an engine",
}


@dataclass
class Round:
    """What one round showed; seconds."""

    kind: str
    streams: int = 0
    lost: list[str] = field(default_factory=list)  # streams that ended otherwise than by Finish, and their reasons
    wrong: list[str] = field(default_factory=list)  # ids other than undisturbed
    forgotten: list[str] = field(default_factory=list)  # streams that Resume does not give again afterwards
    leaked: int = 0  # KV blocks that were still held long after
    felt: int = 0  # streams that were silent for longer than a scheduler's hiccup
    resumed: int = 0
    behind: int = 0  # ASYNC streams that had ids of which the ledger did not know, and took them again
    not_durable: int = 0
    gap_s: float = 0.0  # longest silence of any stream
    placed_s: float = 0.0  # from the blow until a new request gave its first id

    @property
    def good(self) -> bool:
        """Nobody lost anything."""
        return not self.lost and not self.wrong and not self.forgotten and not self.leaked


def undisturbed(mesh: RealMesh, count: int, max_tokens: int) -> list[list[list[int]]]:
    """The ids of a crowd when nothing happens; they must come out of every round."""
    received = run(mesh.target, crowd(f"calm{count}-{time.monotonic_ns()}", count, max_tokens=max_tokens))
    assert all(r.finished for r in received), [r.error for r in received]
    return [r.ids for r in received]


def play(mesh: RealMesh, kind: str, seed: int, due: list[list[list[int]]], max_tokens: int) -> Round:
    """Streams, the blow, a new request right after it, and everything running again."""
    until(lambda: _settled(mesh), "every gateway process serves")
    found = Round(kind, streams=len(due))
    prefix = f"{kind}-{seed}-{time.monotonic_ns()}"
    received = run(
        mesh.target,
        crowd(prefix, len(due), max_tokens=max_tokens),
        lambda: _strike(mesh, kind, random.Random(seed), prefix, found),
    )
    _judge(received, due, found)
    again = run(mesh.target, [got.request for got in received if got.finished], replay=True)
    found.forgotten = [got.request.request_id for got, ids in zip(again, due, strict=False) if got.ids != ids]
    for worker in ("worker-0", "worker-1") if kind == "engine" else ():
        mesh.engine(worker).resume()
    until(lambda: len(mesh.placeable()) == 2, "both workers are back")
    found.leaked = _left(mesh)
    return found


def _left(mesh: RealMesh) -> int:
    """KV blocks in use at rest; a killed gateway's sequences have their grace first, heartbeats come each second."""
    deadline = time.monotonic() + REST_S
    while (used := mesh.used_blocks()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return used


def _settled(mesh: RealMesh) -> bool:
    """All processes are there, and whatever gateway process a connection gets to, it is answered."""
    if not mesh.well or len(mesh.gateways()) != 2 or len(mesh.placeable()) != 2:
        return False
    probes = [request(f"probe{i}", greedy=True, max_tokens=2) for i in range(PROBES)]
    return all(received.finished for received in run(mesh.target, probes))


def _strike(mesh: RealMesh, kind: str, rng: random.Random, prefix: str, found: Round) -> None:
    began = time.monotonic()
    BLOWS[kind](mesh, rng)
    late = request("late", greedy=True, max_tokens=4)

    def answered() -> bool:
        late.request_id = f"{prefix}-late-{time.monotonic_ns()}"
        return run(mesh.target, [late])[0].finished

    until(answered, "a new request is placed")
    found.placed_s = time.monotonic() - began


def _judge(received: list[Received], due: list[list[list[int]]], found: Round) -> None:
    for got, ids in zip(received, due, strict=True):
        name = got.request.request_id
        if not got.finished:
            found.lost.append(f"{name}: {got.error} after {got.count} ids")
        elif got.ids != ids:
            found.wrong.append(name)
        found.felt += got.gap_s > FELT_S
        found.resumed += bool(got.resumes)
        found.behind += bool(got.behind)
        found.not_durable += got.finished and not got.durable
        found.gap_s = max(found.gap_s, got.gap_s)
