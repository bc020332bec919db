"""Server-sent events: one outstanding write, and an end as soon as the client is gone."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Mapping
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lmesh_gateway.errors import CancelledError, InternalError, ServiceError
from lmesh_gateway.http.errors import error_body

log = logging.getLogger(__name__)

T = TypeVar("T")
DONE = "data: [DONE]\n\n"


def event(data: object, event_id: object = "") -> str:
    """One event that carries JSON, and an id when there is one."""
    named = f"id: {event_id}\n" if event_id else ""
    return f"{named}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(Response):
    """Streams what `events` yields. An error after the start is an event of its own, and then the stream ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], headers: Mapping[str, str]) -> None:
        super().__init__(status_code=200, headers={**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Writes the stream, or drops it when the client goes away."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        writing = asyncio.create_task(self._write(send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (writing, gone):
                task.cancel()
            await asyncio.gather(writing, gone, return_exceptions=True)
            await self._events.aclose()

    async def _write(self, send: Send) -> None:
        try:
            async for text in self._events:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        except ServiceError as error:
            await send({"type": "http.response.body", "body": event(error_body(error)).encode(), "more_body": True})
        except Exception:
            log.exception("a stream failed")
            told = error_body(InternalError("the gateway failed; its log has the cause"))
            await send({"type": "http.response.body", "body": event(told).encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Awaits `work`, cancelling it when the client goes away (then raises CancelledError; nobody will read it)."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise CancelledError("the client went away")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def first_of(events: AsyncGenerator[Any, None]) -> Any:  # noqa: ANN401 - of the generator's type
    """The first item; what goes wrong before it is raised here, while there still is a status to set."""
    return await anext(events)
