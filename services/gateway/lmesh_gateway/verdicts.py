"""What the scheduler's reasons mean to a client: refusals and revocations as errors."""

from __future__ import annotations

from lmesh_chassis.errors import ServiceError

from lmesh_gateway.errors import (
    AdapterNotFoundError,
    AdapterRefusedError,
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
_LOSSES = frozenset({"WORKER_LOST", "WORKER_STUCK"})

_REFUSALS: dict[str, type[ServiceError]] = {
    error.reason: error
    for error in (
        QueueFullError,
        ModelNotFoundError,
        AdapterNotFoundError,
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


def revocation(reason: str, *, adapter: bool = False) -> ServiceError:
    """The error of a request whose lease was taken back for good, or that was ended in the queue.

    `adapter`: it runs with one; the scheduler then gives a worker's own reason when no worker can load it.
    """
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
    if reason == AdapterNotFoundError.reason:
        return AdapterNotFoundError("the adapter was deleted, and no worker holds it any more", field="model")
    if adapter and reason not in _LOSSES:
        metadata = {"worker_reason": reason}
        return AdapterRefusedError(f"no worker can load the adapter: {reason}", field="model", metadata=metadata)
    return WorkerLostError("the worker that held the request is lost")
