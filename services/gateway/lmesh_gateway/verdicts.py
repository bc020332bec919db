"""What the scheduler's reasons mean to a client: refusals and revocations as errors."""

from __future__ import annotations

from lmesh_chassis.errors import ServiceError

from lmesh_gateway.errors import (
    CancelledError,
    DrainingError,
    DuplicateRequestIdError,
    InvalidArgumentError,
    ModelNotFoundError,
    NoWorkerError,
    QueueFullError,
    QuotaExceededError,
    RateLimitedError,
    RequestEndedError,
    ResumedElsewhereError,
    SchedulerUnavailableError,
    WorkerLostError,
)

RETRY_MS = 1000

_REFUSALS: dict[str, type[ServiceError]] = {
    error.reason: error
    for error in (
        QueueFullError,
        ModelNotFoundError,
        NoWorkerError,
        DuplicateRequestIdError,
        DrainingError,
        InvalidArgumentError,
        RateLimitedError,
        QuotaExceededError,
        ResumedElsewhereError,
        RequestEndedError,
    )
}


def refusal(reason: str, message: str, retry_after_ms: int) -> ServiceError:
    """The error of a request that was not admitted."""
    error = _REFUSALS.get(reason, SchedulerUnavailableError)
    return error(message, retry_after_ms=retry_after_ms or None)


def revocation(reason: str) -> ServiceError:
    """The error of a request whose lease was taken back for good, or that was ended in the queue."""
    if reason == "CANCELLED":
        return CancelledError("the request was cancelled")
    if reason == ResumedElsewhereError.reason:
        return ResumedElsewhereError("the request goes on in another stream")
    if reason == "DRAINING":
        return DrainingError("the worker is leaving; try again", retry_after_ms=RETRY_MS)
    if reason == "MODEL_NOT_FOUND":
        return ModelNotFoundError("the last worker that served the model has left", field="model")
    if reason == "GATEWAY_LOST":
        text = "this gateway had no scheduler for too long; try again"
        return SchedulerUnavailableError(text, retry_after_ms=RETRY_MS)
    return WorkerLostError("the worker that held the request is lost")
