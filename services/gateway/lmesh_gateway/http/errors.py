"""ServiceErrors as OpenAI error bodies, and what only HTTP can get wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fastapi.responses import JSONResponse
from grpc import StatusCode
from lmesh_chassis.redaction import redact

from lmesh_gateway.errors import InvalidArgumentError, RequestTooLargeError, ServiceError

_STATUS = {
    StatusCode.INVALID_ARGUMENT: 400,
    StatusCode.OUT_OF_RANGE: 400,
    StatusCode.FAILED_PRECONDITION: 400,
    StatusCode.UNAUTHENTICATED: 401,
    StatusCode.PERMISSION_DENIED: 403,
    StatusCode.NOT_FOUND: 404,
    StatusCode.ALREADY_EXISTS: 409,
    StatusCode.ABORTED: 409,
    StatusCode.RESOURCE_EXHAUSTED: 429,
    StatusCode.CANCELLED: 499,  # what proxies log for a request that its client gave up
    StatusCode.UNIMPLEMENTED: 501,
    StatusCode.UNAVAILABLE: 503,
    StatusCode.DEADLINE_EXCEEDED: 504,
}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
# The core names fields as the gRPC API does; OpenAI's have no groups.
_FIELDS = {"text.prompt": "prompt", "tokens.ids": "prompt", "chat": "messages"}
_GROUPS = frozenset({"chat", "output", "sampling", "stop"})


class MalformedBodyError(InvalidArgumentError):
    """The body is not the JSON that the endpoint takes."""

    reason = "MALFORMED_BODY"


class UnsupportedParameterError(InvalidArgumentError):
    """A parameter that OpenAI or vLLM has and lmesh does not have yet."""

    reason = "UNSUPPORTED_PARAMETER"


class UnknownParameterError(InvalidArgumentError):
    """A parameter that nobody has: most likely a typing mistake."""

    reason = "UNKNOWN_PARAMETER"


class RouteNotFoundError(ServiceError):
    """There is nothing at this path."""

    code = StatusCode.NOT_FOUND
    reason = "ROUTE_NOT_FOUND"


class MethodNotAllowedError(ServiceError):
    """The path takes other methods."""

    code = StatusCode.UNIMPLEMENTED
    reason = "METHOD_NOT_ALLOWED"


class HeadersTooLargeError(ServiceError):
    """The request's line and headers are larger than this gateway takes."""

    code = StatusCode.RESOURCE_EXHAUSTED
    reason = "HEADERS_TOO_LARGE"


class HeadersTooLateError(ServiceError):
    """The request's line and headers did not end in time."""

    code = StatusCode.DEADLINE_EXCEEDED
    reason = "HEADERS_TOO_LATE"


class BodyTooLateError(ServiceError):
    """The request's body did not end in time."""

    code = StatusCode.DEADLINE_EXCEEDED
    reason = "BODY_TOO_LATE"


# Where HTTP is finer than gRPC.
_FINER = {
    RequestTooLargeError.reason: 413,
    MethodNotAllowedError.reason: 405,
    HeadersTooLargeError.reason: 431,
    HeadersTooLateError.reason: 408,
    BodyTooLateError.reason: 408,
}


def http_status(error: ServiceError) -> int:
    """The HTTP status of an error."""
    return _FINER.get(error.reason, _STATUS.get(error.code, 500))


def error_body(error: ServiceError) -> dict[str, dict[str, str | None]]:
    """OpenAI's error object; `code` is the reason."""
    status = http_status(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    param = None if error.field is None else openai_field(error.field)
    return {"error": {"message": redact(error.message), "type": kind, "param": param, "code": error.reason}}


def openai_field(field: str) -> str:
    """The parameter that a field of the core came from."""
    head, _, rest = field.partition("[")
    group, _, name = head.partition(".")
    name = _FIELDS.get(head, name if name and group in _GROUPS else head)
    return f"{name}[{rest}" if rest else name


def error_response(error: ServiceError, headers: Mapping[str, str]) -> JSONResponse:
    """The response that tells an error."""
    headers = dict(headers)
    if error.retry_after_ms is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_ms / 1000))
    return JSONResponse(error_body(error), status_code=http_status(error), headers=headers)
