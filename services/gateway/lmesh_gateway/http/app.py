"""The FastAPI application: routes, and what is the same for all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from lmesh_chassis import metrics
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from lmesh_gateway.errors import InternalError, InvalidArgumentError, ServiceError
from lmesh_gateway.generation import Generator, ModelDirectory, ServedModel
from lmesh_gateway.http.errors import MethodNotAllowedError, RouteNotFoundError, error_response
from lmesh_gateway.http.headers import tenant, told_request_id
from lmesh_gateway.http.inference import Inference
from lmesh_gateway.http.schemas import ChatBody, CompletionBody

log = logging.getLogger(__name__)

VERSION = version("lmesh-gateway")


def build_app(
    generator: Generator, directory: ModelDirectory, *, max_body_bytes: int, ready: Callable[[], bool]
) -> FastAPI:
    """The application over one gateway's core; `ready()` says whether /health is 200."""
    app = FastAPI(title="lmesh", version=VERSION, description="OpenAI-compatible inference on an lmesh mesh.")
    app.add_exception_handler(ServiceError, _on_service_error)
    app.add_exception_handler(HTTPException, _on_no_route)
    app.add_exception_handler(RequestValidationError, _on_wrong_query)
    app.add_exception_handler(Exception, _on_fault)
    _add_operations(app, ready)
    _add_models(app, directory)
    _add_inference(app, Inference(generator, directory, max_body_bytes))
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


async def _on_wrong_query(request: Request, error: Exception) -> Response:
    """A query parameter that cannot be read; bodies are read by our own code."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return error_response(InvalidArgumentError(f"{name}: {first['msg']}", field=name), told_request_id(request))


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
    async def list_models(request: Request) -> dict[str, Any]:
        """The models that some worker serves now, and the caller's adapters of them."""
        return {"object": "list", "data": [_model_object(m) for m in directory.list(tenant(request))]}

    @app.get("/v1/models/{model:path}", tags=["models"])
    async def get_model(request: Request, model: str) -> dict[str, Any]:
        """One model, or one adapter as `model:name` or `model:name@version`."""
        return _model_object(directory.get(model, tenant(request)))


def _model_object(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": int(model.created),
        "owned_by": "lmesh",
        "root": model.base,
        "parent": model.base if model.adapter else None,
        "max_model_len": model.max_model_len,
    }


def _add_inference(app: FastAPI, inference: Inference) -> None:
    @app.post("/v1/chat/completions", tags=["inference"], openapi_extra=_body_schema(ChatBody), response_model=None)
    async def create_chat_completion(request: Request) -> Response:
        """Continues a conversation."""
        return await inference.chat(request)

    @app.post("/v1/completions", tags=["inference"], openapi_extra=_body_schema(CompletionBody), response_model=None)
    async def create_completion(request: Request) -> Response:
        """Continues one prompt, or each of a batch."""
        return await inference.complete(request)

    @app.get("/v1/chat/completions/{request_id}/stream", tags=["inference"], response_model=None)
    async def resume_chat_completion(request: Request, request_id: str, include_usage: bool = False) -> Response:
        """Goes on with a conversation's stream after the event that Last-Event-ID names, or gives it from the start."""
        return await inference.resume_chat(request, request_id, include_usage)

    @app.get("/v1/completions/{request_id}/stream", tags=["inference"], response_model=None)
    async def resume_completion(request: Request, request_id: str, include_usage: bool = False) -> Response:
        """Goes on with a completion's stream after the event that Last-Event-ID names, or gives it from the start."""
        return await inference.resume_completion(request, request_id, include_usage)


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
