"""Several generations as one stream of events, for a batch of prompts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from lmesh_gateway.generation import Event, GenerationRequest, Generator

Tagged = tuple[int, Event]  # index of the request, its event


async def merged(generator: Generator, requests: Sequence[GenerationRequest]) -> AsyncGenerator[Tagged, None]:
    """Events of all requests as they come, each with its request's index.

    The first failure ends the whole: the others are cancelled and it is raised. So does closing the iterator.
    """
    if len(requests) == 1:
        async with aclosing(generator.generate(requests[0])) as events:
            async for event in events:
                yield 0, event
        return
    # Bounded, so that a slow reader slows the generators, which then coalesce.
    queue: asyncio.Queue[Tagged | Exception | None] = asyncio.Queue(maxsize=2 * len(requests))
    tasks = [asyncio.create_task(_forward(generator, i, r, queue)) for i, r in enumerate(requests)]
    try:
        ended = 0
        while ended < len(tasks):
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                ended += 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(
    generator: Generator, index: int, request: GenerationRequest, queue: asyncio.Queue[Tagged | Exception | None]
) -> None:
    try:
        async with aclosing(generator.generate(request)) as events:
            async for event in events:
                await queue.put((index, event))
        await queue.put(None)
    except Exception as error:  # noqa: BLE001 - raised again by the reader of the queue
        await queue.put(error)
