"""What request headers say: ids, traces, deadlines."""

from __future__ import annotations

from fastapi import Request

from lmesh_gateway.errors import InvalidArgumentError

REQUEST_ID = "x-request-id"
TIMEOUT_MS = "x-lmesh-timeout-ms"
TRACEPARENT = "traceparent"


def request_id(request: Request) -> str | None:
    """The client's own request id, if it sent one."""
    return request.headers.get(REQUEST_ID) or None


def traceparent(request: Request) -> str:
    """The client's trace context."""
    return request.headers.get(TRACEPARENT, "")


def deadline_s(request: Request) -> float | None:
    """The client's deadline in seconds. Raises InvalidArgumentError for what is no positive number."""
    text = request.headers.get(TIMEOUT_MS)
    if text is None:
        return None
    if not text.isdigit() or int(text) == 0:
        raise InvalidArgumentError(f"{TIMEOUT_MS}: must be a positive number of milliseconds", field=TIMEOUT_MS)
    return int(text) / 1000
