"""How a client's outbox is emptied: at once when alone, gathered when many are read, whole at the end."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from lmesh_gateway.choice import Piece
from lmesh_gateway.errors import CancelledError
from lmesh_gateway.generation import Accepted, Delta, Event, Finish, Usage
from lmesh_gateway.outbox import ClientOutbox
from lmesh_gateway.pace import LONGEST_S, STREAM_S, Pace

ACCEPTED = Accepted(request_id="r", model=cast(Any, None), prompt_ids=(1,), seed=0, created=0.0)
FINISH = Finish(choices=(), usage=Usage(prompt_tokens=1, completion_tokens=3, cached_tokens=0))


class Client:
    """Reads an outbox to its end."""

    def __init__(self, pace: Pace) -> None:
        self.outbox = ClientOutbox(cast(Any, None), pace, prompt_ids=(1,), n=1, with_logprobs=False)
        self.events: list[Event] = []
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for event in self.outbox.events():
            self.events.append(event)

    def add(self, token: int) -> None:
        self.outbox.add(0, Piece(text=chr(token), ids=[token], logprobs=None))

    async def until(self, count: int) -> None:
        async with asyncio.timeout(20):
            while len(self.events) < count:  # noqa: ASYNC110 - any of several turns of the loop
                await asyncio.sleep(0.001)

    @property
    def ids(self) -> list[tuple[int, ...]]:
        return [tuple(event.token_ids) for event in self.events if isinstance(event, Delta)]


class Crowded(Pace):
    """As if so many were read that each has to wait for so long."""

    interval_s = 0.0

    def __init__(self, interval_s: float) -> None:
        super().__init__()
        self.interval_s = interval_s


async def test_a_lone_client_gets_each_id_as_it_comes() -> None:
    client = Client(Pace())
    client.outbox.accept(ACCEPTED)
    await client.until(1)
    for count, token in enumerate((97, 98, 99), start=2):
        client.add(token)
        await client.until(count)
    assert client.ids == [(97,), (98,), (99,)]
    client.outbox.close(FINISH)
    await client.task
    assert client.events[0] is ACCEPTED and client.events[-1] is FINISH


async def test_in_a_crowd_the_first_comes_at_once_and_the_rest_together() -> None:
    client = Client(Crowded(0.5))
    client.outbox.accept(ACCEPTED)
    client.add(97)
    await client.until(2)
    for token in (98, 99, 100):
        client.add(token)
        await asyncio.sleep(0.002)
    assert client.ids == [(97,)]
    await client.until(3)
    assert client.ids == [(97,), (98, 99, 100)]
    client.outbox.close(FINISH)
    await client.task


@pytest.mark.parametrize("last", [FINISH, CancelledError("gone")])
async def test_the_end_waits_for_nothing(last: Finish | CancelledError) -> None:
    client = Client(Crowded(3600.0))
    client.outbox.accept(ACCEPTED)
    client.add(97)
    await client.until(2)
    client.add(98)
    client.outbox.close(last)
    async with asyncio.timeout(20):
        result = (await asyncio.gather(client.task, return_exceptions=True))[0]
    assert client.ids == [(97,), (98,)]
    assert result is last if isinstance(last, CancelledError) else client.events[-1] is last


def _many() -> Pace:
    pace = Pace()
    pace.streams = 100_000
    return pace


async def test_a_pace_counts_who_reads() -> None:
    pace = Pace()
    clients = [Client(pace) for _ in range(3)]
    await asyncio.sleep(0)
    assert pace.interval_s == pytest.approx(3 * STREAM_S)
    assert _many().interval_s == LONGEST_S
    clients[0].task.cancel()
    clients[1].outbox.close(FINISH)
    await asyncio.gather(*(client.task for client in clients[:2]), return_exceptions=True)
    assert pace.streams == 1
    clients[2].task.cancel()
    await asyncio.gather(clients[2].task, return_exceptions=True)
    assert pace.streams == 0
