"""The server chain that every service has: trace context, metrics, error mapping."""

from __future__ import annotations

import inspect
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import grpc

from lmesh_chassis import logs, tracing
from lmesh_chassis.errors import InternalError, ServiceError, to_status
from lmesh_chassis.metrics import RPC_SECONDS, RPCS

_log = logging.getLogger(__name__)

REQUEST_ID_KEY = "x-request-id"

# Handlers are generic over their messages, which this file never looks into.
Handler = Any
Behaviour = Any
Message = Any
RpcContext = Any

Around = Callable[[str, RpcContext], AbstractAsyncContextManager[None]]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Handler]]


class AroundInterceptor(grpc.aio.ServerInterceptor):
    """Runs every handler, of whatever streaming kind, inside `around(method, context)`."""

    def __init__(self, around: Around) -> None:
        self._around = around
        self._wrapped: dict[int, tuple[Handler, Handler]] = {}  # by the handler's id, which is held with it

    async def intercept_service(self, continuation: Continuation, details: grpc.HandlerCallDetails) -> Handler:
        """Wraps the handler; an unknown method stays None and is refused by gRPC."""
        handler = await continuation(details)
        if handler is None:
            return None
        known = self._wrapped.get(id(handler))
        if known is None:
            # gRPC asks for each call and has one handler a method.
            known = self._wrapped[id(handler)] = handler, _wrap(handler, details.method, self._around)
        return known[1]


def standard_interceptors(domain: str) -> list[grpc.aio.ServerInterceptor]:
    """Trace context, metrics of the mapped status, mapping of what the handler raised: one wrapper for the three, for
    each costs a call 25 us."""
    return [AroundInterceptor(_standard(domain))]


def _wrap(handler: Handler, method: str, around: Around) -> Handler:
    if handler.response_streaming:
        behaviour = handler.stream_stream or handler.unary_stream
        make = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        # A coroutine writes through its context, and is called as one: a generator around it costs each call more.
        coroutine = inspect.iscoroutinefunction(behaviour)
        wrapped: Any = (_single if coroutine else _streaming)(behaviour, method, around)
    else:
        behaviour = handler.stream_unary or handler.unary_unary
        make = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        wrapped = _single(behaviour, method, around)
    return make(
        wrapped,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


def _single(behaviour: Behaviour, method: str, around: Around) -> Behaviour:
    async def call(request: Message, context: RpcContext) -> Message:
        async with around(method, context):
            return await behaviour(request, context)

    return call


def _streaming(behaviour: Behaviour, method: str, around: Around) -> Behaviour:
    async def call(request: Message, context: RpcContext) -> AsyncIterator[Message]:
        async with around(method, context):
            responses = behaviour(request, context)
            try:
                async for response in responses:
                    yield response
            finally:
                # Left early (a cancelled call): the handler's own cleanup runs now, not when the collector comes by.
                if hasattr(responses, "aclose"):
                    await responses.aclose()

    return call


def _standard(domain: str) -> Around:
    @asynccontextmanager
    async def around(method: str, context: RpcContext) -> AsyncIterator[None]:
        _join_trace(context)
        started = time.monotonic()
        cancelled = True
        try:
            yield
            cancelled = False
        except Exception as error:  # noqa: BLE001 - the process edge: gRPC would send the exception's text
            cancelled = False
            await _abort(error, method, context, domain)
        finally:
            RPCS.labels(method, "CANCELLED" if cancelled else _code_name(context.code())).inc()
            RPC_SECONDS.labels(method).observe(time.monotonic() - started)

    return around


def _join_trace(context: RpcContext) -> None:
    # Each call is a task of its own, so what is attached to its context needs no detaching.
    metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
    tracing.attach(metadata.get(tracing.TRACEPARENT_KEY, ""))
    logs.request_id.set(metadata.get(REQUEST_ID_KEY, ""))


async def _abort(error: Exception, method: str, context: RpcContext, domain: str) -> None:
    """Ends the call with the status of what was raised."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    known = error if isinstance(error, ServiceError) else internal_error(error, method)
    await context.abort_with_status(to_status(known, domain))


def _code_name(code: grpc.StatusCode | int | None) -> str:
    if isinstance(code, grpc.StatusCode):
        return code.name
    return next((known.name for known in grpc.StatusCode if known.value[0] == (code or 0)), "UNKNOWN")


def internal_error(error: Exception, where: str) -> InternalError:
    """Logs an unforeseen exception under a fresh id and returns what a caller may know of it."""
    error_id = uuid.uuid4().hex
    _log.error("internal error", extra={"error_id": error_id, "where": where}, exc_info=error)
    return InternalError(f"internal error; quote error id {error_id}", metadata={"error_id": error_id})
