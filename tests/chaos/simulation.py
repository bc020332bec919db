"""One seed, one life of a mesh: clients, faults, and what was found."""

from __future__ import annotations

import gc
import math
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import grpc
import redis

from tests.chaos import faults
from tests.chaos.clients import Client, Habit
from tests.chaos.monitors import Monitor, Owners, books, healthy, leftovers, strangers
from tests.chaos.nodes import Mesh, simulated_edges
from tests.chaos.oracle import LETTER_IDS, LETTERS, Spec
from tests.chaos.owed import broken_promise
from tests.chaos.sim_redis import SimStore
from tests.chaos.virtual_loop import Process, virtual_time
from tests.chaos.wires import Net, Status, Weather

BROKEN = Status(grpc.StatusCode.UNAVAILABLE, "the connection broke")
BOOKS_EVERY = 20  # instants
SETTLED_S = 7.0  # after this much of everybody being linked, everybody knows of what runs
REST_S = 80.0  # most time that the mesh may take to come to rest


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How large a simulation is; `kinds` None is every kind of fault."""

    clients: int = 6
    faults: int = 5
    busy_s: float = 10.0  # clients and faults begin within this time
    kinds: frozenset[str] | None = None
    max_tokens: int = 40
    slow: bool = False  # messages are often long under way, so that much is lost where a link breaks


@dataclass
class Outcome:
    """What a simulation showed; `violations` empty is good."""

    seed: int
    violations: list[str] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    virtual_s: float = 0.0
    steps: int = 0
    streams: int = 0

    def told(self) -> str:
        """For people: how it came to this."""
        return "\n".join([f"seed {self.seed}", *self.trace, *(f"VIOLATION {v}" for v in self.violations)])


class Simulation:
    """Build it, `run` it once."""

    def __init__(self, seed: int, shape: Shape, store: redis.Redis) -> None:
        self._seed, self._shape, self._client = seed, shape, store
        self._rng = random.Random(seed)
        self.outcome = Outcome(seed)
        self._instants = 0

    def run(self) -> Outcome:
        """The whole life; stops at the first violation."""
        with virtual_time(self._seed) as loop:
            self._loop = loop
            self._net = net = Net(loop, random.Random(self._seed + 1), BROKEN)
            store = SimStore(self._client, random.Random(self._seed + 2))
            specs = [self._spec(i) for i in range(self._shape.clients)]
            self._owners = Owners(store, [spec.request_id for spec in specs])
            monitor = Monitor({spec.request_id: spec for spec in specs}, self._fail)
            with simulated_edges(loop, net, store), monitor.watching():
                self._mesh = Mesh(loop, net, store, self._rng, on_start=monitor.on_start, note=self._note)
                self._clients = [self._make_client(spec) for spec in specs]
                self._live()
            self.outcome.virtual_s, self.outcome.steps = loop.now, loop.steps
        self.outcome.outcomes.update(client.outcome or "unended" for client in self._clients)
        self.outcome.streams = sum(client.streams for client in self._clients)
        return self.outcome

    # -- the plot

    def _live(self) -> None:
        shape, loop = self._shape, self._loop
        self._mesh.boot()
        if shape.slow:
            self._net.weather = Weather(slow_share=0.5, slow_s=1.0)
        people = Process("clients", 1)
        for client in self._clients:
            loop.spawn(people, client.run())
        for fault in faults.plan(self._rng, most=shape.faults, until_s=shape.busy_s, kinds=shape.kinds):
            if not self._go_on_to(fault.at_s):
                return
            self.outcome.faults[fault.name] += 1
            self._note(fault.strike(self._mesh, self._rng))
        if self._go_on_to(shape.busy_s):
            self._heal()
            self._come_to_rest()

    def _go_on_to(self, when: float) -> bool:
        """False once something was found."""
        try:
            self._loop.run_until(when, self._check)
        except _Found:
            return False
        return True

    def _heal(self) -> None:
        self._note("everything heals")
        self._net.heal()
        self._mesh.store.away = False
        for node in self._mesh.nodes:
            node.go_on()
            if not node.up:
                node.boot()
        for worker in self._mesh.workers:
            if worker.engine is not None and worker.engine.process.paused:
                self._loop.resume(worker.engine.process)

    def _come_to_rest(self) -> None:
        end, well_since = self._loop.now + REST_S, math.inf
        while self._loop.now < end:
            if not self._go_on_to(self._loop.now + 1.0):
                return
            well_since = math.inf if list(healthy(self._mesh)) else min(well_since, self._loop.now)
            if self._loop.now - well_since > SETTLED_S:
                self.outcome.violations += strangers(self._mesh)
            if not self._unrest():
                promises = (broken_promise(c, self.outcome.faults) for c in self._clients)
                self.outcome.violations += [promise for promise in promises if promise is not None]
                return
        self.outcome.violations += [f"not at rest: {what}" for what in self._unrest()]

    def _unrest(self) -> list[str]:
        waiting = [f"{c.spec.request_id} waits" for c in self._clients if not c.done]
        return waiting or list(healthy(self._mesh)) or list(leftovers(self._mesh))

    # -- what it watches

    def _check(self) -> None:
        self._instants += 1
        if self._loop.failures:
            self.outcome.violations += [f"failure: {text}" for text in self._loop.failures]
        if self._instants % BOOKS_EVERY == 0:
            self.outcome.violations += [*books(self._mesh), *self._owners.faults()]
        if self.outcome.violations:
            raise _Found

    def _fail(self, what: str) -> None:
        self._note(f"! {what}")
        self.outcome.violations.append(what)

    def _note(self, what: str) -> None:
        self.outcome.trace.append(f"{self._loop.now:8.3f} {what}")

    # -- the cast

    def _spec(self, index: int) -> Spec:
        rng = self._rng
        return Spec(
            request_id=f"r{index}",
            prompt=tuple(rng.choices(LETTER_IDS, k=rng.randint(1, 12))),
            seed=rng.getrandbits(40),
            n=rng.choice((1, 1, 1, 2, 3)),
            max_tokens=rng.randint(1, self._shape.max_tokens),
            stop=("".join(rng.choices(LETTERS, k=2)),) * rng.choice((0, 0, 1)),
            stop_ids=(rng.choice(LETTER_IDS),) * rng.choice((0, 0, 1)),
        )

    def _make_client(self, spec: Spec) -> Client:
        rng = self._rng
        gateways = [gateway.name for gateway in self._mesh.gateways]
        rng.shuffle(gateways)
        times: dict[str, Any] = {}
        habit = rng.choice(("stay", "stay", "stay", "leave", "cancel", "away"))
        if habit != "stay":
            times[f"{habit}_s"] = rng.uniform(0.0, 3.0)
        return Client(
            self._net,
            spec,
            Habit(
                gateways=tuple(gateways),
                begin_s=rng.uniform(0.8, self._shape.busy_s),
                detach=habit == "away" or rng.random() < 0.3,
                sync=rng.random() < 0.3,
                think_s=rng.choice((0.0, 0.0, 0.05)),
                **times,
            ),
            self._fail,
            self._note,
        )


class _Found(Exception):
    """Something that must not be was seen; there is no point in going on."""


def simulate(seed: int, store: redis.Redis, shape: Shape | None = None) -> Outcome:
    """One seed's life; `store` is a Redis that is emptied for it."""
    collecting = gc.isenabled()
    gc.disable()  # what is left of killed processes is thrown away here, not in the middle of another seed
    try:
        with mock.patch.object(sys, "unraisablehook", lambda *_: None):
            outcome = Simulation(seed, shape or Shape(), store).run()
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return outcome
