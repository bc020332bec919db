"""Every error of the gateway: gRPC code, reason, and whether trying again can help."""

from __future__ import annotations

from grpc import StatusCode
from lmesh_chassis.errors import DrainingError, InternalError, InvalidArgumentError, ServiceError

DOMAIN = "lmesh.inference"

__all__ = [
    "DOMAIN",
    "AdapterNotFoundError",
    "AdapterRefusedError",
    "ArtifactCorruptError",
    "ArtifactNotFoundError",
    "ArtifactsDisabledError",
    "BadUploadError",
    "CancelledError",
    "ContextLengthExceededError",
    "DeadlineExceededError",
    "DrainingError",
    "DuplicateRequestIdError",
    "InternalError",
    "InvalidArgumentError",
    "LedgerBehindError",
    "LedgerDisabledError",
    "LedgerUnavailableError",
    "ModelLoadingError",
    "ModelNotFoundError",
    "ModelUnusableError",
    "NoChatTemplateError",
    "NoWorkerError",
    "QueueFullError",
    "QueueTimeoutError",
    "QuotaExceededError",
    "RateLimitedError",
    "RequestEndedError",
    "RequestNotFoundError",
    "RequestTooLargeError",
    "ResumedElsewhereError",
    "SchedulerUnavailableError",
    "ServiceError",
    "StoreFullError",
    "TemplateFailedError",
    "TemplateInvalidError",
    "TemplateRefusedError",
    "TemplateTimeoutError",
    "UnauthenticatedError",
    "WorkerFailedError",
    "WorkerLostError",
]


class UnauthenticatedError(ServiceError):
    """The call has no API key, or one that is not known."""

    code = StatusCode.UNAUTHENTICATED
    reason = "UNAUTHENTICATED"


class ContextLengthExceededError(InvalidArgumentError):
    """The prompt leaves no room in the model's context; metadata holds prompt_tokens and max_model_len."""

    reason = "CONTEXT_LENGTH_EXCEEDED"


class NoChatTemplateError(ServiceError):
    """A conversation for a model that has no chat template."""

    code = StatusCode.FAILED_PRECONDITION
    reason = "NO_CHAT_TEMPLATE"


class TemplateRefusedError(InvalidArgumentError):
    """The model's chat template refuses these messages."""

    reason = "TEMPLATE_REFUSED"


class TemplateFailedError(InvalidArgumentError):
    """The model's chat template failed on these messages."""

    reason = "TEMPLATE_FAILED"


class TemplateInvalidError(ServiceError):
    """The model's chat template is no template at all; only its publisher can mend it."""

    code = StatusCode.FAILED_PRECONDITION
    reason = "TEMPLATE_INVALID"


class TemplateTimeoutError(ServiceError):
    """The model's chat template did not end in time."""

    code = StatusCode.INVALID_ARGUMENT
    reason = "TEMPLATE_TIMEOUT"


class RequestTooLargeError(ServiceError):
    """The request message is larger than this gateway takes."""

    code = StatusCode.RESOURCE_EXHAUSTED
    reason = "REQUEST_TOO_LARGE"


class DuplicateRequestIdError(ServiceError):
    """The request id is in use, or was in use lately."""

    code = StatusCode.ALREADY_EXISTS
    reason = "DUPLICATE_REQUEST_ID"


class ModelNotFoundError(ServiceError):
    """No worker serves a model of that id, or the caller has no adapter of that name and version."""

    code = StatusCode.NOT_FOUND
    reason = "MODEL_NOT_FOUND"


class ModelLoadingError(ServiceError):
    """This gateway has just started, or is still loading the tokenizer of a model that workers serve."""

    code = StatusCode.UNAVAILABLE
    reason = "MODEL_LOADING"
    retryable = True


class ModelUnusableError(ServiceError):
    """Workers serve the model, and its tokenizer cannot be loaded here, or is not the workers' one."""

    code = StatusCode.FAILED_PRECONDITION
    reason = "MODEL_UNUSABLE"


class AdapterNotFoundError(ServiceError):
    """The adapter that the request runs with was deleted, and no worker holds it any more."""

    code = StatusCode.NOT_FOUND
    reason = "ADAPTER_NOT_FOUND"


class AdapterRefusedError(ServiceError):
    """No worker can load the adapter; metadata `worker_reason` says why."""

    code = StatusCode.FAILED_PRECONDITION
    reason = "ADAPTER_REFUSED"


class QueueFullError(ServiceError):
    """The mesh has as many requests waiting as it admits."""

    code = StatusCode.RESOURCE_EXHAUSTED
    reason = "QUEUE_FULL"
    retryable = True


class RateLimitedError(ServiceError):
    """The tenant sends requests or tokens faster than it may."""

    code = StatusCode.RESOURCE_EXHAUSTED
    reason = "RATE_LIMITED"
    retryable = True


class QuotaExceededError(ServiceError):
    """The tenant has as many requests waiting or running as it may."""

    code = StatusCode.RESOURCE_EXHAUSTED
    reason = "QUOTA_EXCEEDED"
    retryable = True


class NoWorkerError(ServiceError):
    """No worker can take the request now."""

    code = StatusCode.UNAVAILABLE
    reason = "NO_WORKER"
    retryable = True


class SchedulerUnavailableError(ServiceError):
    """This gateway has no scheduler now, or lost it before the request was admitted."""

    code = StatusCode.UNAVAILABLE
    reason = "SCHEDULER_UNAVAILABLE"
    retryable = True


class WorkerLostError(ServiceError):
    """The worker that ran the request is gone, and no other one could take the request over."""

    code = StatusCode.UNAVAILABLE
    reason = "WORKER_LOST"
    retryable = True


class WorkerFailedError(ServiceError):
    """The worker ended the request with an error; metadata `worker_reason` says which."""

    code = StatusCode.INTERNAL
    reason = "WORKER_FAILED"


class DeadlineExceededError(ServiceError):
    """The request's deadline passed."""

    code = StatusCode.DEADLINE_EXCEEDED
    reason = "DEADLINE_EXCEEDED"


class QueueTimeoutError(ServiceError):
    """No worker took the request within its queue timeout or deadline."""

    code = StatusCode.DEADLINE_EXCEEDED
    reason = "QUEUE_TIMEOUT"
    retryable = True


class CancelledError(ServiceError):
    """The request was cancelled by a Cancel call."""

    code = StatusCode.CANCELLED
    reason = "CANCELLED"


class RequestNotFoundError(ServiceError):
    """No request of that id is known."""

    code = StatusCode.NOT_FOUND
    reason = "REQUEST_NOT_FOUND"


class RequestEndedError(ServiceError):
    """The request has already ended."""

    code = StatusCode.FAILED_PRECONDITION
    reason = "REQUEST_ENDED"


class LedgerBehindError(ServiceError):
    """The cursor is ahead of what the ledger has of the request; metadata `have` says how many ids of each choice."""

    code = StatusCode.ABORTED
    reason = "LEDGER_BEHIND"
    retryable = True


class LedgerDisabledError(ServiceError):
    """What was asked for needs a ledger, and this gateway has none: its setting redis_url is empty."""

    code = StatusCode.FAILED_PRECONDITION
    reason = "LEDGER_DISABLED"


class LedgerUnavailableError(ServiceError):
    """The ledger does not answer, or has no room for a request that may not go on without it."""

    code = StatusCode.UNAVAILABLE
    reason = "LEDGER_UNAVAILABLE"
    retryable = True


class ResumedElsewhereError(ServiceError):
    """The request goes on in a stream that was opened later, by Resume."""

    code = StatusCode.ABORTED
    reason = "RESUMED_ELSEWHERE"


class ArtifactsDisabledError(ServiceError):
    """This gateway has no artifact store: its setting artifacts is empty."""

    code = StatusCode.FAILED_PRECONDITION
    reason = "ARTIFACTS_DISABLED"


class ArtifactNotFoundError(ServiceError):
    """The store has no artifact of that digest."""

    code = StatusCode.NOT_FOUND
    reason = "UNKNOWN_ARTIFACT"


class ArtifactCorruptError(ServiceError):
    """The bytes, stored or uploaded, are not those of their digest."""

    code = StatusCode.DATA_LOSS
    reason = "CORRUPT_ARTIFACT"


class StoreFullError(ServiceError):
    """The artifact store has no room; what was uploaded so far is kept."""

    code = StatusCode.RESOURCE_EXHAUSTED
    reason = "STORE_FULL"


class BadUploadError(InvalidArgumentError):
    """A size that is not allowed, or a piece that is not the upload's next; an empty upload tells where to go on."""

    reason = "BAD_UPLOAD"
