"""The network between simulated processes: streams of messages that are late, stall, and break at any point.

A stream is one RPC. Each direction is first in, first out; between streams nothing is ordered. When a stream breaks,
each end hears of it in its own time, and of what was under way only a prefix arrives.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.chaos.virtual_loop import Process, VirtualLoop

WINDOW = 16  # messages that a writer may be ahead of its reader
KEEPALIVE_S = 30.0  # a connection that is silent for this long is given up


class Status(NamedTuple):
    """How a stream ended; `trailers` as gRPC's trailing metadata."""

    code: Any  # grpc.StatusCode
    details: str = ""
    trailers: tuple[tuple[str, Any], ...] = ()


END = object()  # the sender says no more
CANCEL = object()  # the client has left
Item = Any  # bytes, END, CANCEL or a Status


@dataclass(slots=True)
class Weather:
    """How messages travel: seconds, and the share of them that are slow."""

    least_s: float = 0.0005
    most_s: float = 0.004
    slow_share: float = 0.03
    slow_s: float = 0.3


class Direction:
    """One way of a stream; `sink` gets each item in its time, in no process's context."""

    def __init__(self, net: Net, pair: tuple[Process, Process], sink: Callable[[Item], None]) -> None:
        self._net, self._pair, self._sink = net, pair, sink
        self._pending: deque[tuple[float, Item]] = deque()
        self._last = 0.0
        self._armed = False
        self.cut = False

    def __len__(self) -> int:
        return len(self._pending)

    def send(self, item: Item) -> None:
        """Puts an item under way; on a cut line it goes nowhere."""
        if not self.cut:
            self._put(item, self._net.delay_s())

    def _put(self, item: Item, delay_s: float) -> None:
        self._last = max(self._last, self._net.loop.now + delay_s)
        self._pending.append((self._last, item))
        self._arm()

    def break_off(self, last: Item, delay_s: float, *, all_lost: bool = False) -> None:
        """Loses a random rest of what is under way, or all; `last` is what the receiver finds instead."""
        if self.cut:
            return
        self.cut = True
        for _ in range(len(self._pending) if all_lost else self._net.rng.randint(0, len(self._pending))):
            self._pending.pop()
        self._put(last, delay_s)
        self._net.breaking.append(self)

    def hasten(self) -> None:
        """The break is found out now."""
        self._pending = deque((self._net.loop.now, item) for _, item in self._pending)
        if self._pending:
            self._net.at(self._net.loop.now, self._deliver)

    def _arm(self) -> None:
        if self._pending and not self._armed:
            self._armed = True
            self._net.at(self._pending[0][0], self._deliver)

    def _deliver(self) -> None:
        self._armed = False
        now, until = self._net.loop.now, self._net.stalled_until(self._pair)
        if until > now and not self.cut:  # what is told of a break comes from the own side
            self._armed = True
            self._net.at(until, self._deliver)
            return
        while self._pending and self._pending[0][0] <= now:
            self._sink(self._pending.popleft()[1])
        self._arm()


class Inbox:
    """What has arrived at one end and was not read yet; `space` is called at each read."""

    def __init__(self, space: Callable[[], None]) -> None:
        self._items: deque[Item] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._space = space

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Item) -> None:
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Item:
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        item = self._items.popleft()
        self._space()
        return item


@dataclass(eq=False)
class Stream:
    """One RPC; the two ends put their sinks in before anything is sent."""

    net: Net
    client: Process
    server: Process
    up: Direction = field(init=False)
    down: Direction = field(init=False)
    at_server: Callable[[Item], None] = field(init=False)
    at_client: Callable[[Item], None] = field(init=False)

    def __post_init__(self) -> None:
        pair = (self.client, self.server)
        self.up = Direction(self.net, pair, lambda item: self.at_server(item))
        self.down = Direction(self.net, pair, lambda item: self.at_client(item))

    def break_off(self, *, client_s: float, server_s: float, all_lost: bool = False) -> None:
        """Breaks; each end finds out after so long."""
        self.down.break_off(self.net.broken, client_s, all_lost=all_lost)
        self.up.break_off(CANCEL, server_s, all_lost=all_lost)
        self.net.forget(self)


class Net:
    """Who listens where, which streams there are, and what the weather is like."""

    def __init__(self, loop: VirtualLoop, rng: random.Random, broken: Status) -> None:
        self.loop, self.rng, self.broken = loop, rng, broken
        self.weather = Weather()
        self._neutral = contextvars.Context()
        self._bound: dict[str, tuple[Process, Any]] = {}
        self._streams: dict[int, Stream] = {}
        self._serials: dict[Stream, int] = {}
        self._made = 0
        self._stalls: dict[frozenset[str], float] = {}
        self.breaking: list[Direction] = []

    def at(self, when: float, callback: Callable[[], None]) -> None:
        """Calls back in no process's context."""
        self.loop.call_at(when, callback, context=self._neutral)

    def delay_s(self) -> float:
        """How long the next message takes."""
        weather = self.weather
        if self.rng.random() < weather.slow_share:
            return self.rng.uniform(weather.most_s, weather.slow_s)
        return self.rng.uniform(weather.least_s, weather.most_s)

    # -- listeners

    def bind(self, address: str, process: Process, server: Any) -> None:
        """A process listens; a dead one's address may be taken."""
        held = self._bound.get(address)
        if held is not None and held[0].alive and held[0] is not process:
            raise OSError(f"cannot listen on {address}")
        self._bound[address] = (process, server)

    def unbind(self, address: str, process: Process) -> None:
        """A process listens no more."""
        if self._bound.get(address, (None,))[0] is process:
            del self._bound[address]

    def listener(self, address: str) -> tuple[Process, Any] | None:
        """Who would take a stream now."""
        held = self._bound.get(address)
        return held if held is not None and held[0].alive else None

    # -- streams

    def open(self, client: Process, server: Process) -> Stream:
        """A stream between two processes."""
        stream = Stream(self, client, server)
        self._made += 1
        self._streams[self._made] = stream
        self._serials[stream] = self._made
        return stream

    def forget(self, stream: Stream) -> None:
        """It has ended."""
        serial = self._serials.pop(stream, None)
        if serial is not None:
            del self._streams[serial]

    def between(self, one: str, other: str) -> list[Stream]:
        """Streams between two processes, by name, whoever opened them."""
        return [s for s in self._streams.values() if {s.client.name, s.server.name} == {one, other}]

    def stalled_until(self, pair: tuple[Process, Process]) -> float:
        """Until when nothing gets through between the two."""
        return self._stalls.get(frozenset((pair[0].name, pair[1].name)), 0.0) if self._stalls else 0.0

    # -- faults

    def break_between(self, one: str, other: str) -> None:
        """Every stream between the two breaks; now and then an end is long in finding out."""
        for stream in self.between(one, other):
            stream.break_off(client_s=self._notice_s(), server_s=self._notice_s())

    def _notice_s(self) -> float:
        return self.rng.uniform(0, KEEPALIVE_S) if self.rng.random() < 0.15 else self.rng.uniform(0, 0.3)

    def stall_between(self, one: str, other: str, seconds: float) -> None:
        """Nothing gets through for a while; for longer than the keepalive, the streams break meanwhile."""
        self._stalls[frozenset((one, other))] = self.loop.now + seconds
        for stream in self.between(one, other) if seconds > KEEPALIVE_S else ():
            stream.break_off(client_s=self._silence_s(), server_s=self._silence_s(), all_lost=True)

    def _silence_s(self) -> float:
        # Told by the own keepalive, not through the line, which is stalled for longer.
        return self.rng.uniform(KEEPALIVE_S * 2 / 3, KEEPALIVE_S)

    def died(self, process: Process) -> None:
        """A process was killed: its peers' ends break, a little later."""
        for stream in list(self._streams.values()):
            if stream.client is process or stream.server is process:
                stream.break_off(client_s=self._notice_s(), server_s=self._notice_s())
        for address in [a for a, (held, _) in self._bound.items() if held is process]:
            del self._bound[address]

    def heal(self) -> None:
        """No more stalls, mild weather, and whoever still talks into a broken stream finds out."""
        self._stalls.clear()
        for direction in self.breaking:
            direction.hasten()
        self.breaking.clear()
        self.weather = Weather(slow_share=0.0)
