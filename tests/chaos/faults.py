"""What goes wrong in one simulation: a plan drawn from its seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.chaos.nodes import Mesh, Node
from tests.chaos.wires import Weather

Strike = Callable[[Mesh, random.Random], str]


@dataclass(frozen=True)
class Fault:
    """Something that happens at a time."""

    at_s: float
    name: str
    strike: Strike


def _kill(nodes: Callable[[Mesh], list[Node]]) -> Strike:
    def strike(mesh: Mesh, rng: random.Random) -> str:
        node = rng.choice(nodes(mesh))
        if not node.up:
            return f"{node.name} was down already"
        node.kill()
        # Incarnations count seconds at least, and so does the start of a real process.
        soonest = 1.0 if node is mesh.scheduler else 0.1
        mesh.restart(node, rng.choice((rng.uniform(soonest, 1.5), rng.uniform(1.5, 8.0))))
        return f"kill {node.name}"

    return strike


def _pause(nodes: Callable[[Mesh], list[Node]]) -> Strike:
    def strike(mesh: Mesh, rng: random.Random) -> str:
        node, seconds = rng.choice(nodes(mesh)), rng.choice((rng.uniform(0.1, 2.0), rng.uniform(2.0, 12.0)))
        node.pause()
        mesh.net.at(mesh.loop.now + seconds, node.go_on)
        return f"pause {node.name} for {seconds:.1f} s"

    return strike


def _replaced(mesh: Mesh, rng: random.Random) -> str:
    old, seconds = mesh.scheduler.replace(), rng.uniform(0.5, 10.0)
    mesh.net.at(mesh.loop.now + seconds, lambda: mesh.loop.resume(old))
    return f"{old} is replaced, and wakes after {seconds:.1f} s"


def _drain(nodes: Callable[[Mesh], list[Node]]) -> Strike:
    def strike(mesh: Mesh, rng: random.Random) -> str:
        node = rng.choice(nodes(mesh))
        if node.up and node.shutdown is not None:
            node.process.context.run(node.shutdown.request)
        return f"drain {node.name}"

    return strike


def _engine_dies(mesh: Mesh, rng: random.Random) -> str:
    node = rng.choice(mesh.workers)
    if node.up and node.engine is not None:
        node.process.context.run(node.engine.die)
    return f"the engine of {node.name} dies"


def _engine_stops(mesh: Mesh, rng: random.Random) -> str:
    node, seconds = rng.choice(mesh.workers), rng.choice((rng.uniform(0.5, 4.0), rng.uniform(4.0, 15.0)))
    engine = node.engine
    if engine is not None and engine.process.alive:
        engine.process.paused = True
        mesh.net.at(mesh.loop.now + seconds, lambda: mesh.loop.resume(engine.process))
    return f"the engine of {node.name} stops for {seconds:.1f} s"


def _pair(mesh: Mesh, rng: random.Random) -> tuple[str, str]:
    gateway, worker = rng.choice(mesh.gateways).name, rng.choice(mesh.workers).name
    return rng.choice(((gateway, worker), (gateway, "scheduler"), (worker, "scheduler"), ("clients", gateway)))


def _break(mesh: Mesh, rng: random.Random) -> str:
    one, other = _pair(mesh, rng)
    mesh.net.break_between(one, other)
    return f"break {one}-{other}"


def _stall(mesh: Mesh, rng: random.Random) -> str:
    (one, other), seconds = _pair(mesh, rng), rng.choice((rng.uniform(0.2, 3.0), rng.uniform(3.0, 40.0)))
    mesh.net.stall_between(one, other, seconds)
    return f"stall {one}-{other} for {seconds:.1f} s"


def _redis_away(mesh: Mesh, rng: random.Random) -> str:
    seconds = rng.uniform(0.1, 6.0)
    mesh.store.away = True

    def back() -> None:
        mesh.store.away = False

    mesh.net.at(mesh.loop.now + seconds, back)
    return f"Redis away for {seconds:.1f} s"


def _redis_emptied(mesh: Mesh, rng: random.Random) -> str:
    told = _redis_away(mesh, rng)
    mesh.store.lose_all()
    return f"{told}, and empty after"


def _slow(mesh: Mesh, rng: random.Random) -> str:
    mesh.net.weather = Weather(slow_share=0.3, slow_s=rng.uniform(0.1, 2.0))
    return "slow network"


def _gateways(mesh: Mesh) -> list[Node]:
    return list(mesh.gateways)


def _workers(mesh: Mesh) -> list[Node]:
    return list(mesh.workers)


def _scheduler(mesh: Mesh) -> list[Node]:
    return [mesh.scheduler]


KINDS: dict[str, tuple[int, Strike]] = {
    "worker killed": (4, _kill(_workers)),
    "worker paused": (2, _pause(_workers)),
    "worker drained": (1, _drain(_workers)),
    "engine killed": (2, _engine_dies),
    "engine stopped": (2, _engine_stops),
    "scheduler killed": (4, _kill(_scheduler)),
    "scheduler paused": (2, _pause(_scheduler)),
    "scheduler replaced": (1, _replaced),
    "gateway killed": (3, _kill(_gateways)),
    "scheduler drained": (1, _drain(_scheduler)),
    "gateway drained": (1, _drain(_gateways)),
    "gateway paused": (1, _pause(_gateways)),
    "link broken": (5, _break),
    "link stalled": (4, _stall),
    "redis away": (2, _redis_away),
    "redis emptied": (1, _redis_emptied),
    "slow network": (1, _slow),
}


def plan(rng: random.Random, *, most: int, until_s: float, kinds: frozenset[str] | None = None) -> list[Fault]:
    """Up to `most` faults of the given kinds (None: all) before `until_s`, in order of time."""
    names = [name for name in KINDS if kinds is None or name in kinds]
    drawn = rng.choices(names, [KINDS[name][0] for name in names], k=rng.randint(1, most)) if names and most else []
    return sorted((Fault(rng.uniform(1.0, until_s), name, KINDS[name][1]) for name in drawn), key=lambda f: f.at_s)
