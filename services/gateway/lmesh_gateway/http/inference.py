"""The generating endpoints: begin, answer whole or as a stream, and go on with a stream that broke."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from lmesh_gateway.errors import InvalidArgumentError
from lmesh_gateway.generation import (
    Accepted,
    Event,
    GenerationRequest,
    Generator,
    ModelDirectory,
    ResumeRequest,
    ServedModel,
    TextPrompt,
)
from lmesh_gateway.http import chat, headers
from lmesh_gateway.http.body import read_body
from lmesh_gateway.http.completions import Completions, Echo
from lmesh_gateway.http.cursor import LAST_EVENT_ID, Cursor
from lmesh_gateway.http.fanout import Tagged, merged
from lmesh_gateway.http.schemas import ChatBody, CompletionBody
from lmesh_gateway.http.sse import EventStream, first_of, unless_disconnected
from lmesh_gateway.http.translate import Envelope, chat_request, completion_requests
from lmesh_gateway.validation import MAX_CHOICES, is_request_id


class Inference:
    """Belongs to one application."""

    def __init__(self, generator: Generator, directory: ModelDirectory, max_body_bytes: int) -> None:
        self._generator, self._directory, self._limit = generator, directory, max_body_bytes

    async def chat(self, request: Request) -> Response:
        """Continues a conversation."""
        body = await read_body(request, ChatBody, self._limit)
        wanted = chat_request(body, Envelope.of(request))
        events, accepted = await self._begin(request, merged(self._generator, [wanted]))
        if body.stream:
            cursor = Cursor(accepted.request_id)
            chunks = chat.chunks(accepted, _untagged(events), _wants_usage(body), cursor)
            return EventStream(chunks, headers.told_request_id(request))
        return await self._answer(request, events, chat.whole(accepted, _untagged(events)))

    async def complete(self, request: Request) -> Response:
        """Continues prompts."""
        body = await read_body(request, CompletionBody, self._limit)
        envelope = Envelope.of(request)
        wanted = completion_requests(body, envelope)
        model = self._directory.get(body.model, headers.tenant(request))
        events, accepted = await self._begin(request, merged(self._generator, wanted))
        completions = Completions(
            call_id=envelope.request_id,
            model=accepted.model,
            created=int(accepted.created),
            n=1 if body.n is None else body.n,
            echoes=[_echo(model, w) if body.echo else None for w in wanted],
        )
        if body.stream:
            # Each prompt of a batch is a request of its own, so that a batch has no cursor.
            cursor = Cursor(accepted.request_id) if len(wanted) == 1 else None
            chunks = completions.chunks(events, _wants_usage(body), cursor)
            return EventStream(_closing(chunks, events), headers.told_request_id(request))
        return await self._answer(request, events, completions.whole(events))

    async def resume_chat(self, request: Request, request_id: str, include_usage: bool) -> Response:
        """Goes on with a conversation's stream."""
        cursor, events, accepted = await self._resume(request, request_id)
        chunks = chat.chunks(accepted, _untagged(events), include_usage, cursor)
        return EventStream(chunks, headers.told_request_id(request))

    async def resume_completion(self, request: Request, request_id: str, include_usage: bool) -> Response:
        """Goes on with a completion's stream."""
        cursor, events, accepted = await self._resume(request, request_id)
        completions = Completions(
            call_id=accepted.request_id,
            model=accepted.model,
            created=int(accepted.created),
            n=MAX_CHOICES,
            echoes=[None],
        )
        chunks = completions.chunks(events, include_usage, cursor)
        return EventStream(_closing(chunks, events), headers.told_request_id(request))

    async def _resume(self, request: Request, request_id: str) -> tuple[Cursor, AsyncGenerator[Tagged, None], Accepted]:
        if not is_request_id(request_id):
            raise InvalidArgumentError("request_id: is none", field="request_id")
        request.state.request_id = request_id  # the answer names the request that it is of
        last = request.headers.get(LAST_EVENT_ID)
        cursor = Cursor(request_id) if not last else Cursor.parse(last, request_id)
        wanted = ResumeRequest(request_id=request_id, cursor=cursor.counts, tenant=headers.tenant(request))
        events, accepted = await self._begin(request, _tagged(self._generator.resume(wanted)))
        return cursor, events, accepted

    async def _begin(
        self, request: Request, events: AsyncGenerator[Tagged, None]
    ) -> tuple[AsyncGenerator[Tagged, None], Accepted]:
        """Returns once the first generation is accepted, so that a refusal still has a status."""
        try:
            _, first = await unless_disconnected(request, first_of(events))
        except BaseException:
            await events.aclose()
            raise
        assert isinstance(first, Accepted), "the core's first event is Accepted"
        return events, first

    async def _answer(
        self, request: Request, events: AsyncGenerator[Tagged, None], work: Awaitable[dict[str, Any]]
    ) -> Response:
        try:
            answer = await unless_disconnected(request, work)
            return JSONResponse(answer, headers=headers.told_request_id(request))
        finally:
            await events.aclose()


def _wants_usage(body: ChatBody | CompletionBody) -> bool:
    return body.stream_options is not None and bool(body.stream_options.include_usage)


async def _untagged(events: AsyncGenerator[Tagged, None]) -> AsyncGenerator[Event, None]:
    try:
        async for _, event in events:
            yield event
    finally:
        await events.aclose()


async def _tagged(events: AsyncGenerator[Event, None]) -> AsyncGenerator[Tagged, None]:
    try:
        async for event in events:
            yield 0, event
    finally:
        await events.aclose()


async def _closing(
    chunks: AsyncGenerator[str, None], events: AsyncGenerator[Tagged, None]
) -> AsyncGenerator[str, None]:
    try:
        async for chunk in chunks:
            yield chunk
    finally:
        await chunks.aclose()
        await events.aclose()


def _echo(model: ServedModel, wanted: GenerationRequest) -> Echo:
    """The prompt as it was given; of ids, their text."""
    tokenizer, prompt = model.tokenizer, wanted.prompt
    if isinstance(prompt, TextPrompt):
        ids = tokenizer.encode(prompt.text, add_special_tokens=True)
        return Echo(prompt.text, tuple(tokenizer.token_text(i) for i in ids))
    ids = list(getattr(prompt, "ids", ()))
    return Echo(tokenizer.decode(ids, skip_special_tokens=False), tuple(tokenizer.token_text(i) for i in ids))
