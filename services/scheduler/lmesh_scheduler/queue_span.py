"""The span of a request's wait: from its admission until it is placed or ends."""

from __future__ import annotations

from lmesh_chassis import tracing

from lmesh_scheduler.requests import Request


def begin(request: Request) -> None:
    """It waits from now on."""
    request.span = tracing.start_span(
        tracing.SCHEDULER_QUEUE,
        traceparent=request.submission.traceparent,
        attributes={"lmesh.request_id": request.id, "lmesh.model": request.submission.model},
    )


def end(request: Request, outcome: str) -> None:
    """It was placed, or has ended; no matter if it did not wait."""
    if request.span is not None:
        request.span.set_attributes({"lmesh.outcome": outcome, "lmesh.worker_id": request.worker_id})
        request.span.end()
        request.span = None
