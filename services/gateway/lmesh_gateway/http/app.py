"""The FastAPI application: routes, and what is the same for all of them."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from lmesh_chassis import metrics
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lmesh_gateway.errors import InternalError, ServiceError
from lmesh_gateway.generation import (
    Accepted,
    Event,
    GenerationRequest,
    Generator,
    ModelDirectory,
    ServedModel,
    TextPrompt,
)
from lmesh_gateway.http import chat
from lmesh_gateway.http.body import read_body
from lmesh_gateway.http.completions import Completions, Echo
from lmesh_gateway.http.errors import MethodNotAllowedError, RouteNotFoundError, error_response
from lmesh_gateway.http.fanout import Tagged, merged
from lmesh_gateway.http.headers import told_request_id
from lmesh_gateway.http.schemas import ChatBody, CompletionBody
from lmesh_gateway.http.sse import EventStream, first_of, unless_disconnected
from lmesh_gateway.http.translate import Envelope, chat_request, completion_requests

log = logging.getLogger(__name__)

VERSION = version("lmesh-gateway")


def build_app(
    generator: Generator, directory: ModelDirectory, *, max_body_bytes: int, ready: Callable[[], bool]
) -> FastAPI:
    """The application over one gateway's core; `ready()` says whether /health is 200."""
    app = FastAPI(title="lmesh", version=VERSION, description="OpenAI-compatible inference on an lmesh mesh.")
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(HTTPException, _on_no_route)
    app.add_exception_handler(Exception, _on_fault)
    _add_operations(app, ready)
    _add_models(app, directory)
    _add_inference(app, _Inference(generator, directory, max_body_bytes))
    return app


async def _on_service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return error_response(error, told_request_id(request))


async def _on_no_route(request: Request, error: Exception) -> Response:
    """What the router refuses, in the form of every other error."""
    assert isinstance(error, HTTPException)
    headers = {**told_request_id(request), **(error.headers or {})}
    path = request.url.path[:256]
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = headers.get("Allow", "another method")
        return error_response(MethodNotAllowedError(f"{path} takes {allowed}, not {request.method}"), headers)
    if error.status_code == HTTPStatus.NOT_FOUND:
        return error_response(RouteNotFoundError(f"nothing is at {path}; /docs lists the routes"), headers)
    return error_response(InternalError(str(error.detail)), headers)


async def _on_fault(request: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error)
    return error_response(InternalError("the gateway failed; its log has the cause"), told_request_id(request))


def _add_operations(app: FastAPI, ready: Callable[[], bool]) -> None:
    @app.get("/health", tags=["operations"])
    async def health() -> Response:
        """200 when this gateway can serve, 503 when not."""
        return PlainTextResponse("ok\n" if ready() else "not ready\n", status_code=200 if ready() else 503)

    @app.get("/metrics", tags=["operations"])
    async def metrics_page() -> Response:
        """Prometheus metrics."""
        return Response(metrics.render(), media_type=metrics.CONTENT_TYPE)

    @app.get("/version", tags=["operations"])
    async def version_page() -> dict[str, str]:
        """The gateway's version."""
        return {"version": VERSION}


def _add_models(app: FastAPI, directory: ModelDirectory) -> None:
    @app.get("/v1/models", tags=["models"])
    async def list_models() -> dict[str, Any]:
        """The models that some worker serves now."""
        return {"object": "list", "data": [_model_object(m) for m in directory.list()]}

    @app.get("/v1/models/{model:path}", tags=["models"])
    async def get_model(model: str) -> dict[str, Any]:
        """One model."""
        return _model_object(directory.get(model))


def _model_object(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": int(model.created),
        "owned_by": "lmesh",
        "root": model.id,
        "parent": None,
        "max_model_len": model.max_model_len,
    }


def _add_inference(app: FastAPI, inference: _Inference) -> None:
    @app.post("/v1/chat/completions", tags=["inference"], openapi_extra=_body_schema(ChatBody), response_model=None)
    async def create_chat_completion(request: Request) -> Response:
        """Continues a conversation."""
        return await inference.chat(request)

    @app.post("/v1/completions", tags=["inference"], openapi_extra=_body_schema(CompletionBody), response_model=None)
    async def create_completion(request: Request) -> Response:
        """Continues one prompt, or each of a batch."""
        return await inference.complete(request)


def _body_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """The body for /docs: it is read by our own code, which FastAPI cannot see into."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(kind)}}}}


def _inlined(kind: type[BaseModel]) -> dict[str, Any]:
    schema = kind.model_json_schema()
    definitions = schema.pop("$defs", {})

    def fill(node: Any) -> Any:  # noqa: ANN401 - JSON
        if isinstance(node, dict):
            if "$ref" in node:
                return fill(definitions[node["$ref"].rsplit("/", 1)[-1]])
            return {key: fill(value) for key, value in node.items()}
        return [fill(value) for value in node] if isinstance(node, list) else node

    filled: dict[str, Any] = fill(schema)
    return filled


class _Inference:
    """The two generating endpoints."""

    def __init__(self, generator: Generator, directory: ModelDirectory, max_body_bytes: int) -> None:
        self._generator, self._directory, self._limit = generator, directory, max_body_bytes

    async def chat(self, request: Request) -> Response:
        body = await read_body(request, ChatBody, self._limit)
        wanted = chat_request(body, Envelope.of(request))
        events, accepted = await self._begin(request, [wanted])
        untagged = _untagged(events)
        headers = told_request_id(request)
        if body.stream:
            return EventStream(chat.chunks(accepted, untagged, _wants_usage(body)), headers)
        return await self._answer(request, events, chat.whole(accepted, untagged), headers)

    async def complete(self, request: Request) -> Response:
        body = await read_body(request, CompletionBody, self._limit)
        envelope = Envelope.of(request)
        wanted = completion_requests(body, envelope)
        model = self._directory.get(body.model)
        events, accepted = await self._begin(request, wanted)
        completions = Completions(
            call_id=envelope.request_id,
            model=accepted.model,
            created=int(accepted.created),
            n=1 if body.n is None else body.n,
            echoes=[_echo(model, w) if body.echo else None for w in wanted],
        )
        headers = told_request_id(request)
        if body.stream:
            return EventStream(_closing(completions.chunks(events, _wants_usage(body)), events), headers)
        return await self._answer(request, events, completions.whole(events), headers)

    async def _begin(
        self, request: Request, wanted: list[GenerationRequest]
    ) -> tuple[AsyncGenerator[Tagged, None], Accepted]:
        """Starts the generations; returns once the first is accepted, so that a refusal still has a status."""
        events: AsyncGenerator[Tagged, None] = merged(self._generator, wanted)  # type: ignore[assignment]
        try:
            _, first = await unless_disconnected(request, first_of(events))
        except BaseException:
            await events.aclose()
            raise
        assert isinstance(first, Accepted), "the core's first event is Accepted"
        return events, first

    async def _answer(
        self,
        request: Request,
        events: AsyncGenerator[Tagged, None],
        work: Awaitable[dict[str, Any]],
        headers: dict[str, str],
    ) -> Response:
        try:
            return JSONResponse(await unless_disconnected(request, work), headers=headers)
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
