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


class TrainerIdInUseError(ServiceError):
    """Another live trainer has this id."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "TRAINER_ID_IN_USE"


class JobNotFoundError(ServiceError):
    """The caller has no job of that id."""

    code = grpc.StatusCode.NOT_FOUND
    reason = "JOB_NOT_FOUND"


class JobExistsError(ServiceError):
    """That id is another job's."""

    code = grpc.StatusCode.ALREADY_EXISTS
    reason = "JOB_EXISTS"


class JobStateError(ServiceError):
    """The job's state does not have that change."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "JOB_STATE"


class JobRefusedError(ServiceError):
    """A trainer cannot do it; `refused` gives the error its own reason."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    reason = "JOB_REFUSED"


def refused(reason: str, message: str, field: str | None = None) -> JobRefusedError:
    """What a trainer says of a job, under the trainer's own reason (reasons belong to classes)."""
    kind: type[JobRefusedError] = type("JobRefusedError", (JobRefusedError,), {"reason": reason})
    return kind(message, field=field)


class NoTrainerError(ServiceError):
    """It needs a trainer, and none is free to answer."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "NO_TRAINER"
    retryable = True


class AdapterNotFoundError(ServiceError):
    """The caller has no adapter of that name or version."""

    code = grpc.StatusCode.NOT_FOUND
    reason = ADAPTER_NOT_FOUND


class ModelNotServedError(ServiceError):
    """No worker serves the model that an adapter belongs to."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "MODEL_NOT_SERVED"


class AdapterBaseMismatchError(ServiceError):
    """The adapter was trained on other weights, or on the same under another quantisation."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "ADAPTER_BASE_MISMATCH"


class AdapterRefusedError(ServiceError):
    """No worker could load the adapter; metadata `worker_reason` is theirs."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    reason = "ADAPTER_REFUSED"


class RegistryUnavailableError(ServiceError):
    """Redis does not answer, and what is published must outlive this process."""

    code = grpc.StatusCode.UNAVAILABLE
    reason = "REGISTRY_UNAVAILABLE"
    retryable = True


class ElsewhereError(ServiceError):
    """Another service does that."""

    code = grpc.StatusCode.UNIMPLEMENTED
    reason = "ELSEWHERE"
