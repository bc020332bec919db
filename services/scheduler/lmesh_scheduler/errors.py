"""What the scheduler refuses: reasons that ride on the Dispatch link, and statuses of its calls."""

from __future__ import annotations

import grpc
from lmesh_chassis.errors import ServiceError

DOMAIN = "lmesh.scheduler"

# Reasons of Refused and Revoked events.
INVALID_ARGUMENT = "INVALID_ARGUMENT"
QUEUE_FULL = "QUEUE_FULL"
MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
DUPLICATE_REQUEST_ID = "DUPLICATE_REQUEST_ID"
DRAINING = "DRAINING"
CANCELLED = "CANCELLED"
WORKER_LOST = "WORKER_LOST"
WORKER_STUCK = "WORKER_STUCK"
GATEWAY_LOST = "GATEWAY_LOST"
RESUMED_ELSEWHERE = "RESUMED_ELSEWHERE"
REQUEST_ENDED = "REQUEST_ENDED"
RATE_LIMITED = "RATE_LIMITED"
QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
ADAPTER_NOT_FOUND = "ADAPTER_NOT_FOUND"


class HelloRequiredError(ServiceError):
    """A link did not begin with a full hello, or a second one came."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "HELLO_REQUIRED"


class ModelConflictError(ServiceError):
    """A worker announces other weights under a model id that is served already."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "MODEL_CONFLICT"


class WorkerIdInUseError(ServiceError):
    """Another live worker has this id, or a newer boot of it took this one's place."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "WORKER_ID_IN_USE"


class RequestNotFoundError(ServiceError):
    """No record, in memory or in Redis."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "REQUEST_NOT_FOUND"


class JournalUnavailableError(ServiceError):
    """The record is not in memory, and Redis does not answer."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "JOURNAL_UNAVAILABLE"
    retryable = True


class SlowLinkError(ServiceError):
    """A gateway does not read what it is told."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "SLOW_CONSUMER"
